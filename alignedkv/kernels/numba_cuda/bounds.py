"""Bounds of one query head from its normalised sums: `reference_bounds`.

c_acc sum p^ 8.5 g^V, what float32 tiles add (`arithmetic.numba_cuda`), joins each of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from alignedkv.kernels.arithmetic import REACH as PREFIX_REACH
from alignedkv.kernels.numba_cuda.columns import (
    ERROR,
    ERROR_SIZE,
    KEY_SQUARE,
    LARGEST_SHIFT,
    LIKELY,
    LINEAR_ONE,
    LINEAR_SIZE,
    REACH,
    SAMPLED_LARGEST,
    SAMPLED_SQUARE,
    SECOND,
    SHIFTED,
    SHIFTED_SIZE,
    SIZE,
    SKIPPED,
    SMALLEST,
    SQUARE_ONE,
    SQUARE_SIZE,
    VALUE,
    VALUE_BASE,
    VALUE_ERROR,
    VALUE_SQUARE,
)
from alignedkv.kernels.numba_cuda.maths import curvature, exp
from alignedkv.kernels.numba_cuda.rows import device
from alignedkv.kernels.reference_bounds import PREFIX_EXCESS, VARIANCE_FLOOR
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind

#: Covers what scores in float32 change in the weights that an estimate is formed with (twice e^a,
#: for rows whose first plane means anything), and the rounding of float64 sums and of the result.
_SAFETY = 1.0 + 2.0**-10
_ROOT_2 = math.sqrt(2.0)


def bound_function(spec: DecodeSpec, accumulation: float) -> Any:
    """``bound_of(sums, classes, sink, hint, spread, mean_size, step)``.

    The arguments are normalised sums [SUMS] and class sums [CLASS_SUMS, P], p of the sink, rho as
    the step was told it and as it came out, max_j |value_mean_j| and the step's numbers.
    """
    estimate, deterministic, statistical = _estimate(spec), _deterministic, _statistical(spec)
    kind, sampled = spec.bound, spec.sample_values
    is_estimate = kind is BoundKind.ESTIMATE
    is_statistical = kind is BoundKind.STATISTICAL

    @device
    def bound_of(sums, classes, sink, hint, spread, mean_size, step):
        if is_estimate:
            found = estimate(sums, hint, spread, step.deviations)
        elif is_statistical:
            found = statistical(sums, classes, sink, hint, spread, mean_size, step)
            # Where sampling left rows out, Theorem 5 knows nothing of what was computed.
            if not sampled:
                found = min(found, deterministic(sums, sink, spread))
        else:
            found = deterministic(sums, sink, spread)
        return (found + accumulation * PREFIX_REACH * sums[REACH]) * _SAFETY

    return bound_of


@device
def _sampling(variance, sums, z):
    """beta of (S2): `reference_bounds.sampling_bound`."""
    drawn = PREFIX_EXCESS**2 * sums[SAMPLED_SQUARE]
    largest = PREFIX_EXCESS * sums[SAMPLED_LARGEST]
    total = variance + drawn
    best = z * z * largest / 6.0
    best += math.sqrt(best * best + z * z * total)
    if 0.0 < total < np.inf:
        for j in range(48):
            b = z / math.sqrt(total) * 2.0 ** (-j / 8.0)
            bennett = b * variance / 2.0 + z * z / (2.0 * b)
            bennett += b * drawn * curvature(b * largest)
            best = min(best, bennett)
    return best


@device
def _deterministic(sums, sink, spread):
    """Theorem 5 in its scalar form (4.3)."""
    value = sums[VALUE_ERROR]
    smallest = sums[SMALLEST] + sink
    if smallest == 0.0:
        return np.inf
    return value + (sums[ERROR_SIZE] + (spread + value) * sums[ERROR]) / smallest


@device
def _mixture(x, floor, z):
    """z_V sqrt(V) of (5.3) at V = x^2, floor > 0."""
    return math.sqrt((x * x + floor) * (z * z + math.log1p(x * x / floor)))


def _value_function(spec: DecodeSpec) -> Any:
    """What value planes leave open, and rows without any: (S2), or z sqrt(G) and the skipped."""
    sampled = spec.sample_values

    @device
    def value_error(variance, sums, z):
        if sampled:
            return _sampling(variance, sums, z)
        return z * math.sqrt(variance) + sums[SKIPPED]

    return value_error


def _estimate(spec: DecodeSpec) -> Any:
    value_error = _value_function(spec)

    @device
    def estimate(sums, hint, spread, z):
        """Estimate 9, (5.7)."""
        stale = 1.0
        if spread > hint:
            stale = spread / hint if hint > 0.0 else np.inf
        variance = stale * stale * sums[KEY_SQUARE] + sums[VALUE_SQUARE]
        return value_error(variance, sums, z) + stale * sums[SECOND]

    return estimate


def _statistical(spec: DecodeSpec) -> Any:
    value_error, rows = _value_function(spec), spec.dither_rows

    @device
    def statistical(sums, classes, sink, hint, spread, mean_size, step):
        """Corollary 8: `reference_bounds.statistical`; weights may err by e^(2 e^a) either way."""
        z = step.deviations
        floor_one = VARIANCE_FLOOR * (step.tolerance / z) * (step.tolerance / z)
        floor = floor_one * hint * hint
        likely = sums[LIKELY] + sink
        if not (floor > 0.0 and likely > 0.0):
            return np.inf
        upper = exp(2.0 * sums[LARGEST_SHIFT]) / likely
        linear = linear_one = quadratic = quadratic_one = 0.0
        square = square_one = largest = largest_one = variance = 0.0
        for s in range(rows):
            one, w_one = upper * classes[LINEAR_ONE, s], upper * classes[SQUARE_ONE, s]
            a = upper * classes[LINEAR_SIZE, s] + spread * one
            w = upper * classes[SQUARE_SIZE, s] + spread * w_one
            linear, linear_one = linear + a * a, linear_one + one * one
            quadratic, quadratic_one = quadratic + w, quadratic_one + w_one
            square, square_one = square + w * w, square_one + w_one * w_one
            largest, largest_one = max(largest, w), max(largest_one, w_one)
            variance += classes[VALUE, s] * classes[VALUE, s] / 3.0
        linear, linear_one = math.sqrt(linear), math.sqrt(linear_one)
        quadratic += _ROOT_2 * z * math.sqrt(square) + z * z * largest
        quadratic_one += _ROOT_2 * z * math.sqrt(square_one) + z * z * largest_one

        delta = 1.0 - _mixture(linear_one, floor_one, z)
        farthest = spread + max(sums[SIZE], mean_size)
        most = linear + farthest * linear_one
        level = math.sqrt(z * z + math.log1p(most * most / floor))
        room = delta - (level + 1.0 / level) * linear_one - quadratic_one
        if not (delta > 0.0 and room > 0.0):
            return np.inf
        value = value_error(variance, sums, z) + sums[VALUE_BASE]
        random = (_mixture(linear, floor, z) + quadratic + delta * value) / room
        # The shifts that are not random: o and o deg of theory.md 5.1, by Theorem 4.
        grown = exp(sums[LARGEST_SHIFT]) * upper
        shift, shift_size = grown * sums[SHIFTED], grown * sums[SHIFTED_SIZE]
        return random * (1.0 + shift) + shift_size + spread * shift

    return statistical
