"""Scores of a tile and the planes they ask for: `reference_plan` on the CPU.

Plans are made in logarithms to base 2, whose errors are below 2^-12: ties may fall either way.
"""

from __future__ import annotations

import numpy as np

from alignedkv.kernels.cpu.compiled import compiled, fast
from alignedkv.kernels.cpu.maths import (
    LOG2_E,
    dot,
    dot_double,
    exp,
    first_digits,
    log2,
    prefix_digits,
)
from alignedkv.kernels.cpu.tile import (
    BASE,
    DETERMINISTIC,
    LOG_Z,
    NORM1,
    NORM2,
    SPREAD,
    STATISTICAL,
    THETA,
    half_step,
)
from alignedkv.kernels.sampling import DRAW_BITS, MIX_1, MIX_2, SAMPLING_FACTOR
from alignedkv.kernels.sampling import SPREAD as HASH_SPREAD

_ROOT_3 = np.sqrt(3.0)


@compiled
def cap(score, softcap):
    """A score under the softcap, if there is one."""
    return softcap * np.tanh(score / softcap) if softcap > 0 else score


@compiled
def first_score(step, head, g, digits, key_scale, own):
    """Score of the row whose first digits are ``digits[0]``, of dither class ``own``."""
    product = dot(head.queries, g, digits, 0) - head.products[g, own]
    return cap(step.scaling * key_scale * product + head.facts[g, BASE], step.softcap)


@compiled
def score_tile(cache, step, head, tile, b, h, n):
    """Scores from the first plane, or exact ones."""
    group = len(head.facts)
    for r in range(n):
        step_size = tile.key_scale[r]
        if tile.slot[r] < 0:
            first_digits(cache.key_planes[0], tile.address[r], tile.digits, 0)
            for g in range(group):
                score = first_score(step, head, g, tile.digits, step_size, tile.own[r])
                tile.score[g, r] = score
        else:
            for g in range(group):
                product = 0.0
                for i in range(head.exact_queries.shape[1]):
                    key = np.float64(cache.exact_keys[b, h, tile.slot[r], i])
                    product += head.exact_queries[g, i] * key
                tile.score[g, r] = cap(step.scaling * product, step.softcap)
        tile.finest_half[r] = 0.5 * step_size * tile.live[r]
        for g in range(group):
            tile.half[g, r] = tile.finest_half[r]
            tile.finest[g, r] = tile.score[g, r]


@compiled
def _refine(cache, step, head, tile, r, count, into):
    """Scores of one token from ``count`` planes."""
    prefix_digits(cache.key_planes, cache.widths, tile.address[r], count, tile.digits, 0)
    unit = tile.key_scale[r] / 4096.0
    for g in range(len(head.facts)):
        dither = 4096.0 * head.products[g, tile.own[r]]
        product = dot_double(head.queries, g, tile.digits, 0) - dither
        raw = step.scaling * unit * product + head.facts[g, BASE]
        into[g, r] = cap(raw, step.softcap)


@fast
def _weight(score, deviation, log_z):
    """log2 of the largest weight that a score makes plausible."""
    return min((score + deviation - log_z) * LOG2_E, 0.0)


@compiled
def plan_keys(cache, step, head, tile, n):
    """Rule (6.2) for keys, from the first plane's scores; then the scores it asks for."""
    group = len(head.facts)
    for r in range(n):
        tile.excess[r] = tile.above[r] = -np.inf
    for g in range(group):
        _add_excess(step, head.facts, g, tile, n)
    for r in range(n):
        if tile.slot[r] >= 0:
            tile.keys[r] = 0
            continue
        tile.keys[r] = planes_for(tile.excess[r], cache.widths, cache.stored)
        if tile.keys[r] > 1:
            _refine(cache, step, head, tile, r, tile.keys[r], tile.score)
            half = half_step(tile.key_scale[r], cache.widths, tile.keys[r])
            for g in range(group):
                tile.half[g, r] = half


@fast
def _add_excess(step, facts, g, tile, n):
    """Raise a tile's needs to those of head g: log2 of the key addend over theta, of V's too."""
    log_z, rho = facts[g, LOG_Z], facts[g, SPREAD]
    log_theta = np.log2(facts[g, THETA])
    threshold = _threshold(step, log_theta)
    deviation = facts[g, NORM2] / _ROOT_3
    error = facts[g, NORM1] if step.kind == DETERMINISTIC else deviation
    margin = step.deviations if step.kind == STATISTICAL else step.margin
    for r in range(n):
        half = 0.5 * tile.key_scale[r] * tile.live[r]
        weight = _weight(tile.score[g, r], margin * deviation * half, log_z)
        excess = weight + log2(error * half * (tile.size[r] + rho)) - log_theta
        tile.excess[r] = max(tile.excess[r], excess)
        tile.above[r] = max(tile.above[r], weight + log2(tile.size[r]) - threshold)


@compiled
def _threshold(step, log_theta):
    """log2 of the size below which a value row is skipped or sampled."""
    if step.skip_share == 0:
        return -np.inf
    factor = SAMPLING_FACTOR if step.sampled else 1.0
    return np.log2(step.skip_share * factor) + log_theta


