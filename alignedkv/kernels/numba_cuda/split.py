"""One split of one KV head: score, plan, refine, weigh and add up, a tile of tokens at a time.

A block takes the tokens of a split in tiles of as many as it has threads.  In the first half of a
tile a thread is a token: it scores its row plane by plane for all G heads and adds to its own sums.
In the second half a thread is a channel (or two): it runs over the tile's value rows.  Scores and
products with values are float32 within a word of digits and within a tile, float64 beyond
(`arithmetic.numba_cuda`); weights and sums of the bound are float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels.arithmetic import Arithmetic
from alignedkv.kernels.numba_cuda.block import larger, reduce_function
from alignedkv.kernels.numba_cuda.columns import CLASS_SUMS
from alignedkv.kernels.numba_cuda.plan import (
    chance_of,
    gains_of,
    half_step,
    plan_functions,
    score_functions,
)
from alignedkv.kernels.numba_cuda.rows import (
    address_function,
    bfloat16,
    class_function,
    draw,
    loader,
    prefix_function,
    stream_key,
    token_range,
)
from alignedkv.kernels.numba_cuda.settled import class_functions, settled_function
from alignedkv.kernels.numba_cuda.sums import (
    add_function,
    combine_functions,
    correction_function,
    count_sums,
)
from alignedkv.kernels.sampling import DRAW_BITS
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind

#: In place of a count of value planes: the row is kept exact.
_EXACT = -1
#: Keeps a tile of weights times 8 g below float32's largest number; a power of two.
_GUARD = 2.0**-8
_DRAWS = 2.0**DRAW_BITS


def split_kernel(spec: DecodeSpec, threads: int, arithmetic: Arithmetic) -> Any:
    """``split[places, S](cache, asked, step, work, answer, attempt)``."""
    group, subgroups = spec.subgroup, spec.subgroups
    head_dim, channels = spec.head_dim, spec.channels
    stored, sampled, exact_rows = spec.stored_planes, spec.sample_values, spec.exact_rows
    half_range, gains, columns = spec.layout.half_range, gains_of(spec), count_sums(spec)
    scratch_rows, own_channels = max(group, columns), -(-channels // threads)
    row_of, class_of = address_function(spec.page_tokens), class_function(spec.dither_rows)
    settled, classes = spec.bound is BoundKind.STATISTICAL, spec.dither_rows
    score_first, refine, score_exact = score_functions(spec)
    read_keys, value_share, plan_values = plan_functions(spec, refine)
    if settled:
        read_keys = settled_function(spec, refine)
    correction_of, add_token = correction_function(spec), add_function(spec, arithmetic.weight)
    class_terms, gather = class_functions(spec, arithmetic.weight)
    rescaled, combined = combine_functions(spec)
    largest_scores = reduce_function(group, threads, larger)
    whole_sums = reduce_function(columns, threads, combined)
    prefix_of, value_of = prefix_function(spec), loader(spec.row_dtype)

    def split(cache, asked, step, work, answer, attempt):
        place, part, lane = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        home = place // subgroups
        wanted = 0
        for g in range(group):
            wanted |= work.wanted[attempt, place, g]
        if wanted == 0:
            return

        queries = cuda.shared.array((group, channels), np.float32)
        scratch = cuda.shared.array((scratch_rows, threads), np.float64)
        coefficients = cuda.shared.array((group, threads), np.float32)
        rows = cuda.shared.array(threads, np.int64)  # addresses, or slots of exact rows
        planes = cuda.shared.array(threads, np.int32)  # of the value rows, or _EXACT
        owns = cuda.shared.array(threads, np.int32)  # dither classes
        dots = cuda.local.array(group, np.float64)
        score = cuda.local.array(group, np.float64)
        halves = cuda.local.array(group, np.float64)  # of the keys, as each head uses them
        finest = cuda.local.array(group, np.float64)  # scores from all planes that were read
        factors = cuda.local.array(group, np.float64)
        top = cuda.local.array(group, np.float64)
        sums = cuda.local.array((group, columns), np.float64)
        output = cuda.local.array((group, own_channels), np.float64)
        partial = cuda.local.array(group, np.float32)
        reads = cuda.local.array((2, stored), np.int64)

        for e in range(lane, group * channels, threads):
            queries[e // channels, e % channels] = work.queries[place, e // channels, e % channels]
        for g in range(group):
            top[g] = -np.inf
            for k in range(columns):
                sums[g, k] = 0.0
            for u in range(own_channels):
                output[g, u] = 0.0
            if settled:
                for own in range(lane, classes, threads):
                    for k in range(CLASS_SUMS):
                        work.classes[place, part, g, k, own] = 0.0
        for n in range(stored):
            reads[0, n] = reads[1, n] = 0
        facts, products = work.facts[place], work.products[place]
        start, length = token_range(cache, home, step.window)
        piece = (length - start + cuda.gridDim.y - 1) // cuda.gridDim.y
        begin = min(start + part * piece, length)
        end = min(begin + piece, length)
        key = stream_key(step.seed, asked.step[0], home)
        cuda.syncthreads()

        for first in range(begin, end, threads):
            # A thread is a token.
            t = first + lane
            inside = t < end
            key_scale = value_scale = finest_half = value_half = skipped = live = 0.0
            chance = 1.0
            planes[lane] = 0
            for g in range(group):
                halves[g] = 0.0
            if inside:
                address = row_of(cache, home, t)
                own = class_of(t)
                scales = np.int64(cache.scales[address])
                key_scale = np.float64(bfloat16(scales & 0xFFFF))
                value_scale = np.float64(bfloat16(scales >> 16))
                size = half_range * value_scale
                rows[lane], owns[lane] = address, own
                live = 1.0
                if exact_rows:
                    since_start = t - np.int64(cache.starts[home // cache.kv_heads])
                    if since_start < cache.exact_first:
                        live, rows[lane] = 0.0, since_start
                    elif t >= length - cache.exact_last:
                        live, rows[lane] = 0.0, cache.exact_first + t % cache.exact_last
                if live == 0.0:
                    slot = rows[lane]
                    query = asked.query[place]
                    score_exact(cache, home, slot, query, step.scaling, step.softcap, score)
                    planes[lane] = _EXACT
                else:
                    score_first(
                        cache, address, key_scale, own, queries, products, facts, step.softcap,
                        dots, score,
                    )  # fmt: skip
                    finest_half = 0.5 * key_scale
                    share = value_share(score, facts, finest_half, size, step.margin, step.share)
                    key_planes = read_keys(
                        cache, address, key_scale, size, own, queries, products, facts, step, dots,
                        score, halves, finest,
                    )  # fmt: skip
                    finest_half = half_step(key_scale, gains, key_planes)
                    value_planes = plan_values(score, facts, halves, value_scale, step.margin)
                    if sampled:
                        if share < 1.0:
                            chance = chance_of(share)
                        if chance < 1.0:
                            drawn = draw(key, t) < np.int64(chance * _DRAWS)
                            value_planes = 1 if drawn else 0
                            value_half = 0.5 * value_scale
                        else:
                            value_half = half_step(value_scale, gains, value_planes)
                    elif share > 1.0:
                        value_half = half_step(value_scale, gains, value_planes)
                    else:
                        value_planes = 0
                        skipped = size
                    planes[lane] = value_planes
                    for n in range(key_planes):
                        reads[0, n] += 1
                    for n in range(value_planes):
                        reads[1, n] += 1

            for g in range(group):
                if live == 0.0:
                    finest[g] = score[g]
                score[g] -= correction_of(facts, g, halves[g])[0]
                scratch[g, lane] = score[g] if inside else -np.inf
            largest_scores(scratch)
            for g in range(group):
                highest, factors[g] = scratch[g, 0], 1.0
                if highest > top[g]:
                    factors[g] = math.exp(top[g] - highest)
                    for k in range(columns):
                        sums[g, k] = rescaled(k, sums[g, k], factors[g])
                    for u in range(own_channels):
                        output[g, u] *= factors[g]
                    top[g] = highest
                coefficients[g, lane] = 0.0
                if inside:
                    weight = math.exp(score[g] - top[g])
                    add_token(
                        sums, facts, g, weight, key_scale, halves[g], value_scale, value_half,
                        skipped, live, chance,
                    )  # fmt: skip
                    unit = value_scale if live > 0.0 else 1.0
                    coefficients[g, lane] = np.float32(weight / chance * unit * _GUARD)
            if settled:
                for g in range(group):
                    cuda.syncthreads()
                    if inside:
                        class_terms(
                            sums, facts, g, score[g], top[g], key_scale, halves[g], finest[g],
                            finest_half, value_scale, value_half, live, step.deviations, scratch,
                        )  # fmt: skip
                    cuda.syncthreads()
                    last = min(first + threads, end)
                    gather(work.classes[place, part, g], scratch, factors[g], first, last)
            cuda.syncthreads()

            # A thread is a channel, or several.
            for u in range(own_channels):
                channel = lane + u * threads
                for g in range(group):
                    partial[g] = 0.0
                if channel < channels:
                    for r in range(min(threads, end - first)):
                        x = np.float32(0.0)
                        if planes[r] > 0:
                            x = prefix_of(
                                cache.value_planes, rows[r], planes[r], cache.dither, owns[r],
                                channel,
                            )  # fmt: skip
                        if exact_rows:  # noqa: SIM102 - Numba prunes what is constant alone
                            if planes[r] == _EXACT and channel < head_dim:
                                value = value_of(cache.exact_values[home, rows[r], channel])
                                mean = np.float64(cache.value_mean[home, channel])
                                x = np.float32(value - mean)
                        if planes[r] != 0:
                            for g in range(group):
                                partial[g] += coefficients[g, r] * x
                for g in range(group):
                    output[g, u] += np.float64(partial[g]) / _GUARD
            cuda.syncthreads()

        for g in range(group):
            if lane == 0:
                work.tops[place, part, g] = top[g]
            for u in range(own_channels):
                channel = lane + u * threads
                if channel < channels:
                    work.outputs[place, part, g, channel] = output[g, u]
            for k in range(columns):
                scratch[k, lane] = sums[g, k]
            whole_sums(scratch)
            if lane == 0:
                for k in range(columns):
                    work.sums[place, part, g, k] = scratch[k, 0]
            cuda.syncthreads()
        for n in range(stored):
            cuda.atomic.add(answer.reads, (home, 0, n), np.uint32(reads[0, n]))
            cuda.atomic.add(answer.reads, (home, 1, n), np.uint32(reads[1, n]))

    return split
