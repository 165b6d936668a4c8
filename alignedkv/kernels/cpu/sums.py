"""What a tile adds to its split's sums: `reference_sums` on the CPU."""

from __future__ import annotations

import numpy as np

from alignedkv.kernels.cpu.compiled import compiled, fast
from alignedkv.kernels.cpu.maths import (
    add_rows,
    exp,
    expm1,
    first_digits,
    prefix_digits,
    scale,
)
from alignedkv.kernels.cpu.tile import (
    AFTER_SQUARES,
    DITHER,
    ERROR,
    ERROR_SIZE,
    ESTIMATE,
    FIRST_SQUARE,
    KEY_SQUARE,
    LARGEST_SHIFT,
    LIKELY,
    LINEAR_ONE,
    LINEAR_SIZE,
    LOG_Z,
    NORM1,
    NORM2,
    REACH,
    REFINED_ERROR,
    SAMPLED_LARGEST,
    SAMPLED_SQUARE,
    SCORE_ERROR,
    SECOND,
    SHIFT,
    SHIFTED,
    SHIFTED_SIZE,
    SIZE,
    SKIPPED,
    SMALLEST,
    SPREAD,
    SQUARE_ONE,
    SQUARE_SIZE,
    THETA,
    TILE,
    VALUE,
    VALUE_BASE,
    VALUE_ERROR,
    VALUE_SQUARE,
    WEIGHT,
)
from alignedkv.kernels.reference_plan import ENCODER_VALUE
from alignedkv.planes import DITHER_FRACTION_BITS

_ROOT_3 = np.sqrt(3.0)
_BASE_ERROR = 2.0 ** -(DITHER_FRACTION_BITS + 1) + ENCODER_VALUE
#: Keeps weights times 8 g below float32's largest number; a power of two.
_GUARD = 2.0**-8


@compiled
def scale_sums(sums, factor):
    """Multiply a head's sums [SUMS] as their degrees in the weights ask."""
    for k in range(SAMPLED_LARGEST + 1):
        sums[k] *= factor**2 if FIRST_SQUARE <= k < AFTER_SQUARES else factor


@compiled
def correct_means(step, head, tile, n):
    """Subtract kappa (`reference_sums.mean_correction`) from the scores that become weights."""
    if step.kind == ESTIMATE and step.softcap == 0:
        for g in range(len(head.facts)):
            _correct_mean(head.facts[g, NORM2] ** 2 / 6.0, tile, g, n)


@fast
def _correct_mean(half_norm, tile, g, n):
    for r in range(n):
        tile.score[g, r] -= half_norm * tile.half[g, r] ** 2


@compiled
def weigh(tile, n, top, sums, classes, out):
    """Weights relative to the largest score so far, to which earlier sums are brought."""
    for g in range(len(top)):
        largest = top[g]
        for r in range(n):
            largest = max(largest, tile.score[g, r])
        if largest > top[g]:
            factor = exp(top[g] - largest)
            scale_sums(sums[g], factor)
            scale(classes[g], factor)
            scale(out[g], factor)
            top[g] = largest
        _add_weights(tile, g, n, top[g], sums)


@fast
def _add_weights(tile, g, n, top, sums):
    total = 0.0
    for r in range(n):
        weight = exp(tile.score[g, r] - top)
        tile.weight[g, r] = weight
        total += weight
    sums[g, WEIGHT] += total


@compiled
def add_errors(cache, step, head, tile, n, sums):
    """What the bound needs of the tile, as `reference_sums.add_up` says it."""
    for g in range(len(head.facts)):
        if step.sampled:
            _add_sampled(tile, g, n, sums)
        if step.kind == ESTIMATE:
            _add_estimate(step.softcap == 0, head.facts, tile, g, n, sums)
        else:
            _add_certain(step, head.facts, tile, g, n, sums)


@fast
def _add_sampled(tile, g, n, sums):
    variance, largest = 0.0, sums[g, SAMPLED_LARGEST]
    for r in range(n):
        reach = tile.weight[g, r] * tile.size[r]
        variance += reach**2 * (1.0 / tile.chance[r] - 1.0)
        largest = max(largest, reach / tile.chance[r] if tile.chance[r] < 1 else 0.0)
    sums[g, SAMPLED_SQUARE] += variance
    sums[g, SAMPLED_LARGEST] = largest


@fast
def _add_estimate(corrected, facts, tile, g, n, sums):
    key, value, skipped, second = 0.0, 0.0, 0.0, 0.0
    rho, norm = facts[g, SPREAD], facts[g, NORM2] ** 2 / 3.0
    for r in range(n):
        weight, reach = tile.weight[g, r], tile.size[r] + rho
        variance = norm * tile.half[g, r] ** 2
        key += (weight * reach) ** 2 * expm1(variance)
        value += (weight * tile.value_error[r]) ** 2
        skipped += weight * tile.skipped[r]
        second += weight * (variance**2 / 20.0 if corrected else variance) * reach
    sums[g, KEY_SQUARE] += key
    sums[g, VALUE_SQUARE] += value / 3.0
    sums[g, SKIPPED] += skipped
    sums[g, SECOND] += second


@fast
def _add_certain(step, facts, tile, g, n, sums):
    error, error_size, value, smallest, skipped, base = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    norm = facts[g, NORM1]
    for r in range(n):
        weight, unit = tile.weight[g, r], tile.value_scale[r] * tile.live[r] / 4096.0
        e = norm * tile.half[g, r] + _shift(step, facts, tile, g, r)
        grown = weight * expm1(e)
        error += grown
        error_size += grown * tile.size[r]
        value += weight * (tile.value_error[r] + tile.skipped[r] + ENCODER_VALUE * unit)
        smallest += weight * exp(-e)
        skipped += weight * tile.skipped[r]
        base += weight * unit
    sums[g, ERROR] += error
    sums[g, ERROR_SIZE] += error_size
    sums[g, VALUE_ERROR] += value
    sums[g, SMALLEST] += smallest
    sums[g, SKIPPED] += skipped
    sums[g, VALUE_BASE] += _BASE_ERROR * base