@compiled
def plan_settled(cache, step, head, tile, n):
    """The settled rule (5.4): planes read for the group, planes used by each head."""
    group = len(head.facts)
    z = step.deviations
    for r in range(n):
        tile.excess[r] = tile.above[r] = -np.inf
    for g in range(group):
        _add_excess(step, head.facts, g, tile, n)
    for r in range(n):
        if tile.slot[r] >= 0:
            tile.keys[r] = 0
            continue
        read = 1
        half = 0.5 * tile.key_scale[r]
        finer = half
        for k in range(2, cache.stored + 1):
            coarser, finer = finer, finer / (1 << cache.widths[k - 1])
            for g in range(group):
                deviation = head.facts[g, NORM2] / _ROOT_3
                hopeful = tile.score[g, r] + z * deviation * (half + 2.0 * finer)
                if _exceeds(head.facts, g, hopeful, deviation * coarser, tile.size[r]):
                    read = k
        for g in range(group):
            tile.stages[0, g, r] = tile.score[g, r]
        finer = half
        for k in range(2, read + 1):
            coarser, finer = finer, finer / (1 << cache.widths[k - 1])
            _refine(cache, step, head, tile, r, k, tile.stages[k - 1])
            for g in range(group):
                deviation = head.facts[g, NORM2] / _ROOT_3
                settled = tile.stages[k - 1, g, r] + z * deviation * finer
                if _exceeds(head.facts, g, settled, deviation * coarser, tile.size[r]):
                    tile.score[g, r] = tile.stages[k - 1, g, r]
                    tile.half[g, r] = finer
        for g in range(group):
            tile.finest[g, r] = tile.stages[read - 1, g, r]
        tile.finest_half[r] = finer
        tile.keys[r] = read


@compiled
def _exceeds(facts, g, score, deviation, size):
    """exp(score - L) sigma R > theta, in logarithms."""
    addend = (score - facts[g, LOG_Z]) * LOG2_E + np.log2(deviation * (size + facts[g, SPREAD]))
    return facts[g, THETA] == 0 or addend > np.log2(facts[g, THETA])


@compiled
def plan_values(cache, step, head, tile, n):
    """Value planes, and the chance of rows that are left to it."""
    for r in range(n):
        tile.excess[r] = -np.inf
    for g in range(len(head.facts)):
        _add_value_excess(step, head.facts, g, tile, n)
    for r in range(n):
        tile.chance[r] = 1.0
        tile.value_error[r] = tile.skipped[r] = 0.0
        if tile.slot[r] >= 0:
            tile.values[r] = 0
            continue
        if step.sampled and tile.above[r] < 0:
            allowed = max(np.ceil(exp(tile.above[r] / LOG2_E) * 2.0**DRAW_BITS), 1.0)
            tile.chance[r] = allowed * 2.0**-DRAW_BITS
        if tile.chance[r] < 1:
            tile.values[r] = 1 if draw(head.key, tile.token[r]) < np.int64(allowed) else 0
            tile.value_error[r] = 0.5 * tile.value_scale[r]
        elif step.sampled or tile.above[r] > 0:
            planes = planes_for(tile.excess[r], cache.widths, cache.stored)
            tile.values[r] = planes
            tile.value_error[r] = half_step(tile.value_scale[r], cache.widths, planes)
        else:
            tile.values[r] = 0
            tile.skipped[r] = tile.size[r]


@fast
def _add_value_excess(step, facts, g, tile, n):
    log_z, log_theta = facts[g, LOG_Z], np.log2(facts[g, THETA])
    deviation = facts[g, NORM2] / _ROOT_3
    share = 0.5 if step.kind == DETERMINISTIC else 0.5 / _ROOT_3
    margin = step.deviations if step.kind == STATISTICAL else step.margin
    for r in range(n):
        weight = _weight(tile.score[g, r], margin * deviation * tile.half[g, r], log_z)
        excess = weight + log2(share * tile.value_scale[r]) - log_theta
        tile.excess[r] = max(tile.excess[r], excess)


@compiled
def planes_for(excess, widths, stored):
    """`policy.planes_for` of one token."""
    planes, gain = 1, 0
    for n in range(1, stored):
        if excess > gain:
            planes = n + 1
        gain += widths[n]
    return planes


@compiled
def draw(key, t):
    """`sampling.draws` of one token."""
    word = (np.uint64(t) * np.uint64(HASH_SPREAD)) & np.uint64(0xFFFFFFFF)
    return np.int64(mix(word ^ np.uint64(key)) >> np.uint64(32 - DRAW_BITS))


@compiled
def mix(word):
    """`sampling.mix` of one word."""
    word = word ^ (word >> np.uint64(16))
    word = (word * np.uint64(MIX_1)) & np.uint64(0xFFFFFFFF)
    word = word ^ (word >> np.uint64(13))
    word = (word * np.uint64(MIX_2)) & np.uint64(0xFFFFFFFF)
    return word ^ (word >> np.uint64(16))
