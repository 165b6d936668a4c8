"""The reference's rows: encoding, gathering and dequantising what a cache stores, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import ActivationError
from alignedkv.kernels.arrays import Array, CacheArrays, StepArguments
from alignedkv.kernels.checks import check_rows
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import (
    LOST_SCALE,
    exact_slots,
    row_addresses,
    to_float32,
    write_exact_rows,
)
from alignedkv.planes import DigitPlanes, dither_class, encode_rows, pack_plane, unpack_plane
from alignedkv.transform import KeyTransform, fit_key_transform, hadamard, hadamard_block

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """The attended rows of one KV head, as they are stored.

    Attributes
    ----------
    tokens, classes : int64 arrays [T]
    keys, values : DigitPlanes [T, C]
        Bits of planes that are not stored are zero.
    is_exact : bool array [T]
        Tokens whose rows are also kept in the input type.
    exact_keys, exact_values : float64 arrays [tokens kept exact, D]
    value_mean : float64 array [D]
    """

    tokens: NDArray[np.int64]
    classes: NDArray[np.int64]
    keys: DigitPlanes
    values: DigitPlanes
    is_exact: NDArray[np.bool_]
    exact_keys: Float
    exact_values: Float
    value_mean: Float

    def take(self, chosen: slice) -> HeadRows:
        """The rows of a range of tokens: what one split sees."""
        before = int(self.is_exact[: chosen.start].sum())
        kept = slice(before, before + int(self.is_exact[chosen].sum()))

        def part(rows: DigitPlanes) -> DigitPlanes:
            return DigitPlanes(
                words=rows.words[chosen],
                scale_bits=rows.scale_bits[chosen],
                dither=rows.dither[chosen],
                layout=rows.layout,
            )

        return HeadRows(
            tokens=self.tokens[chosen],
            classes=self.classes[chosen],
            keys=part(self.keys),
            values=part(self.values),
            is_exact=self.is_exact[chosen],
            exact_keys=self.exact_keys[kept],
            exact_values=self.exact_values[kept],
            value_mean=self.value_mean,
        )


def read_rows(
    spec: DecodeSpec, cache: CacheArrays, sequence: int, head: int, tokens: NDArray[np.int64]
) -> HeadRows:
    """Gather the stored rows of ``tokens``."""
    classes = dither_class(tokens, spec.dither_rows)
    address = row_addresses(spec, cache, sequence, head, tokens)
    scales = cache.scales.reshape(-1)[address]
    start, length = int(cache.starts[sequence]), int(cache.lengths[sequence])
    slots = exact_slots(cache, tokens, start=start, length=length)
    kept = slots[slots >= 0]
    exact = [
        np.zeros((0, spec.head_dim))
        if rows is None
        else to_float32(rows[sequence, head, kept], spec.row_dtype).astype(np.float64)
        for rows in (cache.exact_keys, cache.exact_values)
    ]

    def stored(planes: tuple[NDArray[np.uint8], ...], side: int) -> DigitPlanes:
        words = np.zeros((len(tokens), spec.channels), np.uint16)
        for n, plane in enumerate(planes):
            words |= unpack_plane(plane.reshape(-1, plane.shape[-1])[address], spec.layout, n)
        return DigitPlanes(
            words=words,
            scale_bits=((scales >> np.uint32(16 * side)) & np.uint32(0xFFFF)).astype(np.uint16),
            dither=cache.dither[side].astype(np.int32)[classes],
            layout=spec.layout,
        )

    return HeadRows(
        tokens=tokens,
        classes=classes,
        keys=stored(cache.key_planes, 0),
        values=stored(cache.value_planes, 1),
        is_exact=slots >= 0,
        exact_keys=exact[0],
        exact_values=exact[1],
        value_mean=cache.value_mean[sequence, head].astype(np.float64),
    )


def attended_tokens(
    cache: CacheArrays, arguments: StepArguments, sequence: int
) -> NDArray[np.int64]:
    """Tokens that a sequence attends to: behind its padding, in its window."""
    start, length = int(cache.starts[sequence]), int(cache.lengths[sequence])
    if arguments.window:
        start = max(start, length - arguments.window)
    return np.arange(start, max(start, length), dtype=np.int64)


def write_rows(
    spec: DecodeSpec,
    cache: CacheArrays,
    address: NDArray[np.int64],
    keys: DigitPlanes,
    values: DigitPlanes,
) -> None:
    """Scatter encoded rows to their planes."""
    for planes, rows in ((cache.key_planes, keys), (cache.value_planes, values)):
        for n, plane in enumerate(planes):
            plane.reshape(-1, plane.shape[-1])[address] = pack_plane(rows.words, spec.layout, n)
    both = keys.scale_bits.astype(np.uint32) | (values.scale_bits.astype(np.uint32) << 16)
    cache.scales.reshape(-1)[address] = both


def key_transform(cache: CacheArrays, sequence: int, head: int) -> KeyTransform:
    """The key transform of one KV head of a cache."""
    return KeyTransform(
        mean=cache.key_mean[sequence, head][None],
        balance=cache.balance[sequence, head],
        signs=cache.signs,
        block=hadamard_block(len(cache.signs)),
    )


def encode(spec: DecodeSpec, cache: CacheArrays, keys: Array, values: Array) -> None:
    """Append rows to every sequence, and advance the lengths.

    Parameters
    ----------
    spec : DecodeSpec
    cache : CacheArrays
        Changed in place; its transforms are used as they are (`fit_transforms` sets them).
    keys, values : arrays [B, Hkv, S, D] in row_dtype

    Raises
    ------
    LaunchError
        If shapes or dtypes are wrong or the cache is too small.
    ActivationError
        If a row that can be attended holds NaN or infinity; nothing is appended then.
    """
    check_rows(spec, cache, keys, values)
    key_rows, value_rows = to_float32(keys, spec.row_dtype), to_float32(values, spec.row_dtype)
    batch, kv_heads, count, _ = keys.shape
    tokens = cache.lengths.astype(np.int64)[:, None] + np.arange(count)
    turned = np.empty((2, batch, kv_heads, count, spec.channels), np.float32)
    padding = [(0, 0), (0, spec.channels - spec.head_dim)]
    with np.errstate(over="ignore", invalid="ignore"):
        for b in range(batch):
            for h in range(kv_heads):
                turned[0, b, h] = key_transform(cache, b, h).keys(key_rows[b, h])
                turned[1, b, h] = np.pad(value_rows[b, h] - cache.value_mean[b, h], padding)
    lost = np.asarray(~np.isfinite(turned).all(axis=-1))
    refuse_lost_rows(lost, cache)

    for b in range(batch):
        rows = dither_class(tokens[b], spec.dither_rows)
        for h in range(kv_heads):
            encoded = [
                _encode(spec, turned[side, b, h], cache.dither[side].astype(np.int32)[rows], gone)
                for side, gone in enumerate(lost[:, b, h])
            ]
            write_rows(spec, cache, row_addresses(spec, cache, b, h, tokens[b]), *encoded)
    write_exact_rows(cache, keys, values)
    cache.lengths[:] += np.int32(count)


def fit_transforms(
    spec: DecodeSpec,
    cache: CacheArrays,
    keys: Array,
    values: Array,
    query_size: Array | None = None,
) -> None:
    """Set key_mean, balance and value_mean from the rows of a prefill that is about to be encoded.

    Parameters
    ----------
    keys, values : arrays [B, Hkv, S, D] in row_dtype
        Rows before a sequence's start are left out.
    query_size : float array [Hkv, D] or [B, Hkv, D], optional
        E|q| of each channel; without it the balance stays 1.
    """
    check_rows(spec, cache, keys, values)
    key_rows, value_rows = to_float32(keys, spec.row_dtype), to_float32(values, spec.row_dtype)
    batch, kv_heads, count, _ = keys.shape
    parts = "mean" if query_size is None else "mean+balance"
    sizes = np.broadcast_to(1.0 if query_size is None else query_size, cache.key_mean.shape)
    for b in range(batch):
        seen = np.arange(count) >= int(cache.starts[b]) - int(cache.lengths[b])
        if not seen.any():
            continue
        for h in range(kv_heads):
            fitted = fit_key_transform(key_rows[b, h, seen], sizes[b, h], parts=parts)
            cache.key_mean[b, h] = fitted.mean[0]
            cache.balance[b, h] = fitted.balance
            cache.value_mean[b, h] = value_rows[b, h, seen].astype(np.float64).mean(axis=0)


def dequantise(
    spec: DecodeSpec, cache: CacheArrays, *, tokens: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keys and values [B, Hkv, tokens, D] as all stored planes (or exact rows) tell them.

    Rows that no sequence attends to (padding, beyond the length) are 0.

    Notes
    -----
    k = mean + beta S H k', cut to D: H is symmetric and H H = b, and k' carries 1/(b beta).
    """
    batch, kv_heads, head_dim = cache.key_mean.shape
    keys = np.zeros((batch, kv_heads, tokens, head_dim), np.float32)
    values = np.zeros_like(keys)
    for b in range(batch):
        seen = np.arange(int(cache.starts[b]), min(tokens, int(cache.lengths[b])), dtype=np.int64)
        for h in range(kv_heads):
            rows = read_rows(spec, cache, b, h, seen)
            transform = key_transform(cache, b, h)
            turned = hadamard(rows.keys.prefix(spec.stored_planes), transform.block)
            back = (turned * transform.signs)[:, :head_dim] * transform.balance
            key = back + transform.mean[0]
            value = rows.values.prefix(spec.stored_planes)[:, :head_dim] + rows.value_mean
            key[rows.is_exact], value[rows.is_exact] = rows.exact_keys, rows.exact_values
            keys[b, h, seen], values[b, h, seen] = key, value
    return keys, values


def refuse_lost_rows(lost: NDArray[np.bool_], cache: CacheArrays) -> None:
    """Raise ActivationError where a row behind the lengths is lost and can be attended.

    Parameters
    ----------
    lost : bool array [2, B, Hkv, S]
        Key (0) and value (1) rows that are not finite once centred.
    """
    tokens = cache.lengths.astype(np.int64)[:, None] + np.arange(lost.shape[-1])
    bad = lost & (tokens >= cache.starts[:, None])[None, :, None, :]
    if bad.any():
        side, b, h, i = (int(x) for x in np.argwhere(bad)[0])
        raise ActivationError(
            f"{'values' if side else 'keys'} of sequence {b}, KV head {h}, token {tokens[b, i]} "
            f"hold NaN or infinity (or overflow float32 when centred); {int(bad.sum())} such rows: "
            "give finite rows, or let the sequence start after them"
        )


def _encode(
    spec: DecodeSpec, rows: NDArray[np.float32], dither: NDArray[np.int32], lost: NDArray[np.bool_]
) -> DigitPlanes:
    encoded = encode_rows(np.where(lost[:, None], np.float32(0), rows), dither, spec.layout)
    encoded.scale_bits[lost] = LOST_SCALE
    return encoded
