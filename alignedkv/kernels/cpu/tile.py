"""What the functions of a split share: a tile's workspace, columns of facts and sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from alignedkv.kernels.arrays import HEAD_HINTS
from alignedkv.kernels.cpu.compiled import compiled

#: Tokens that are scored, planned and added together.
TILE = 64
#: Bound kinds as numbers.
ESTIMATE, DETERMINISTIC, STATISTICAL = 0, 1, 2

# Columns of a head's facts [G, FACTS], fixed for a pass: first the hints, as HEAD_HINTS has them.
LOG_Z, REST, SPREAD, THETA, MARGIN = range(len(HEAD_HINTS))
NORM1, NORM2, BASE, SHIFT, SCORE_ERROR, REFINED_ERROR, NEAR, OFFSET = range(5, 13)
FACTS = 13

# Columns of a split's sums [G, SUMS]: first those linear in the weights, then the squares, then
# maxima of terms linear in the weights, then maxima without a weight.
WEIGHT, SKIPPED, SECOND, ERROR, ERROR_SIZE, VALUE_ERROR, SMALLEST, LIKELY = range(8)
SHIFTED, SHIFTED_SIZE, VALUE_BASE, REACH = range(8, 12)
KEY_SQUARE, VALUE_SQUARE, SAMPLED_SQUARE = range(12, 15)
SAMPLED_LARGEST, SIZE, LARGEST_SHIFT = range(15, 18)
FIRST_SQUARE, AFTER_SQUARES, SUMS = 12, 15, 18

# Rows of a split's class sums [G, CLASS_SUMS, P]; the first is B_s of (2.3).
DITHER, LINEAR_ONE, LINEAR_SIZE, SQUARE_ONE, SQUARE_SIZE, VALUE = range(6)
CLASS_SUMS = 6


class Stored(NamedTuple):
    """A cache as the kernels see it, but for its planes: arrays flattened to rows.

    Exact rows are float32 [B, Hkv, slots, D].
    """

    scales: Any
    dither: Any
    value_mean: Any
    exact_keys: Any
    exact_values: Any
    exact_first: int
    exact_last: int
    block_table: Any
    page: int
    capacity: int
    heads: int
    stored: int


class Cache(NamedTuple):
    """`Stored` and the planes: always four, of width 0 where not stored.

    Numba does not let tuples of tuples into a parallel loop; they are put together inside.
    """

    key_planes: Any
    value_planes: Any
    widths: Any
    scales: Any
    dither: Any
    value_mean: Any
    exact_keys: Any
    exact_values: Any
    exact_first: int
    exact_last: int
    block_table: Any
    page: int
    capacity: int
    heads: int
    stored: int


class Step(NamedTuple):
    """A step's numbers: `StepArguments` and the spec's switches, and c_acc and e^w."""

    kind: int
    sampled: bool
    scaling: float
    tolerance: float
    deviations: float
    skip_share: float
    margin: float
    window: int
    softcap: float
    seed: int
    repairs: int
    accumulation: float
    weight_error: float


class Head(NamedTuple):
    """G queries of one KV head."""

    queries: Any  # q' float32 [G, C]
    exact_queries: Any  # q float64 [G, D]
    products: Any  # C_s = q'.U_s in units of g, float64 [G, P]
    facts: Any  # float64 [G, FACTS]
    key: int  # of the sampling hash


class Tile(NamedTuple):
    """Workspace of a tile: [TILE] and [G, TILE] arrays."""

    token: Any
    address: Any
    own: Any  # dither class
    slot: Any  # among exact rows, or -1
    key_scale: Any
    value_scale: Any
    size: Any  # a_t
    live: Any  # 0 for rows kept exact, else 1
    keys: Any  # planes read
    values: Any
    chance: Any
    excess: Any
    above: Any
    value_error: Any  # delta^V, 0 where skipped or exact
    skipped: Any  # a where skipped, else 0
    score: Any  # with the planes used
    half: Any  # delta^K at the planes used
    finest: Any  # score with the planes read
    finest_half: Any
    stages: Any  # scores after 1..4 planes, [4, G, TILE]
    weight: Any
    digits: Any  # float32 [TILE, C]
    coefficient: Any  # float32 [G, TILE]
    partial: Any  # float32 [G, C]


@compiled
def whole_cache(key_planes, value_planes, widths, stored):
    """Put a `Cache` together."""
    return Cache(
        key_planes, value_planes, widths, stored.scales, stored.dither, stored.value_mean,
        stored.exact_keys, stored.exact_values, stored.exact_first, stored.exact_last,
        stored.block_table, stored.page, stored.capacity, stored.heads, stored.stored,
    )  # fmt: skip


@compiled
def new_tile(group, channels):
    """Workspace for G heads of C channels."""
    counts = np.zeros((7, TILE), np.int64)
    numbers = np.zeros((9, TILE))
    grouped = np.zeros((4, group, TILE))
    return Tile(
        counts[0], counts[1], counts[2], counts[3], numbers[0], numbers[1], numbers[2], numbers[3],
        counts[4], counts[5], numbers[4], numbers[5], numbers[6], numbers[7], numbers[8],
        grouped[0], grouped[1], grouped[2], np.zeros(TILE), np.zeros((4, group, TILE)), grouped[3],
        np.zeros((TILE, channels), np.float32), np.zeros((group, TILE), np.float32),
        np.zeros((group, channels), np.float32),
    )  # fmt: skip


@compiled
def key_scale_of(scales):
    """g of a key from its token's two scales."""
    return np.float64(np.uint32((np.int64(scales) & 0xFFFF) << 16).view(np.float32))


@compiled
def half_step(step_size, widths, planes):
    """delta(n) of Lemma 1, n >= 1."""
    finer = 1.0
    for n in range(1, planes):
        finer /= 1 << widths[n]
    return 0.5 * step_size * finer
