"""One split of one KV head on the CPU: score, plan, refine, weigh and add up, tile by tile.

What is computed is `reference_plan` and `reference_sums`; how, is this: the first key plane of a
tile is multiplied in float32; the plan is made in logarithms; tokens that need more planes get a
float64 score; an estimate's scores are corrected once all is planned; weights are relative to the
largest score so far; wanted value rows are unpacked side by side and added in float32 within the
tile, in float64 beyond (`arithmetic.cpu`).
"""

from __future__ import annotations

import numpy as np

from alignedkv.kernels.cpu.compiled import compiled
from alignedkv.kernels.cpu.plan import plan_keys, plan_settled, plan_values, score_tile
from alignedkv.kernels.cpu.rows import class_of, row_of
from alignedkv.kernels.cpu.sums import (
    add_classes,
    add_errors,
    add_values,
    correct_means,
    subtract_dither,
    weigh,
)
from alignedkv.kernels.cpu.tile import STATISTICAL, TILE, key_scale_of, new_tile


@compiled
def decode_split(
    cache, step, head, b, h, start, length, begin, end, top, sums, classes, out, reads
):
    """Add up tokens ``begin`` to ``end`` of a sequence of tokens ``start`` to ``length``.

    Parameters
    ----------
    top : float64 array [G]
        Written: the largest score.
    sums : float64 array [G, SUMS]
    classes : float64 array [G, CLASS_SUMS, P]
    out : float64 array [G, C]
        Zero on entry: sums over the split, with weights relative to ``top``.
    reads : int64 array [2, N]
        Zero on entry: rows of which plane n was read.
    """
    tile = new_tile(len(top), out.shape[1])
    for g in range(len(top)):
        top[g] = -np.inf
    for first in range(begin, end, TILE):
        n = min(TILE, end - first)
        _gather(cache, tile, b, h, start, length, first, n)
        score_tile(cache, step, head, tile, b, h, n)
        if step.kind == STATISTICAL:
            plan_settled(cache, step, head, tile, n)
        else:
            plan_keys(cache, step, head, tile, n)
        plan_values(cache, step, head, tile, n)
        correct_means(step, head, tile, n)
        weigh(tile, n, top, sums, classes, out)
        add_errors(cache, step, head, tile, n, sums)
        if step.kind == STATISTICAL:
            add_classes(cache, step, head, tile, n, top, sums, classes)
        add_values(cache, tile, b, h, n, sums, classes, out)
        for r in range(n):
            for k in range(tile.keys[r]):
                reads[0, k] += 1
            for k in range(tile.values[r]):
                reads[1, k] += 1
    subtract_dither(cache.dither, classes, out)


@compiled
def _gather(cache, tile, b, h, start, length, first, n):
    """Where the tile's rows lie, their scales and classes."""
    for r in range(n):
        t = first + r
        address = row_of(cache.block_table, cache.page, cache.heads, cache.capacity, b, h, t)
        scales = np.int64(cache.scales[address])
        slot = -1
        if t < start + cache.exact_first and t >= start:
            slot = t - start
        elif t >= length - cache.exact_last:
            slot = cache.exact_first + t % cache.exact_last
        tile.token[r], tile.address[r], tile.slot[r] = t, address, slot
        tile.own[r] = class_of(t, cache.dither.shape[1])
        tile.key_scale[r] = key_scale_of(scales)
        tile.value_scale[r] = np.uint32(scales & 0xFFFF0000).view(np.float32)
        tile.size[r] = 7.5 * tile.value_scale[r]
        tile.live[r] = 1.0 if slot < 0 else 0.0
