"""The rule of the AlignedKV paper (arXiv 2409.16546), as its code has it and with its slips mended.

fp16 numbers are stored as planes of 8, 4 and 4 bits.  A key channel is read to 8, 12 or 16 bits by
how far the exponents of its products with the query can lie below the largest; a value row by how
far its weight lies below what the output's exponent asks.  There is no bound.  The code is read
here, not copied: what it does is described in the comments of `Slips`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.schemes.scheme import (
    SchemeResult,
    VisibleRows,
    capped_scores,
    exact_output,
    softmax_weights,
)
from alignedkv.float_planes import encode_floats
from alignedkv.formats import FP16

#: Rows come into planes in blocks of this many; the last partial block stays in fp16.
BLOCK = 64
#: The probe of values takes the token with the largest weight of each of this many.
PROBE_STRIDE = 32
#: Bits dropped from exponent gaps of 4 and of 8 on.
GAPS = (4, 8)
#: What the values' code has in place of `GAPS`: one and two exponents.
PUBLISHED_VALUE_GAPS = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slips:
    """Where the published code does something else than the paper means; True: as published."""

    #: The largest number of a channel is taken with its sign: a channel of large negative numbers
    #: counts as small.
    signed_maximum: bool
    #: ``x & 0x1F - 1`` is ``x & 0x1E``: the exponent of the probe loses its last bit instead of
    #: being lowered by one.
    masked_exponent: bool
    #: Exponents are subtracted as unsigned bytes: a negative gap wraps to a huge one, and the
    #: channel that needs precision most is ignored.
    unsigned_gaps: bool
    #: Value rows lose 4 and 8 bits from gaps of one and two exponents on, not four and eight.
    value_gaps: bool
    #: The output's exponent comes from a probe of a few rows, all counted positive: it can lie
    #: above the output's own.
    probe: bool
    #: Both dot products are added up in fp16, one addend after the other.
    half_sums: bool
    #: A plane that is not read is taken for the middle of its range even where the row is zero.
    filled_zeros: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRule:
    """The paper's scheme.

    Attributes
    ----------
    name : str
    slips : Slips
    """

    name: str
    slips: Slips

    @classmethod
    def as_published(cls) -> PaperRule:
        """With every slip."""
        return cls(name="paper, as published", slips=_all_slips(True))

    @classmethod
    def mended(cls) -> PaperRule:
        """With none."""
        return cls(name="paper, mended", slips=_all_slips(False))

    def apply(self, case: AttentionCase, index: int) -> SchemeResult:
        """Attend.

        Raises
        ------
        SpecError
            If a number is too large for fp16, the only type that the scheme has.
        """
        rows = VisibleRows.of(case, index)
        for part in (rows.query, rows.key, rows.value):
            encode_floats(part)
        tokens = len(rows.key)
        in_planes = tokens // BLOCK * BLOCK
        outputs, key_bits, value_bits = [], [], []
        for head, query in enumerate(rows.query):
            channel_bits = self.key_bits(query, rows.key)
            key = self._read(rows.key[:in_planes], np.broadcast_to(channel_bits, (1, len(query))))
            key = np.concatenate([key, _half(rows.key[in_planes:])])
            weights = self._weights(case, _half(query), key, head)
            row_bits = self.value_bits(weights[:in_planes], rows.value[:in_planes])
            value = self._read(rows.value[:in_planes], row_bits[:, None])
            value = np.concatenate([value, _half(rows.value[in_planes:])])
            outputs.append(_half(self._sum(weights[:, None] * value)))
            tail = 16.0 * (tokens - in_planes)
            key_bits.append((channel_bits.mean() * in_planes + tail) / tokens)
            value_bits.append((row_bits.sum() + tail) / tokens)
        return SchemeResult(
            name=self.name,
            output=np.stack(outputs),
            exact=exact_output(case, index),
            key_bits=float(np.mean(key_bits)),
            value_bits=float(np.mean(value_bits)),
            bytes_stored=4.0 * tokens * case.head_dim,
        )

    def key_bits(self, query: NDArray[np.float64], key: NDArray[np.float64]) -> NDArray[np.int64]:
        """Bits read of each key channel [D], for one head's query [D] and keys [T, D]."""
        sums = _exponent_field(query) + _exponent_field(self._largest(key))
        return _bits(sums.max() - sums, GAPS)

    def value_bits(
        self, weights: NDArray[np.float64], value: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Bits read of each value row [T], for one head's weights [T] and values [T, D]."""
        if not len(value):
            return np.zeros(0, np.int64)
        exponent = _exponent_field(self._expected_output(weights, value))
        exponent = exponent & 0x1E if self.slips.masked_exponent else exponent - 1
        # Fields of fp16 are biased by 15: of a product, field(p) + field(v) - 15.
        threshold = exponent + FP16.bias - _exponent_field(self._largest(value))
        if self.slips.unsigned_gaps:
            threshold = threshold & 0xFF
        gaps = PUBLISHED_VALUE_GAPS if self.slips.value_gaps else GAPS
        return _bits(_scaled_gap(threshold.min(), weights), gaps)

    def _expected_output(
        self, weights: NDArray[np.float64], value: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        if not self.slips.probe:
            output: NDArray[np.float64] = weights @ value
            return np.abs(output)
        strided = weights.reshape(-1, PROBE_STRIDE)
        chosen = strided.argmax(axis=0) * PROBE_STRIDE + np.arange(PROBE_STRIDE)
        first_plane = encode_floats(value[chosen]).prefix(1)
        probed: NDArray[np.float64] = weights[chosen] @ np.abs(first_plane)
        return probed

    def _largest(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        largest: NDArray[np.float64] = rows.max(axis=0)
        return largest if self.slips.signed_maximum else np.maximum(largest, -rows.min(axis=0))

    def _read(self, rows: NDArray[np.float64], bits: NDArray[np.int64]) -> NDArray[np.float64]:
        """The rows, each number to as many bits as ``bits`` (broadcast) says."""
        planes = encode_floats(rows)
        bits = np.broadcast_to(bits, rows.shape)
        out = planes.prefix(len(planes.layout))
        exact = out
        for count in range(1, len(planes.layout)):
            out = np.where(bits == planes.layout.bits(count), planes.prefix(count), out)
        return out if self.slips.filled_zeros else np.where(exact == 0, 0.0, out)

    def _weights(
        self,
        case: AttentionCase,
        query: NDArray[np.float64],
        key: NDArray[np.float64],
        head: int,
    ) -> NDArray[np.float64]:
        """fp16 softmax weights of one head [T]."""
        if self.slips.half_sums:
            products = self._sum((query * key).T)[None]
            scores = capped_scores(case, products.T, np.ones((1, 1))).T
        else:
            scores = capped_scores(case, query[None], key)
        one_head = case.sinks[head : head + 1] if case.sinks is not None else None
        return _half(softmax_weights(_half(scores), one_head)[0])

    def _sum(self, addends: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over the first axis: exactly, or in fp16 with one rounding per addend."""
        if not self.slips.half_sums:
            total: NDArray[np.float64] = addends.sum(axis=0)
            return total
        running = np.zeros(addends.shape[1:], np.float16)
        for addend in addends:
            running = (running.astype(np.float64) + addend).astype(np.float16)
        return running.astype(np.float64)


def _all_slips(made: bool) -> Slips:
    return Slips(**{field.name: made for field in fields(Slips)})


def _half(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x.astype(np.float16).astype(np.float64)


def _exponent_field(x: NDArray[np.float64]) -> NDArray[np.int64]:
    """The five exponent bits of fp16 numbers."""
    return (x.astype(np.float16).view(np.uint16).astype(np.int64) >> 10) & 31


def _scaled_gap(threshold: np.integer, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponents by which weights lie below a threshold, fractions of a binade included [T]."""
    patterns = weights.astype(np.float16).view(np.uint16).astype(np.int64)
    return threshold - patterns / 1024.0


def _bits(gap: NDArray[np.number[Any]], gaps: tuple[int, int]) -> NDArray[np.int64]:
    four, eight = gaps
    return np.where(gap >= eight, 8, np.where(gap >= four, 12, 16))
