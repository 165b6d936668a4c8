"""A case as the cache would store it: transformed, centred, dithered and cut into planes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.hot_loops.encode import encode_words, row_magnitudes, transform_rows
from alignedkv.formats import BF16, bf16_bits_round_up, bf16_to_float32
from alignedkv.planes import (
    DITHER_FRACTION_BITS,
    SMALLEST_SCALE,
    DigitPlanes,
    PlaneLayout,
    dither_class,
    dither_table,
    padded_channels,
    random_streams,
)
from alignedkv.policy import PrecisionPolicy
from alignedkv.transform import KeyTransform, fit_key_transform

#: What `encode_case` does to keys unless told otherwise.
KEY_TRANSFORM = "mean+balance+hadamard"
#: Rows from which the statistics of one mean are taken; of longer caches, evenly spaced ones.
STATISTICS_ROWS = 16384
#: Two numbers up to this size have a difference that float32 and bfloat16 scales can hold.
_LARGEST_CENTRED = BF16.max / 4


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """Keys or values of one head as planes; `planes.DigitPlanes` without a dither row per token.

    Attributes
    ----------
    words : uint16 array [T, C]
    scale_bits : uint16 array [T]
        Row scale g as bfloat16.
    table : int32 array [P, C]
        Dither rows, in units of 2^-F of a word's last bit.
    classes : int64 array [T]
        Dither row of each token.
    layout : PlaneLayout
    stored : int
        Planes in memory.
    """

    words: NDArray[np.uint16]
    scale_bits: NDArray[np.uint16]
    table: NDArray[np.int32]
    classes: NDArray[np.int64]
    layout: PlaneLayout
    stored: int

    @cached_property
    def scale(self) -> NDArray[np.float64]:
        """g, the step of the first plane [T]."""
        return bf16_to_float32(self.scale_bits).astype(np.float64)

    @cached_property
    def log2_scale(self) -> NDArray[np.float64]:
        """log2 g [T]."""
        return np.log2(self.scale)

    @cached_property
    def unit(self) -> NDArray[np.float64]:
        """f, the step of a word's last bit [T]."""
        unit: NDArray[np.float64] = np.ldexp(self.scale, -self.layout.scale_shift)
        return unit

    @cached_property
    def dither(self) -> NDArray[np.float64]:
        """The dither rows in units of a word's last bit [P, C]."""
        return self.table.astype(np.float64) * 2.0**-DITHER_FRACTION_BITS

    @property
    def magnitude(self) -> NDArray[np.float64]:
        """Upper bound of every |x| in the row, from its scale alone [T]."""
        largest: NDArray[np.float64] = self.scale * self.layout.half_range
        return largest

    @property
    def largest_shown(self) -> NDArray[np.float64]:
        """Largest |x| that one plane can show: its outermost cell and half a step of dither [T]."""
        return self.scale * 2.0 ** (self.layout.widths[0] - 1)

    def half_step(self, planes: int) -> NDArray[np.float64]:
        """delta(n) [T]: largest error of a channel after ``planes >= 1`` planes (Lemma 1)."""
        return self.unit * 2.0 ** (self.layout.unread_bits(planes) - 1)

    def unread_bits(self) -> NDArray[np.int64]:
        """Bits left unread by 1, 2, ... stored planes."""
        counts = range(1, self.stored + 1)
        return np.array([self.layout.unread_bits(n) for n in counts], np.int64)

    def span(self, first: int, end: int) -> StoredRows:
        """The rows of tokens ``first <= t < end``."""
        return replace(
            self,
            words=self.words[first:end],
            scale_bits=self.scale_bits[first:end],
            classes=self.classes[first:end],
        )

    def planes(self) -> DigitPlanes:
        """The same rows with a dither row for every token, as kernels' references take them."""
        return DigitPlanes(
            words=self.words,
            scale_bits=self.scale_bits,
            dither=self.table[self.classes],
            layout=self.layout,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedCase:
    """A case and what is stored of it.

    Attributes
    ----------
    case : AttentionCase
    policy : PrecisionPolicy
    transform : KeyTransform
    value_mean : float32 array [D]
        Centre of the values.
    keys, values : StoredRows
    value_rows : float32 array [T, D]
        The values themselves, exactly, for what is measured and for rows that are kept.
    """

    case: AttentionCase
    policy: PrecisionPolicy
    transform: KeyTransform
    value_mean: NDArray[np.float32]
    keys: StoredRows
    values: StoredRows
    value_rows: NDArray[np.float32]

    @property
    def bytes_stored(self) -> int:
        """Payload of the stored planes, row scales and rows that are also kept exactly."""
        case, policy = self.case, self.policy
        channels = padded_channels(case.head_dim)
        bits = sum(
            channels * rows.layout.bits(rows.stored) + BF16.bits
            for rows in (self.keys, self.values)
        )
        exact = min(policy.exact_first + policy.exact_last, case.tokens)
        return (case.tokens * bits + exact * 2 * case.head_dim * case.input_bits) // 8


def encode_case(
    case: AttentionCase,
    policy: PrecisionPolicy,
    *,
    transform: str = KEY_TRANSFORM,
    page: int | None = None,
    seed: int = 0,
) -> EncodedCase:
    """Store a case as the policy says.

    Parameters
    ----------
    case : AttentionCase
    policy : PrecisionPolicy
    transform : str
        Parts of the key transform, joined by "+", or "none".
    page : int, optional
        Tokens that share a key mean; default all.
    seed : int
        Of the dither and the random signs.

    Notes
    -----
    Statistics come from the case's ``prefill`` rows and its own queries.
    """
    sign_seed, key_seed, value_seed = random_streams(seed)
    prefill = case.prefill or case.tokens
    keys32 = np.ascontiguousarray(case.key, np.float32)
    values32 = np.ascontiguousarray(case.value, np.float32)
    if case.start:
        # Padding may hold anything; no query sees it, and its rows are stored as zeros.
        keys32, values32 = keys32.copy(), values32.copy()
        keys32[: case.start] = values32[: case.start] = 0
    first = min(case.start, prefill - 1)
    seen = slice(first, prefill, -(-(prefill - first) // STATISTICS_ROWS))
    query_size = np.abs(case.query.astype(np.float64)).mean(axis=(0, 1))
    fitted = fit_key_transform(
        keys32[:prefill] if page else keys32[seen],
        query_size,
        parts=transform,
        page=page,
        seed=sign_seed,
    )
    fitted = replace(fitted, mean=_holdable(_all_pages(fitted, case.tokens), keys32))
    mean = values32[seen].mean(axis=0, dtype=np.float64).astype(np.float32)
    value_mean = _holdable(mean[None], values32)[0]
    return EncodedCase(
        case=case,
        policy=policy,
        transform=fitted,
        value_mean=value_mean,
        keys=_store(transformed_keys(fitted, keys32), policy, policy.key_layout, seed=key_seed),
        values=_store(values32 - value_mean, policy, policy.value_layout, seed=value_seed),
        value_rows=values32,
    )


def transformed_keys(transform: KeyTransform, keys: NDArray[np.float32]) -> NDArray[np.float32]:
    """`KeyTransform.keys`, bit for bit, without its temporaries [T, C]."""
    out = np.empty((len(keys), len(transform.signs)), np.float32)
    transform_rows(
        keys,
        transform.key_gain,
        transform.mean,
        transform.page or len(keys),
        transform.signs,
        transform.block,
        out,
    )
    return out


def _store(
    rows: NDArray[np.float32], policy: PrecisionPolicy, layout: PlaneLayout, *, seed: int
) -> StoredRows:
    """`planes.encode_rows`, bit for bit, without its temporaries."""
    tokens, head_dim = rows.shape
    channels = padded_channels(head_dim)
    table = dither_table(policy.dither_rows, channels, seed=seed, layout=layout)
    classes = dither_class(np.arange(tokens), policy.dither_rows)
    largest = np.empty(tokens, np.float32)
    row_magnitudes(rows, largest)
    wanted = largest / np.float32(layout.half_range)
    scale_bits = bf16_bits_round_up(np.maximum(wanted, np.float32(SMALLEST_SCALE)))
    words = np.empty((tokens, channels), np.uint16)
    encode_words(
        rows,
        bf16_to_float32(scale_bits),
        table.astype(np.float32) * np.float32(2.0**-DITHER_FRACTION_BITS),
        classes,
        layout.scale_shift,
        words,
    )
    return StoredRows(
        words=words,
        scale_bits=scale_bits,
        table=table,
        classes=classes,
        layout=layout,
        stored=policy.planes_stored(layout),
    )


def _all_pages(transform: KeyTransform, tokens: int) -> NDArray[np.float32]:
    """Means for rows beyond those that were fitted: the last page's (measurements.md 4)."""
    if transform.page is None:
        return transform.mean
    missing = -(-tokens // transform.page) - len(transform.mean)
    return np.concatenate([transform.mean, np.repeat(transform.mean[-1:], missing, axis=0)])


def _holdable(mean: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zero means of channels whose centred rows could leave float32's range."""
    if max(rows.max(), -rows.min()) <= _LARGEST_CENTRED:
        return mean
    largest = np.maximum(rows.max(axis=0), -rows.min(axis=0))
    return np.where(largest > _LARGEST_CENTRED, np.float32(0), mean)
