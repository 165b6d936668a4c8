"""A whole decode step on the CPU: prepare, split, finish, repair, without returning to Python."""

from __future__ import annotations

import numba
import numpy as np

from alignedkv.kernels.cpu.compiled import compiled, parallel
from alignedkv.kernels.cpu.finish import bound_head, merge_split
from alignedkv.kernels.cpu.hints import expect_log_z, feed_back, next_rest, read_hints
from alignedkv.kernels.cpu.maths import exp, scale
from alignedkv.kernels.cpu.plan import mix
from alignedkv.kernels.cpu.rows import butterfly
from alignedkv.kernels.cpu.split import decode_split
from alignedkv.kernels.cpu.sums import scale_sums
from alignedkv.kernels.cpu.tile import (
    BASE,
    CLASS_SUMS,
    FACTS,
    LOG_Z,
    MARGIN,
    NORM1,
    NORM2,
    REFINED_ERROR,
    REST,
    SCORE_ERROR,
    SHIFT,
    SPREAD,
    STATISTICAL,
    SUMS,
    THETA,
    WEIGHT,
    Head,
    whole_cache,
)
from alignedkv.kernels.reference_plan import ENCODER_BUTTERFLY, ENCODER_DIGITS
from alignedkv.kernels.sampling import SPREAD as HASH_SPREAD
from alignedkv.planes import DITHER_FRACTION_BITS

_DITHER_STEP = 2.0**-DITHER_FRACTION_BITS / 4096.0


