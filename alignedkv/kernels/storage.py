"""Where a cache's rows lie: allocation, the address of a row, sizes in bytes, dtypes.

Nothing here knows torch or CuPy: whoever allocates says how arrays are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import LaunchError, SpecError
from alignedkv.formats import BF16, bf16_to_float32, float32_to_bf16_bits, round_to
from alignedkv.kernels.arrays import Array, CacheArrays
from alignedkv.kernels.spec import MAX_ROWS, MAX_TOKENS, DecodeSpec
from alignedkv.planes import dither_table, random_streams, row_bytes
from alignedkv.transform import random_signs

#: bfloat16 scale of a row that held NaN or infinity: every bound that meets it is lost.
LOST_SCALE = 0x7F80
#: Bytes of the two row scales of a token.
SCALE_BYTES = 4


def allocate(
    spec: DecodeSpec,
    *,
    batch: int,
    kv_heads: int,
    capacity: int,
    zeros: Callable[[tuple[int, ...], str], Array],
    put: Callable[[NDArray[np.generic]], Array],
    exact_first: int = 0,
    exact_last: int = 0,
    pages: int | None = None,
    seed: int = 0,
) -> CacheArrays:
    """Allocate an empty cache: lengths 0, means 0, balance 1, its own dither and signs.

    Parameters
    ----------
    spec : DecodeSpec
    batch, kv_heads, capacity : int
        B, Hkv, T.
    zeros : callable
        ``zeros(shape, dtype)`` -> zeroed array; dtypes are named as in `CacheArrays`, "bfloat16"
        among them.
    put : callable
        NumPy array -> array of the same content, where `zeros` puts its arrays.
    exact_first, exact_last : int
        Rows kept in ``row_dtype`` at either end; only where ``spec.exact_rows``.
    pages : int, optional
        Pages in the pool of a paged cache; its block table is then left for the caller to fill.
        Default: as many as the batch needs, given to its sequences one after the other.
    seed : int
        Of dither and signs; one per request (theory.md 1, "Independence").

    Raises
    ------
    SpecError
        If a size is not positive or too large, or exact rows are asked for without
        ``spec.exact_rows``.
    """
    _check_sizes(spec, batch, kv_heads, capacity, exact_first + exact_last)
    channels, page = spec.channels, spec.page_tokens
    rows: tuple[int, ...] = (batch, kv_heads, capacity)
    block_table = None
    if page is not None:
        per_sequence = -(-capacity // page)
        rows = (batch * per_sequence if pages is None else pages, kv_heads, page)
        if pages is None:
            table = np.arange(batch * per_sequence, dtype=np.int32)
            block_table = put(table.reshape(batch, per_sequence))
        else:
            block_table = zeros((batch, per_sequence), "int32")
    if math.prod(rows) > MAX_ROWS:
        raise SpecError(f"rows {rows}: a cache has at most 2^32; split the batch")
    widths = spec.layout.widths[: spec.stored_planes]
    sign_seed, *dither_seeds = random_streams(seed)
    tables = [
        dither_table(spec.dither_rows, channels, seed=stream, layout=spec.layout)
        for stream in dither_seeds
    ]
    heads = (batch, kv_heads, spec.head_dim)
    exact_shape = (batch, kv_heads, exact_first + exact_last, spec.head_dim)
    return CacheArrays(
        key_planes=tuple(zeros((*rows, row_bytes(channels, w)), "uint8") for w in widths),
        value_planes=tuple(zeros((*rows, row_bytes(channels, w)), "uint8") for w in widths),
        scales=zeros(rows, "uint32"),
        key_mean=zeros(heads, "float32"),
        balance=put(np.ones(heads, np.float32)),
        value_mean=zeros(heads, "float32"),
        signs=put(random_signs(channels, seed=sign_seed)),
        dither=put(np.stack(tables).astype(np.int16)),
        lengths=zeros((batch,), "int32"),
        starts=zeros((batch,), "int32"),
        block_table=block_table,
        exact_keys=zeros(exact_shape, spec.row_dtype) if spec.exact_rows else None,
        exact_values=zeros(exact_shape, spec.row_dtype) if spec.exact_rows else None,
        exact_first=exact_first,
        exact_last=exact_last,
    )


def numpy_zeros(shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    """`zeros` for NumPy caches: bfloat16 as uint16 bit patterns."""
    return np.zeros(shape, held_dtype(dtype))


def allocate_numpy(spec: DecodeSpec, **sizes: int | None) -> CacheArrays:
    """`allocate` with NumPy arrays."""
    return allocate(spec, zeros=numpy_zeros, put=np.ascontiguousarray, **sizes)  # type: ignore[arg-type]


def bytes_per_token(spec: DecodeSpec) -> int:
    """Bytes that a token of one KV head takes: all stored planes and scales of K and V."""
    widths = spec.layout.widths[: spec.stored_planes]
    return SCALE_BYTES + 2 * sum(row_bytes(spec.channels, width) for width in widths)


def bytes_per_exact_row(spec: DecodeSpec) -> int:
    """Bytes that a token of one KV head takes besides where it is kept exact: K and V."""
    return 2 * spec.head_dim * held_dtype(spec.row_dtype).itemsize


def bytes_stored(
    spec: DecodeSpec, *, batch: int, kv_heads: int, capacity: int, exact_rows: int = 0
) -> int:
    """Bytes of planes, scales and rows kept exact of a contiguous cache.

    Parameters
    ----------
    exact_rows : int
        ``exact_first + exact_last`` of `CacheArrays`.

    Raises
    ------
    SpecError
        If ``exact_rows`` is not positive exactly where ``spec.exact_rows``.
    """
    _check_exact_rows(spec, exact_rows)
    per_head = capacity * bytes_per_token(spec) + exact_rows * bytes_per_exact_row(spec)
    return batch * kv_heads * per_head


def exact_rows_read(spec: DecodeSpec, first_reads: Array, attended: Array, kept: Array) -> Array:
    """How often steps have read a row kept exact: K and V together count once.

    Parameters
    ----------
    first_reads : int array
        ``DecodeResult.reads[..., 0, 0]``, of any shape.
    attended, kept : int arrays
        Tokens that the sequence attended to, and those of them that it keeps exact.

    Notes
    -----
    A pass over a head reads every row kept exact, and the first key plane of every other attended
    token: so first planes tell how many passes there were.  Where no other token is attended,
    nothing misses, and each part of a group makes one.  For NumPy arrays and torch tensors alike.
    """
    others = attended - kept
    passes = first_reads // others.clip(min=1) + (others == 0) * spec.subgroups
    return passes * kept


def bytes_read(
    spec: DecodeSpec, reads: NDArray[np.integer], *, exact: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """Bytes of planes, scales and rows kept exact that steps have read.

    Parameters
    ----------
    reads : int array [..., 2, N]
        `DecodeResult.reads`.
    exact : int array [...], optional
        From `exact_rows_read`; only where ``spec.exact_rows``.

    Returns
    -------
    int64 array [...]
        A token's scales count once with its first key plane.

    Raises
    ------
    SpecError
        If ``exact`` is not given exactly where ``spec.exact_rows``.
    """
    if (exact is not None) != spec.exact_rows:
        raise SpecError(
            f"reads {'without' if exact is None else 'with'} those of exact rows and "
            f"DecodeSpec.exact_rows={spec.exact_rows}: give `exact` exactly where it is set"
        )
    widths = spec.layout.widths[: spec.stored_planes]
    per_row = np.array([row_bytes(spec.channels, width) for width in widths], np.int64)
    rows = reads.astype(np.int64)
    total: NDArray[np.int64] = (rows * per_row).sum(axis=(-2, -1)) + SCALE_BYTES * rows[..., 0, 0]
    return total if exact is None else total + bytes_per_exact_row(spec) * exact.astype(np.int64)


def capacity_of(spec: DecodeSpec, cache: CacheArrays) -> int:
    """Tokens that a sequence may have."""
    if spec.page_tokens is None:
        return int(cache.scales.shape[2])
    if cache.block_table is None:
        raise LaunchError(
            f"a cache with pages of {spec.page_tokens} tokens has no block table: give "
            "CacheArrays.block_table"
        )
    return int(cache.block_table.shape[1]) * spec.page_tokens


def row_addresses(
    spec: DecodeSpec, cache: CacheArrays, sequence: int, head: int, tokens: NDArray[np.integer]
) -> NDArray[np.int64]:
    """THE address function: index of each token's row in the flattened planes and scales."""
    kv_heads = cache.key_mean.shape[1]
    t = tokens.astype(np.int64)
    if spec.page_tokens is None:
        rows: NDArray[np.int64] = (sequence * kv_heads + head) * int(cache.scales.shape[2]) + t
        return rows
    page = np.asarray(cache.block_table)[sequence, t // spec.page_tokens].astype(np.int64)
    rows = (page * kv_heads + head) * spec.page_tokens
    return rows + t % spec.page_tokens


def exact_slots(
    cache: CacheArrays, tokens: NDArray[np.integer], *, start: int, length: int
) -> NDArray[np.int64]:
    """Slot of each token among the rows kept exact, -1 where it has none.

    Parameters
    ----------
    tokens : int array [n]
    start, length : int
        Of the sequence, the tokens at hand included.
    """
    t = tokens.astype(np.int64)
    slots = np.full(t.shape, -1, np.int64)
    if cache.exact_last:
        late = t >= length - cache.exact_last
        slots[late] = cache.exact_first + t[late] % cache.exact_last
    early = (t >= start) & (t < start + cache.exact_first)
    slots[early] = t[early] - start
    return slots


def write_exact_rows(cache: CacheArrays, keys: Array, values: Array) -> None:
    """Keep those of the rows behind the lengths that the cache keeps exact, if it does.

    Parameters
    ----------
    keys, values : arrays [B, Hkv, S, D] in row_dtype
    """
    if cache.exact_keys is None or cache.exact_values is None:
        return
    count = keys.shape[2]
    for b, (start, before) in enumerate(zip(cache.starts, cache.lengths, strict=True)):
        tokens = int(before) + np.arange(count)
        slots = exact_slots(cache, tokens, start=int(start), length=int(before) + count)
        kept = np.flatnonzero(slots >= 0)
        cache.exact_keys[b][:, slots[kept]] = keys[b][:, kept]
        cache.exact_values[b][:, slots[kept]] = values[b][:, kept]


def to_float32(array: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Values of an array of a named dtype, exactly."""
    return bf16_to_float32(array) if dtype == "bfloat16" else array.astype(np.float32)


def from_float64(array: NDArray[np.float64], dtype: str) -> NDArray[np.generic]:
    """Round to a named dtype, once."""
    if dtype == "bfloat16":
        return float32_to_bf16_bits(round_to(BF16, array).astype(np.float32))
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def held_dtype(dtype: str) -> np.dtype[np.generic]:
    """What NumPy holds a named dtype in: bfloat16 as uint16 bit patterns."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _check_sizes(spec: DecodeSpec, batch: int, kv_heads: int, capacity: int, exact: int) -> None:
    if batch < 1 or kv_heads < 1:
        raise SpecError(f"{batch} sequences of {kv_heads} KV heads: give at least one of each")
    if not 1 <= capacity <= MAX_TOKENS:
        raise SpecError(f"capacity {capacity}: give 1 to {MAX_TOKENS} tokens")
    _check_exact_rows(spec, exact)


def _check_exact_rows(spec: DecodeSpec, exact: int) -> None:
    if (exact > 0) != spec.exact_rows:
        raise SpecError(
            f"{exact} exact rows with DecodeSpec.exact_rows={spec.exact_rows}: set it exactly "
            "where exact_first + exact_last is positive"
        )
