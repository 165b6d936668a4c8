"""Float planes, the layout of the AlignedKV paper: a 16-bit float cut into planes as it stands.

The first bits of a float are sign and exponent, so a prefix has *relative* precision: five of the
eight bits of fp16's first plane say what the row's other numbers make useless (theory.md 2, "Float
planes").  `alignedkv.planes` is what this package stores instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.errors import SpecError
from alignedkv.formats import BF16, FP16, FloatFormat, bf16_to_float32, float32_to_bf16_bits
from alignedkv.planes import PlaneLayout

#: The layout of the paper.
PAPER_LAYOUT = PlaneLayout((8, 4, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatPlanes:
    """Numbers of a 16-bit format as planes of their bit patterns.

    Attributes
    ----------
    words : uint16 array [...]
        Bit patterns of finite numbers.
    number_format : FloatFormat
        FP16 or BF16.
    layout : PlaneLayout
    """

    words: NDArray[np.uint16]
    number_format: FloatFormat
    layout: PlaneLayout

    def prefix(self, planes: int) -> NDArray[np.float64]:
        """The numbers as their first ``planes`` planes tell them, float64 [...].

        The unread bits are taken for the middle of their range: a one and zeros.  Without planes
        nothing is known, and 0 is returned.
        """
        if planes == 0:
            return np.zeros(self.words.shape)
        return self._value(self._codes(planes)[1])

    def half_step(self, planes: int) -> NDArray[np.float64]:
        """Largest error of each number after ``planes >= 1`` planes, float64 [...].

        Notes
        -----
        ``2^(e - m - 1)`` where the prefix holds the exponent e and m fraction bits; attained. Of a
        bfloat16 number eight bits lack the last bit of the exponent, and the error is a binade.
        """
        lowest, middle, highest = (self._value(code) for code in self._codes(planes))
        return np.maximum(np.abs(middle - lowest), np.abs(highest - middle))

    def _codes(self, planes: int) -> tuple[NDArray[np.uint16], ...]:
        """First, middle and last pattern that share the prefix; none beyond the largest number."""
        unread = self.layout.unread_bits(planes)
        low_bits = np.uint16((1 << unread) - 1)
        middle_bit = np.uint16((1 << unread) >> 1)
        lowest = self.words & ~low_bits
        sign = self.words & np.uint16(0x8000)
        largest = sign | np.uint16(self.number_format.code_of_max)
        return (
            lowest,
            np.minimum(lowest | middle_bit, largest),
            np.minimum(lowest | low_bits, largest),
        )

    def _value(self, codes: NDArray[np.uint16]) -> NDArray[np.float64]:
        if self.number_format == FP16:
            return codes.view(np.float16).astype(np.float64)
        return bf16_to_float32(codes).astype(np.float64)


def encode_floats(
    rows: ArrayLike, number_format: FloatFormat = FP16, layout: PlaneLayout = PAPER_LAYOUT
) -> FloatPlanes:
    """Round numbers to a 16-bit format, to nearest, and cut them into planes.

    Parameters
    ----------
    rows : float array [...]
    number_format : FloatFormat
        FP16 or BF16.
    layout : PlaneLayout

    Raises
    ------
    SpecError
        If the format is another one, or a number is NaN, infinite or too large for it.
    """
    numbers = np.asarray(rows)
    with np.errstate(over="ignore"):
        if number_format == FP16:
            words = numbers.astype(np.float16).view(np.uint16)
        elif number_format == BF16:
            words = float32_to_bf16_bits(numbers.astype(np.float32))
        else:
            raise SpecError(f"float planes of {number_format.name}: give float16 or bfloat16")
    magnitudes = words & np.uint16(0x7FFF)
    if (magnitudes > number_format.code_of_max).any():
        culprit = numbers[magnitudes > number_format.code_of_max].flat[0]
        raise SpecError(
            f"{culprit} is no finite {number_format.name}; give numbers up to "
            f"{number_format.max:.4g}"
        )
    return FloatPlanes(words=words, number_format=number_format, layout=layout)
