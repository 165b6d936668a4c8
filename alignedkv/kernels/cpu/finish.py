"""Merging splits and bounding the outputs on the CPU: `reference_bounds`, head by head."""

from __future__ import annotations

import numpy as np

from alignedkv.kernels.arithmetic import REACH as PREFIX_REACH
from alignedkv.kernels.cpu.compiled import compiled
from alignedkv.kernels.cpu.maths import add_scaled
from alignedkv.kernels.cpu.sums import curvature, scale_sums
from alignedkv.kernels.cpu.tile import (
    AFTER_SQUARES,
    DETERMINISTIC,
    ERROR,
    ERROR_SIZE,
    ESTIMATE,
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
    SPREAD,
    SQUARE_ONE,
    SQUARE_SIZE,
    SUMS,
    VALUE,
    VALUE_BASE,
    VALUE_ERROR,
    VALUE_SQUARE,
)
from alignedkv.kernels.reference_bounds import PREFIX_EXCESS, VARIANCE_FLOOR

#: Factor that covers the rounding of all float64 sums and the errors of `exp` and `expm1`, so that
#: a bound is never below the reference's for the same reads (theory.md 7.2).
SAFETY = 1.0 + 2.0**-20


@compiled
def merge_split(sums, classes, out, factor, total, kind, merged):
    """Add one split of one query head to the whole, ``factor`` = exp(its top - the largest).

    Parameters
    ----------
    sums, classes, out : float64 arrays [SUMS], [CLASS_SUMS, P], [C]
        The sums are multiplied in place.
    factor : float64
        0 for a split without tokens.
    total, kind, merged : float64 arrays of the same shapes
        Added to.
    """
    scale_sums(sums, factor)
    for k in range(SUMS):
        if k < AFTER_SQUARES:
            total[k] += sums[k]
        else:
            total[k] = max(total[k], sums[k])
    add_scaled(classes, factor, kind)
    add_scaled(out, factor, merged)


@compiled
def bound_head(step, facts, sums, classes, sink, spread, mean_size):
    """Bound of one query head from its normalised sums: `reference_bounds.bound`.

    Parameters
    ----------
    facts : float64 array [FACTS]
    sums, classes : float64 arrays [SUMS], [CLASS_SUMS, P]
    sink, spread, mean_size : float64
        p of the sink, rho, max_j |value_mean_j|.

    Notes
    -----
    c_acc sum p^ 8.5 g^V, what float32 tiles add (`arithmetic.cpu`), joins every bound.
    """
    if step.kind == ESTIMATE:
        found = _estimate(step, facts, sums, spread)
    else:
        found = _deterministic(sums, sink, spread)
        if step.kind != DETERMINISTIC:
            likely = _statistical(step, facts, sums, classes, sink, spread, mean_size)
            found = likely if step.sampled else min(likely, found)
    return (found + step.accumulation * PREFIX_REACH * sums[REACH]) * SAFETY


@compiled
def _estimate(step, facts, sums, spread):
    stale = spread / facts[SPREAD] if spread > facts[SPREAD] else 1.0
    variance = stale**2 * sums[KEY_SQUARE] + sums[VALUE_SQUARE]
    second = stale * sums[SECOND]
    if step.sampled:
        return _sampling(step, variance, sums) + second
    return step.deviations * np.sqrt(variance) + sums[SKIPPED] + second


@compiled
def _deterministic(sums, sink, spread):
    value = sums[VALUE_ERROR]
    return value + (sums[ERROR_SIZE] + (spread + value) * sums[ERROR]) / (sums[SMALLEST] + sink)


@compiled
def _statistical(step, facts, sums, classes, sink, spread, mean_size):
    """Corollary 8: `reference_bounds.statistical`; weights may err by e^(2 e^a) on both sides."""
    z = step.deviations
    arithmetic = np.exp(2.0 * sums[LARGEST_SHIFT])
    upper = arithmetic / (sums[LIKELY] + sink)
    linear = linear_one = quadratic_one = quadratic = 0.0
    square = square_one = largest = largest_one = variance = 0.0
    for s in range(classes.shape[1]):
        a = upper * (classes[LINEAR_SIZE, s] + spread * classes[LINEAR_ONE, s])
        w = upper * (classes[SQUARE_SIZE, s] + spread * classes[SQUARE_ONE, s])
        one, w_one = upper * classes[LINEAR_ONE, s], upper * classes[SQUARE_ONE, s]
        linear, linear_one = linear + a**2, linear_one + one**2
        quadratic, quadratic_one = quadratic + w, quadratic_one + w_one
        square, square_one = square + w**2, square_one + w_one**2
        largest, largest_one = max(largest, w), max(largest_one, w_one)
        variance += classes[VALUE, s] ** 2 / 3.0
    linear, linear_one = np.sqrt(linear), np.sqrt(linear_one)
    quadratic += np.sqrt(2.0) * z * np.sqrt(square) + z * z * largest
    quadratic_one += np.sqrt(2.0) * z * np.sqrt(square_one) + z * z * largest_one

    floor_one = VARIANCE_FLOOR * (step.tolerance / z) ** 2
    floor = floor_one * facts[SPREAD] ** 2
    delta = 1.0 - _mixture(linear_one, floor_one, z)
    farthest = spread + max(sums[SIZE], mean_size)
    level = z * z + np.log1p((linear + farthest * linear_one) ** 2 / floor)
    slope = np.sqrt(level) + 1.0 / np.sqrt(level)
    if step.sampled:
        value = _sampling(step, variance, sums)
    else:
        value = z * np.sqrt(variance) + sums[SKIPPED]
    value += sums[VALUE_BASE]
    room = delta - slope * linear_one - quadratic_one
    if not (delta > 0 and room > 0):
        return np.inf
    random = (_mixture(linear, floor, z) + quadratic + delta * value) / room
    grown = np.exp(sums[LARGEST_SHIFT]) * upper
    shift, shift_size = grown * sums[SHIFTED], grown * sums[SHIFTED_SIZE]
    return random * (1.0 + shift) + shift_size + spread * shift


@compiled
def _mixture(x, floor, z):
    if not floor > 0:
        return np.inf
    return np.sqrt((x**2 + floor) * (z * z + np.log1p(x**2 / floor)))


@compiled
def _sampling(step, variance, sums):
    """beta of (S2): `reference_bounds.sampling_bound`."""
    z = step.deviations
    sampled = PREFIX_EXCESS**2 * sums[SAMPLED_SQUARE]
    largest = PREFIX_EXCESS * sums[SAMPLED_LARGEST]
    total = variance + sampled
    best = z**2 * largest / 6 + np.sqrt(z**4 * largest**2 / 36 + z**2 * total)
    if total > 0:
        for j in range(48):
            b = z / np.sqrt(total) * 2.0 ** (-j / 8)
            bennett = b * variance / 2 + b * sampled * curvature(b * largest) + z**2 / (2 * b)
            best = min(best, bennett)
    return best
