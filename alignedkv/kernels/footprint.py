"""Sizes of what the decode kernels keep: the structs of ``cuda/query.cuh`` and ``cuda/block.cuh``.

The compiler refuses a source in which these sizes are wrong (``static_assert`` there).
"""

from __future__ import annotations

import math
from typing import Final

from alignedkv.kernels.config import MAX_SPLITS, TILE, DecodeConfig
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import row_bytes
from alignedkv.policy import BoundKind

#: Rows of a warp's tile that a rare plane is fetched for at a time.
RARE_ROWS: Final = 16
#: ``kTileAlignment`` of products.cuh.
_TILE_ALIGNMENT = 128
#: ``kNumbers`` of query.cuh and ``kConstants`` of block.cuh.
_NUMBERS, _CONSTANTS = 9, 10
#: Sums of a head besides those of its bound: weights, digit middles.
_OTHER_SUMS = 2
#: ``kCount`` of bounds.cuh's and settled_sums.cuh's sums, by bound and by whether rows are sampled.
_BOUND_SUMS = {
    BoundKind.ESTIMATE: (2, 2),
    BoundKind.DETERMINISTIC: (4, 4),
    BoundKind.STATISTICAL: (8, 5),
}
#: ``kClassSums`` and ``kExtremes`` of block.cuh under a statistical bound; otherwise one each.
_SETTLED_CLASS_SUMS, _SETTLED_EXTREMES = 6, 3


def padded_heads(spec: DecodeSpec) -> int:
    """Query heads of a group as tensor-core columns have them: in blocks of four."""
    return -(-spec.subgroup // 4) * 4


def query_bytes(spec: DecodeSpec) -> int:
    """``sizeof(Query)``: digits, class products and numbers of a group's queries."""
    heads = padded_heads(spec)
    return 2 * heads * spec.channels + 4 * heads * (spec.dither_rows + _NUMBERS) + 16


def partial_floats(spec: DecodeSpec) -> int:
    """Floats of ``Partial``: what a block leaves for the one that merges."""
    class_sums = _SETTLED_CLASS_SUMS if _is_settled(spec) else 1
    per_head = class_sums * spec.dither_rows + _sums(spec) + 1 + _extremes(spec)
    return spec.subgroup * spec.channels + padded_heads(spec) * per_head


def shared_bytes(spec: DecodeSpec, config: DecodeConfig) -> int:
    """``sizeof(DecodeShared)``, the dynamic shared memory of a block of decode.cu."""
    heads = padded_heads(spec)
    classes = _own_classes(spec, config)
    per_warp = heads * 4 * (classes + 2 + _sums(spec)) + 4 * _extremes(spec) + 4
    fixed = query_bytes(spec) + heads * 4 * (_CONSTANTS + 1) + 8 * spec.stored_planes + 44
    tiles = config.warps * (_tile_bytes(spec, config) + _settled_bytes(spec, config))
    merge = (
        4 * partial_floats(spec)
        + 4 * spec.subgroup * spec.channels * _dither_shares(spec, config)
        + 4 * MAX_SPLITS * heads
    )
    return _aligned(fixed + config.warps * per_warp, _TILE_ALIGNMENT) + _aligned(
        max(tiles, merge), _TILE_ALIGNMENT
    )


def _settled_bytes(spec: DecodeSpec, config: DecodeConfig) -> int:
    """``sizeof(SettledSums::Memory)``, which only a statistical bound has."""
    if not _is_settled(spec):
        return 0
    class_sums = (_SETTLED_CLASS_SUMS - 1) * _own_classes(spec, config)
    return 4 * (spec.subgroup * (_bound_sums(spec) * TILE + class_sums) + 2 * TILE)


def _own_classes(spec: DecodeSpec, config: DecodeConfig) -> int:
    """Classes that a warp meets: ``kOwnClasses`` of tiles.cuh."""
    return spec.dither_rows // math.gcd(spec.dither_rows // TILE, config.warps)


def _tile_bytes(spec: DecodeSpec, config: DecodeConfig) -> int:
    """``sizeof(WarpTiles)``."""
    row = [row_bytes(spec.channels, width) for width in spec.layout.widths[: spec.stored_planes]]
    heads = padded_heads(spec)
    values = _aligned(TILE * (row[0] + row[1] + 4 * heads + 4 + 4), _TILE_ALIGNMENT)
    rare = RARE_ROWS * max(row[2:]) if row[2:] else 16
    finer = _aligned(TILE * row[1] + rare + RARE_ROWS, _TILE_ALIGNMENT)
    scores, weights = TILE * heads * 4, 2 * heads * ((TILE + 16) * 2 + 4)
    stages = config.key_stages * TILE * (row[0] + 4)
    return _aligned(values + finer + scores + weights + stages, _TILE_ALIGNMENT)


def _is_settled(spec: DecodeSpec) -> bool:
    return spec.bound is BoundKind.STATISTICAL


def _bound_sums(spec: DecodeSpec) -> int:
    return _BOUND_SUMS[spec.bound][spec.sample_values]


def _sums(spec: DecodeSpec) -> int:
    return _OTHER_SUMS + _bound_sums(spec)


def _extremes(spec: DecodeSpec) -> int:
    return _SETTLED_EXTREMES if _is_settled(spec) else 1


def _dither_shares(spec: DecodeSpec, config: DecodeConfig) -> int:
    shares = 1
    while 2 * shares * spec.channels <= TILE * config.warps:
        shares *= 2
    return shares


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