@fast
def _shift(step, facts, tile, g, r):
    """b_t + e^a_t + e^w_t: the score error that is not random."""
    step_size = tile.key_scale[r] * tile.live[r]
    first = tile.half[g, r] >= 0.5 * step_size
    arithmetic = facts[g, SCORE_ERROR] if first else facts[g, REFINED_ERROR]
    return step_size * (facts[g, SHIFT] + arithmetic) + step.weight_error


@compiled
def add_classes(cache, step, head, tile, n, top, sums, classes):
    """The class sums of Corollary 8: `reference_sums._class_sums`."""
    z = step.deviations
    for g in range(len(top)):
        deviation = head.facts[g, NORM2] / _ROOT_3
        for r in range(n):
            own, size = tile.own[r], tile.size[r]
            spread = z * deviation * tile.finest_half[r]
            upper = exp(tile.finest[g, r] - top[g] + spread)
            shift = _shift(step, head.facts, tile, g, r)
            one = upper * deviation * tile.half[g, r]
            two = upper * _stops(cache, step, head.facts, tile, g, r, spread)
            classes[g, LINEAR_ONE, own] += one
            classes[g, LINEAR_SIZE, own] += one * size
            classes[g, SQUARE_ONE, own] += two
            classes[g, SQUARE_SIZE, own] += two * size
            classes[g, VALUE, own] += tile.weight[g, r] * tile.value_error[r]
            shifted = upper * expm1(shift)
            sums[g, SHIFTED] += shifted
            sums[g, SHIFTED_SIZE] += shifted * size
            sums[g, LIKELY] += exp(tile.finest[g, r] - top[g] - spread)
            sums[g, SIZE] = max(sums[g, SIZE], size)
            sums[g, LARGEST_SHIFT] = max(sums[g, LARGEST_SHIFT], shift)


@compiled
def _stops(cache, step, facts, tile, g, r, spread):
    """gamma sigma^2, once for every plane count at which the token may stop."""
    if tile.live[r] == 0:
        return 0.0
    z, deviation = step.deviations, facts[g, NORM2] / _ROOT_3
    score, reach = tile.finest[g, r], tile.size[r] + facts[g, SPREAD]
    lowest = exp(score - spread - facts[g, LOG_Z])
    sigma = deviation * 0.5 * tile.key_scale[r]
    used = deviation * tile.half[g, r]
    total, coarser = 0.0, np.inf
    for n in range(1, cache.stored + 1):
        if n > 1:
            coarser, sigma = sigma, sigma / (1 << cache.widths[n - 1])
        may = sigma == used
        reached = stopped = True
        if n > 1:
            highest = exp(score + spread + 2.0 * z * sigma - facts[g, LOG_Z])
            reached = highest * coarser * reach > facts[g, THETA]
        if n < cache.stored:
            stopped = lowest * sigma * reach <= facts[g, THETA]
        if may or (reached and stopped):
            total += curvature(z * sigma) * sigma**2
    return total


@compiled
def curvature(x):
    """`reference_bounds.curvature`."""
    if x > 0.3:
        return (expm1(x) - x) / x**2
    tail = 1 / 720 + x * (1 / 5040 + x / 40320)
    return 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * tail)))


@compiled
def add_values(cache, tile, b, h, n, sums, classes, out):
    """Value rows times their weights; their dither is subtracted at the end, by class."""
    group = len(sums)
    head_dim = cache.value_mean.shape[2]
    count = 0
    for r in range(n):
        slot, planes, step = tile.slot[r], tile.values[r], tile.value_scale[r]
        for g in range(group):
            sums[g, REACH] += tile.weight[g, r] / tile.chance[r] * step * tile.live[r]
        if slot >= 0:
            for i in range(head_dim):
                value = np.float64(cache.exact_values[b, h, slot, i])
                value -= np.float64(cache.value_mean[b, h, i])
                for g in range(group):
                    out[g, i] += tile.weight[g, r] * value
        elif planes > 0:
            unit, finer = step, 1.0 / 4096.0
            if planes == 1:
                first_digits(cache.value_planes[0], tile.address[r], tile.digits, count)
            else:
                unit, finer = step / 4096.0, 1.0
                address = tile.address[r]
                prefix_digits(cache.value_planes, cache.widths, address, planes, tile.digits, count)
            for g in range(group):
                wanted = tile.weight[g, r] / tile.chance[r] * unit * _GUARD
                tile.coefficient[g, count] = wanted
                rounded = np.float64(tile.coefficient[g, count])
                classes[g, DITHER, tile.own[r]] += rounded * (finer / _GUARD)
            count += 1
    for r in range(count, min((count + 3) // 4 * 4, TILE)):
        for g in range(group):
            tile.coefficient[g, r] = 0
    scale(tile.partial, 0)
    add_rows(tile.coefficient, tile.digits, count, tile.partial)
    for g in range(group):
        for i in range(out.shape[1]):
            out[g, i] += np.float64(tile.partial[g, i]) / _GUARD


@compiled
def subtract_dither(dither, classes, out):
    """sum_s U_s B_s of (2.3)."""
    for s in range(dither.shape[1]):
        for g in range(len(out)):
            weight = classes[g, DITHER, s] * 2.0**-DITHER_FRACTION_BITS
            if weight != 0:
                for i in range(out.shape[1]):
                    out[g, i] -= weight * np.float64(dither[1, s, i])