@parallel
def decode_step(
    key_planes,  # 4 x uint8 [rows, bytes]
    value_planes,  # 4 x uint8 [rows, bytes]
    widths,  # 4 x int, 0 where a plane is not stored
    stored,  # tile.Stored
    step,  # tile.Step
    query,  # float32 [B, H, D]
    key_mean,  # float32 [B, Hkv, D]
    balance,  # float32 [B, Hkv, D]
    signs,  # float32 [C]
    block,  # channels of a Hadamard block
    score_error,  # Arithmetic.score_norm1
    refined_error,  # Arithmetic.refined_norm1
    lengths,  # int32 [B]
    starts,  # int32 [B]
    told,  # float32 [HEAD_HINTS, B, H]: hints
    counter,  # of the sampling hash
    sinks,  # float32 [H], empty for none
    splits,  # parts of a sequence
    output,  # float64 [B, H, D], written
    answer,  # float32 [3, B, H], written: bound, size, missed
    hints,  # float32 [HEAD_HINTS, B, H], written
    reads,  # uint32 [B, subgroups, 2, N], added to
):
    """Decode one token of every sequence; repeat, finer, what holds a head whose bound missed.

    A place is a subgroup of the query heads of one KV head of one sequence.
    """
    batch, heads, head_dim = query.shape
    parts, channels = reads.shape[1], len(signs)
    group, shared = heads // parts, parts // stored.heads
    classes = stored.dither.shape[1]
    places = batch * parts
    queries = np.zeros((places, group, channels), np.float32)
    exact_queries = np.zeros((places, group, head_dim))
    products = np.zeros((places, group, classes))
    facts = np.zeros((places, group, FACTS))
    for place in numba.prange(places):
        b, h, at = place // parts, place % parts // shared, place % parts * group
        _prepare(
            step, query, key_mean, balance, signs, block, score_error, refined_error, told,
            stored.dither, b, h, at, queries[place], exact_queries[place], products[place],
            facts[place],
        )  # fmt: skip
        start, length = _range(step, lengths, starts, b)
        whole = whole_cache(key_planes, value_planes, widths, stored)
        head = Head(queries[place], exact_queries[place], products[place], facts[place], 0)
        expect_log_z(whole, step, head, b, h, start, length)

    active = np.ones(places, np.bool_)
    tops = np.empty((places, splits, group))
    sums = np.empty((places, splits, group, SUMS))
    kinds = np.empty((places, splits, group, CLASS_SUMS, classes))
    outs = np.empty((places, splits, group, channels))
    counts = np.empty((places, splits, 2, stored.stored), np.int64)
    for attempt in range(step.repairs + 1):
        for task in numba.prange(places * splits):
            place, i = task // splits, task % splits
            if active[place]:
                b, h = place // parts, place % parts // shared
                start, length = _range(step, lengths, starts, b)
                piece = (length - start + splits - 1) // splits
                begin = min(start + i * piece, length)
                key = _stream_key(step.seed, counter, place // shared)
                head = Head(
                    queries[place], exact_queries[place], products[place], facts[place], key
                )
                scale(sums[place, i], 0)
                scale(kinds[place, i], 0)
                scale(outs[place, i], 0)
                scale(counts[place, i], 0)
                whole = whole_cache(key_planes, value_planes, widths, stored)
                decode_split(
                    whole, step, head, b, h, starts[b], length, begin, min(begin + piece, length),
                    tops[place, i], sums[place, i], kinds[place, i], outs[place, i],
                    counts[place, i],
                )  # fmt: skip
        for place in numba.prange(places):
            if active[place]:
                b, part = place // parts, place % parts
                for i in range(splits):
                    for side in range(2):
                        for n in range(stored.stored):
                            reads[b, part, side, n] += np.uint32(counts[place, i, side, n])
                missed = _finish(
                    stored.value_mean, step, facts[place], tops[place], sums[place],
                    kinds[place], outs[place], b, part // shared, part * group, sinks, attempt,
                    output, answer, hints,
                )  # fmt: skip
                start, length = _range(step, lengths, starts, b)
                active[place] = missed and length > start
        if not _any(active):
            break


@compiled
def _any(flags):
    for flag in flags:  # noqa: SIM110 - a loop compiles at once
        if flag:
            return True
    return False


@compiled
def _range(step, lengths, starts, b):
    """First attended token, and the one after the last."""
    start, length = np.int64(starts[b]), np.int64(lengths[b])
    if step.window > 0:
        start = max(start, length - step.window)
    return min(start, length), length


@compiled
def _stream_key(seed, counter, place):
    """`sampling.stream_key`."""
    word = mix(np.uint64((seed + HASH_SPREAD) & 0xFFFFFFFF)) ^ np.uint64(counter & 0xFFFFFFFF)
    return np.int64(mix(mix(word) ^ np.uint64(place & 0xFFFFFFFF)))


@compiled
def _prepare(
    step, query, key_mean, balance, signs, block, score_error, refined_error, told, dither, b, h,
    first, queries, exact_queries, products, facts,
):  # fmt: skip
    """q', its norms, C_s and the hints of G query heads of a KV head, from ``first`` on."""
    group, channels = queries.shape
    head_dim = query.shape[2]
    stages = np.log2(np.float64(block)) + 1.0
    for g in range(group):
        at = first + g
        turned = np.zeros(channels)
        base = 0.0
        for i in range(head_dim):
            q = np.float64(query[b, at, i])
            exact_queries[g, i] = q
            base += q * np.float64(key_mean[b, h, i])
            turned[i] = q * np.float64(balance[b, h, i]) * np.float64(signs[i])
        butterfly(turned, block)
        norm1 = norm2 = 0.0
        for i in range(channels):
            norm1 += abs(turned[i])
            norm2 += turned[i] ** 2
            queries[g, i] = turned[i]
        norm1, norm2 = step.scaling * norm1, step.scaling * np.sqrt(norm2)
        for s in range(dither.shape[1]):
            product = 0.0
            for i in range(channels):
                product += np.float64(queries[g, i]) * np.float64(dither[0, s, i])
            products[g, s] = product * _DITHER_STEP
        butterfly_error = ENCODER_BUTTERFLY * stages * np.sqrt(np.float64(channels)) * norm2
        digits_error = (2.0 ** -(DITHER_FRACTION_BITS + 1) + ENCODER_DIGITS) * norm1
        facts[g, BASE] = step.scaling * base
        facts[g, NORM1], facts[g, NORM2] = norm1, norm2
        facts[g, SHIFT] = (butterfly_error + digits_error) / 4096.0
        facts[g, SCORE_ERROR] = score_error * norm1
        facts[g, REFINED_ERROR] = refined_error * norm1
        read_hints(told, b, at, facts[g])


@compiled
def _finish(
    value_mean, step, facts, tops, sums, kinds, outs, b, h, first, sinks, attempt, output, answer,
    hints,
):  # fmt: skip
    """Merge the splits of G heads from ``first`` on, bound them, set the hints of a repair.

    Returns
    -------
    bool
        Whether a head missed and its hints now ask for more.
    """
    group = tops.shape[1]
    head_dim = output.shape[2]
    mean = value_mean[b, h]
    mean_size = 0.0
    for i in range(head_dim):
        mean_size = max(mean_size, abs(np.float64(mean[i])))
    again = False
    for g in range(group):
        at = first + g
        top = -np.inf
        for i in range(len(tops)):
            top = max(top, tops[i, g])
        logit = np.float64(sinks[at]) if len(sinks) else -np.inf
        if top == -np.inf:
            for i in range(head_dim):
                output[b, at, i] = 0
            for k in range(len(answer)):
                answer[k, b, at] = 0
            for k in range(len(hints)):
                hints[k, b, at] = facts[g, k]
            hints[LOG_Z, b, at], hints[SPREAD, b, at] = logit, 0.0
            continue
        total = np.zeros(SUMS)
        kind = np.zeros((CLASS_SUMS, kinds.shape[3]))
        out = np.zeros(outs.shape[2])
        for i in range(len(tops)):
            factor = exp(tops[i, g] - top) if tops[i, g] > -np.inf else 0.0
            merge_split(sums[i, g], kinds[i, g], outs[i, g], factor, total, kind, out)
        sink = np.exp(logit - top)
        weight = total[WEIGHT] + sink
        sink /= weight
        scale_sums(total, 1.0 / weight)
        scale(kind, 1.0 / weight)
        spread = size = 0.0
        lost = False
        for i in range(head_dim):
            value = out[i] / weight + (1.0 - sink) * np.float64(mean[i])
            output[b, at, i] = value
            spread = max(spread, abs(value - np.float64(mean[i])))
            size = max(size, abs(value))
            lost |= np.isnan(value)
        if lost:
            spread = size = np.nan
        bound = bound_head(step, facts[g], total, kind, sink, spread, mean_size)
        if np.isnan(bound) and not lost:
            bound = np.inf
        tau = step.tolerance * size
        missed = not bound <= step.tolerance * (size - bound)
        log_z = top + np.log(weight)
        answer[0, b, at] = np.nextafter(np.float32(bound), np.float32(np.inf))
        answer[1, b, at], answer[2, b, at] = size, missed
        hints[LOG_Z, b, at], hints[SPREAD, b, at] = log_z, spread
        if attempt == 0:
            theta, margin = feed_back(facts[g], bound, tau, missed)
            hints[THETA, b, at], hints[MARGIN, b, at] = theta, margin
            hints[REST, b, at] = next_rest(step, facts[g], log_z)
        if attempt == step.repairs:
            continue
        if step.kind != STATISTICAL:
            facts[g, LOG_Z], facts[g, SPREAD] = log_z, spread
        if missed:
            again = True
            finer = min(0.5, tau / bound / 2.0)
            last = attempt + 1 == step.repairs
            facts[g, THETA] = 0.0 if last or np.isnan(finer) else facts[g, THETA] * finer
    return again
