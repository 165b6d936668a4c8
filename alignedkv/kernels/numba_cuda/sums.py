"""What a token adds to its thread's sums, for one head: `reference_sums`.

Weights are float64 and relative to the split's largest score so far.
"""

from __future__ import annotations

import math
from typing import Any

from alignedkv.kernels.numba_cuda.columns import (
    ERROR,
    ERROR_SIZE,
    KEY_SQUARE,
    LARGEST_SHIFT,
    NORM1,
    NORM2,
    REACH,
    SAMPLED_LARGEST,
    SAMPLED_SQUARE,
    SECOND,
    SHIFT,
    SIZE,
    SKIPPED,
    SMALLEST,
    SPREAD,
    VALUE_BASE,
    VALUE_ERROR,
    VALUE_SQUARE,
    WEIGHT,
)
from alignedkv.kernels.numba_cuda.maths import expm1
from alignedkv.kernels.numba_cuda.rows import device
from alignedkv.kernels.reference_plan import ENCODER_VALUE
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import DITHER_FRACTION_BITS
from alignedkv.policy import BoundKind

#: Of every bound kind: columns, those of degree 2 in the weights, of degree 0, and maxima.
_COUNTS = {
    BoundKind.ESTIMATE: VALUE_SQUARE + 1,
    BoundKind.DETERMINISTIC: SMALLEST + 1,
    BoundKind.STATISTICAL: LARGEST_SHIFT + 1,
}
_SQUARES = {
    BoundKind.ESTIMATE: (SAMPLED_SQUARE, KEY_SQUARE, VALUE_SQUARE),
    BoundKind.DETERMINISTIC: (SAMPLED_SQUARE,),
    BoundKind.STATISTICAL: (SAMPLED_SQUARE,),
}
_EXTREMES = {BoundKind.STATISTICAL: (SIZE, LARGEST_SHIFT)}


def count_sums(spec: DecodeSpec) -> int:
    """Columns of a split's sums."""
    return _COUNTS[spec.bound]


def combine_functions(spec: DecodeSpec) -> tuple[Any, Any]:
    """``rescaled(k, sum, factor)`` and ``combined(k, one, other)`` of column k."""
    columns = range(count_sums(spec))
    squares, extremes = _SQUARES[spec.bound], _EXTREMES.get(spec.bound, ())
    degrees = tuple(0 if k in extremes else 2 if k in squares else 1 for k in columns)
    maxima = tuple(k == SAMPLED_LARGEST or k in extremes for k in columns)

    @device
    def rescaled(k, number, factor):
        """A sum whose weights are multiplied by ``factor``."""
        if degrees[k] == 0:
            return number
        return number * factor if degrees[k] == 1 else number * (factor * factor)

    @device
    def combined(k, one, other):
        """The sums of two disjoint sets of tokens together."""
        return max(one, other) if maxima[k] else one + other

    return rescaled, combined


def correction_function(spec: DecodeSpec) -> Any:
    """``correction_of(facts, g, half)``: `reference_sums.mean_correction`, kappa and the bias."""
    corrected = spec.bound is BoundKind.ESTIMATE and not spec.softcap

    @device
    def correction_of(facts, g, half):
        variance = (facts[g, NORM2] * half) ** 2 / 3.0
        if corrected:
            return variance / 2.0, variance * variance / 20.0
        return 0.0, variance

    return correction_of


def add_function(spec: DecodeSpec, weight_error: float) -> Any:
    """``add_token``: one token into the sums [SUMS] of head g.

    Parameters
    ----------
    weight_error : float
        e^w of (7.2).
    """
    sampled, statistical = spec.sample_values, spec.bound is BoundKind.STATISTICAL
    unit, half_range = 2.0**-spec.layout.scale_shift, spec.layout.half_range
    value_base = (2.0 ** -(DITHER_FRACTION_BITS + 1) + ENCODER_VALUE) * unit
    correction_of = correction_function(spec)

    @device
    def add_common(sums, g, weight, value_scale, skipped, chance):
        sums[g, WEIGHT] += weight
        sums[g, REACH] += weight / chance * value_scale
        if sampled:
            drawn = weight * (half_range * value_scale)
            sums[g, SAMPLED_SQUARE] += drawn**2 * (1.0 / chance - 1.0)
            if chance < 1.0:
                sums[g, SAMPLED_LARGEST] = max(sums[g, SAMPLED_LARGEST], drawn / chance)
        else:
            sums[g, SKIPPED] += weight * skipped

    @device
    def add_estimate(
        sums, facts, g, weight, key_scale, half, value_scale, value_half, skipped, live, chance
    ):
        add_common(sums, g, weight, value_scale, skipped, chance)
        reach = half_range * value_scale + facts[g, SPREAD]
        variance = (facts[g, NORM2] * half) ** 2 / 3.0
        _, bias = correction_of(facts, g, half)
        sums[g, SECOND] += weight * bias * reach
        sums[g, KEY_SQUARE] += (weight * reach) ** 2 * expm1(variance)
        sums[g, VALUE_SQUARE] += (weight * value_half) ** 2 / 3.0

    @device
    def add_certain(
        sums, facts, g, weight, key_scale, half, value_scale, value_half, skipped, live, chance
    ):
        add_common(sums, g, weight, value_scale, skipped, chance)
        error = facts[g, NORM1] * half + live * key_scale * facts[g, SHIFT] + weight_error
        grown = weight * expm1(error)
        lost = value_half + skipped + live * (ENCODER_VALUE * unit * value_scale)
        sums[g, VALUE_ERROR] += weight * lost
        sums[g, ERROR] += grown
        sums[g, ERROR_SIZE] += grown * (half_range * value_scale)
        sums[g, SMALLEST] += weight * math.exp(-error)
        if statistical:
            sums[g, VALUE_BASE] += weight * live * (value_base * value_scale)

    return add_estimate if spec.bound is BoundKind.ESTIMATE else add_certain
