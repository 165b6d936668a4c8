"""What a token adds to its thread's sums, for one head: `reference_sums`.

Weights are float64 and relative to the split's largest score so far.
"""

from __future__ import annotations

import math
from typing import Any

from alignedkv.kernels.numba_cuda.columns import (
    AFTER_SQUARES,
    DETERMINISTIC_SUMS,
    ERROR,
    ERROR_SIZE,
    ESTIMATE_SUMS,
    FIRST_SQUARE,
    KEY_SQUARE,
    NORM1,
    NORM2,
    REACH,
    SAMPLED_LARGEST,
    SAMPLED_SQUARE,
    SECOND,
    SHIFT,
    SKIPPED,
    SMALLEST,
    SPREAD,
    VALUE_ERROR,
    VALUE_SQUARE,
    WEIGHT,
)
from alignedkv.kernels.numba_cuda.maths import expm1
from alignedkv.kernels.numba_cuda.rows import device
from alignedkv.kernels.reference_plan import ENCODER_VALUE
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind


def count_sums(spec: DecodeSpec) -> int:
    """Columns of a split's sums."""
    return ESTIMATE_SUMS if spec.bound is BoundKind.ESTIMATE else DETERMINISTIC_SUMS


def combine_functions(spec: DecodeSpec) -> tuple[Any, Any]:
    """``rescaled(k, sum, factor)`` and ``combined(k, one, other)`` of column k."""
    estimate = spec.bound is BoundKind.ESTIMATE

    @device
    def rescaled(k, number, factor):
        """A sum whose weights are multiplied by ``factor``."""
        if estimate and FIRST_SQUARE <= k < AFTER_SQUARES:
            return number * (factor * factor)
        return number * factor

    @device
    def combined(k, one, other):
        """The sums of two disjoint sets of tokens together."""
        if estimate and k == SAMPLED_LARGEST:
            return max(one, other)
        return one + other

    return rescaled, combined


def add_function(spec: DecodeSpec, weight_error: float) -> Any:
    """``add_token``: one token into the sums [SUMS] of head g.

    Parameters
    ----------
    weight_error : float
        e^w of (7.2).
    """
    sampled = spec.sample_values
    unit = 2.0**-spec.layout.scale_shift

    @device
    def add_estimate(
        sums, facts, g, weight, key_scale, half, value_scale, value_half, skipped, live, chance
    ):
        size = spec_size * value_scale
        reach = size + facts[g, SPREAD]
        variance = (facts[g, NORM2] * half) ** 2 / 3.0
        sums[g, WEIGHT] += weight
        sums[g, REACH] += weight / chance * value_scale
        sums[g, SECOND] += weight * variance * reach
        sums[g, KEY_SQUARE] += (weight * reach) ** 2 * expm1(variance)
        sums[g, VALUE_SQUARE] += (weight * value_half) ** 2 / 3.0
        if sampled:
            drawn = weight * size
            sums[g, SAMPLED_SQUARE] += drawn**2 * (1.0 / chance - 1.0)
            if chance < 1.0:
                sums[g, SAMPLED_LARGEST] = max(sums[g, SAMPLED_LARGEST], drawn / chance)
        else:
            sums[g, SKIPPED] += weight * skipped

    @device
    def add_deterministic(
        sums, facts, g, weight, key_scale, half, value_scale, value_half, skipped, live, chance
    ):
        error = facts[g, NORM1] * half + live * key_scale * facts[g, SHIFT] + weight_error
        grown = weight * expm1(error)
        lost = value_half + skipped + live * (ENCODER_VALUE * unit * value_scale)
        sums[g, WEIGHT] += weight
        sums[g, REACH] += weight * value_scale
        sums[g, VALUE_ERROR] += weight * lost
        sums[g, ERROR] += grown
        sums[g, ERROR_SIZE] += grown * (spec_size * value_scale)
        sums[g, SMALLEST] += weight * math.exp(-error)

    spec_size = spec.layout.half_range
    return add_estimate if spec.bound is BoundKind.ESTIMATE else add_deterministic
