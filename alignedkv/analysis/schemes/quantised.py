"""16-bit and 8-bit caches and KIVI: rows are rounded when they are stored, and all is read."""

from __future__ import annotations

from dataclasses import dataclass

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
from alignedkv.errors import SpecError
from alignedkv.formats import FP16, FloatFormat, round_to

#: Tokens of a KIVI key group, channels of a KIVI value group.
KIVI_GROUP = 32
#: Recent tokens that KIVI keeps in 16 bits, at least.
KIVI_RECENT = 96
#: Bits of a scale, or of a zero point.
SCALE_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SixteenBit:
    """FlashAttention in a 16-bit type: q, K, V, softmax weights and output are rounded to it.

    Attributes
    ----------
    name : str
    number_format : FloatFormat
    """

    name: str
    number_format: FloatFormat

    def apply(self, case: AttentionCase, index: int) -> SchemeResult:
        """Attend; weights are summed before they are rounded (theory.md 7.3).

        Raises
        ------
        SpecError
            If a number is too large for the type.
        """
        rows = VisibleRows.of(case, index)
        query, key, value = (self._rounded(part) for part in (rows.query, rows.key, rows.value))
        scores = capped_scores(case, query, key)
        sinks = np.full(len(scores), -np.inf) if case.sinks is None else case.sinks
        largest = scores.max(axis=1)
        relative = np.exp(scores - largest[:, None])
        total = relative.sum(axis=1) + np.exp(sinks - largest)
        output = round_to(self.number_format, relative) @ value / total[:, None]
        return _result(self.name, case, index, round_to(self.number_format, output), (16.0, 16.0))

    def _rounded(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        rounded = round_to(self.number_format, x)
        if not np.isfinite(rounded).all():
            culprit = x[~np.isfinite(rounded)][0]
            raise SpecError(
                f"{self.name}: {culprit} is no finite {self.number_format.name}; give numbers up "
                f"to {self.number_format.max:.4g}"
            )
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """Keys and values in an 8-bit float, one scale per tensor.

    Attributes
    ----------
    name : str
    number_format : FloatFormat
    """

    name: str
    number_format: FloatFormat

    def apply(self, case: AttentionCase, index: int) -> SchemeResult:
        """Attend."""
        rows = VisibleRows.of(case, index)
        output = _attend(case, rows, self._rounded(rows.key), self._rounded(rows.value))
        return _result(self.name, case, index, output, (8.0, 8.0))

    def _rounded(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = _scale(np.abs(x).max(keepdims=True), self.number_format.max)
        return round_to(self.number_format, x / scale) * scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Symmetric 8-bit integers: keys scaled per channel, values per token."""

    name: str = "int8"

    def apply(self, case: AttentionCase, index: int) -> SchemeResult:
        """Attend."""
        rows = VisibleRows.of(case, index)
        key_scale = _scale(np.abs(rows.key).max(axis=0, keepdims=True), 127.0)
        value_scale = _scale(np.abs(rows.value).max(axis=1, keepdims=True), 127.0)
        key = np.rint(rows.key / key_scale) * key_scale
        value = np.rint(rows.value / value_scale) * value_scale
        bits = 8 + SCALE_BITS / len(key), 8 + SCALE_BITS / case.head_dim
        return _result(self.name, case, index, _attend(case, rows, key, value), bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kivi:
    """KIVI: asymmetric integers, keys in groups of tokens, values in groups of channels.

    The most recent tokens stay in 16 bits; scale and zero point of a group are 16 bits each.

    Attributes
    ----------
    bits : int
    """

    bits: int

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"KIVI-{self.bits}"

    def apply(self, case: AttentionCase, index: int) -> SchemeResult:
        """Attend."""
        rows = VisibleRows.of(case, index)
        tokens, head_dim = rows.key.shape
        old = max(tokens - KIVI_RECENT, 0) // KIVI_GROUP * KIVI_GROUP
        key = np.concatenate([self._grouped(rows.key[:old].T).T, rows.key[old:]])
        value = np.concatenate([self._grouped(rows.value[:old]), rows.value[old:]])
        recent = 16.0 * (tokens - old)
        value_groups = -(-head_dim // KIVI_GROUP) / head_dim
        bits = tuple(
            (old * (self.bits + 2 * SCALE_BITS * groups) + recent) / tokens
            for groups in (1 / KIVI_GROUP, value_groups)
        )
        return _result(self.name, case, index, _attend(case, rows, key, value), (bits[0], bits[1]))

    def _grouped(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each group along the last axis between its smallest and its largest number."""
        out = np.empty_like(x)
        for start in range(0, x.shape[1], KIVI_GROUP):
            group = x[:, start : start + KIVI_GROUP]
            lowest = group.min(axis=1, keepdims=True)
            width = group.max(axis=1, keepdims=True) - lowest
            step = round_to(FP16, width / (2**self.bits - 1))
            codes = np.rint((group - lowest) / np.where(step == 0, 1.0, step))
            codes = np.clip(codes, 0, 2**self.bits - 1)
            out[:, start : start + KIVI_GROUP] = codes * step + lowest
        return out


def _result(
    name: str,
    case: AttentionCase,
    index: int,
    output: NDArray[np.float64],
    bits: tuple[float, float],
    stored_bits: float | None = None,
) -> SchemeResult:
    first, end = case.visible(index)
    per_pair = sum(bits) if stored_bits is None else stored_bits
    return SchemeResult(
        name=name,
        output=output,
        exact=exact_output(case, index),
        key_bits=bits[0],
        value_bits=bits[1],
        bytes_stored=per_pair * (end - first) * case.head_dim / 8,
    )


def _attend(
    case: AttentionCase,
    rows: VisibleRows,
    key: NDArray[np.float64],
    value: NDArray[np.float64],
) -> NDArray[np.float64]:
    output: NDArray[np.float64] = (
        softmax_weights(capped_scores(case, rows.query, key), case.sinks) @ value
    )
    return output


def _scale(largest: NDArray[np.float64], steps: float) -> NDArray[np.float64]:
    """Scale that brings the largest number to ``steps``; 1 where all are zero."""
    return np.where(largest == 0, 1.0, largest / steps)
