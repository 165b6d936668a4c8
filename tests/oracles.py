"""Slow and obviously right: scalar twins of the storage format, and exact attention.

Nothing here is shared with the package but the facts of float formats, which `test_formats` holds
to ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from alignedkv.formats import BF16, FP32
from rational import round_scalar

WORD_BITS = 16
HALF = 2 ** (WORD_BITS - 1)
DITHER_DENOMINATOR = 16
SMALLEST_SCALE = Fraction(1, 2**100)


def fl32(x: Fraction) -> Fraction:
    """Rounded to float32."""
    return Fraction(round_scalar(FP32, x))


def scale_of(row: Sequence[float], first_width: int) -> Fraction:
    """g: a / half range, rounded to float32, then up to bfloat16; at least 2^-100."""
    largest = max(abs(Fraction(float(x))) for x in row)
    wanted = max(fl32(largest / Fraction(2**first_width - 1, 2)), SMALLEST_SCALE)
    quantum = Fraction(BF16.smallest_subnormal)
    while wanted > quantum * (2**BF16.precision - 1):
        quantum *= 2
    return -(-wanted // quantum) * quantum


def words_of(row: Sequence[float], dither: Sequence[int], widths: Sequence[int]) -> list[int]:
    """(2.1) of theory.md in float32, one operation at a time."""
    scale = scale_of(row, widths[0])
    words = []
    for x, u in zip(row, dither, strict=True):
        steps = fl32(Fraction(float(x)) / scale) * 2 ** (WORD_BITS - widths[0])
        cell = fl32(steps + Fraction(int(u), DITHER_DENOMINATOR))
        words.append(min(max(cell.numerator // cell.denominator + HALF, 0), 2**WORD_BITS - 1))
    return words


def prefix_of(
    words: Sequence[int], dither: Sequence[int], scale: Fraction, widths: Sequence[int], planes: int
) -> list[Fraction]:
    """(2.2) of theory.md, digit by digit: each stands for the middle of its cell."""
    unit = scale / 2 ** (WORD_BITS - widths[0])
    result = []
    for word, u in zip(words, dither, strict=True):
        total, unread = Fraction(0), WORD_BITS
        for width in widths[:planes]:
            unread -= width
            digit = (word >> unread) % 2**width
            total += (digit - Fraction(2**width - 1, 2)) * 2**unread
        result.append(unit * (total - Fraction(int(u), DITHER_DENOMINATOR)) if planes else unit * 0)
    return result


def packed_of(words: Sequence[int], widths: Sequence[int], plane: int) -> list[int]:
    """Bytes of one plane: byte i holds channels i, i + D/m, ... from its lowest bits up."""
    width = widths[plane]
    unread = WORD_BITS - sum(widths[: plane + 1])
    stride = len(words) * width // 8
    digits = [(word >> unread) % 2**width for word in words]
    return [
        sum(digits[i + k * stride] << (width * k) for k in range(8 // width)) for i in range(stride)
    ]


def hadamard_matrix(size: int) -> NDArray[np.float64]:
    """Sylvester's matrix of order ``size``, a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Exact attention of some heads: output [..., D], log_z [...]."""

    output: NDArray[np.float64]
    log_z: NDArray[np.float64]


def attention(
    query: NDArray[np.float64],
    keys: NDArray[np.float64],
    values: NDArray[np.float64],
    *,
    scaling: float,
    start: int = 0,
    length: int | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: NDArray[np.float64] | None = None,
) -> Exact:
    """Attention of the heads [G, D] of one KV head [T, D] in float64, masks and all."""
    length = len(keys) if length is None else length
    begin = max(start, length - window) if window else start
    k, v = keys[begin:length].astype(np.float64), values[begin:length].astype(np.float64)
    scores = scaling * query.astype(np.float64) @ k.T
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if sinks is not None:
        scores = np.concatenate([scores, np.asarray(sinks, np.float64)[:, None]], axis=1)
        v = np.concatenate([v, np.zeros((1, v.shape[1]))])
    if not scores.shape[1]:
        return Exact(output=np.zeros(query.shape), log_z=np.full(len(query), -np.inf))
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1)
    return Exact(output=weights @ v / total[:, None], log_z=top[:, 0] + np.log(total))
