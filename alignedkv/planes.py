"""Digit planes: what a stored row is, what its first n planes say, and how wrong they can be.

A row ``x`` of ``D`` numbers becomes a bfloat16 scale ``g`` and ``D`` 16-bit words; a plane is a
slice of the bits of every word, most significant first.  Reading the first ``n`` planes fixes each
number to within ``half_step(n)`` (theory.md 2).  The subtractive dither that makes the errors of
different rows independent costs nothing at read time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import SpecError
from alignedkv.formats import bf16_bits_round_up, bf16_to_float32

#: Bits of a word: all planes of a layout together.
WORD_BITS = 16
#: Fraction bits of a dither entry (theory.md 2, remark 2): entries are integers in units of 2^-F.
DITHER_FRACTION_BITS = 4
#: Row scales are never smaller than this, so that ``g / 4096`` stays a normal float32 everywhere.
#: A row below it is stored with an error of at most half of this: absolute, and inside the bound.
SMALLEST_SCALE = 2.0**-100
#: Channels of a stored row come in multiples of this (the k extent of an int8 tensor-core product).
CHANNEL_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """How the 16 bits of a word are cut into planes, most significant first.

    Parameters
    ----------
    widths : tuple of int
        Bits of each plane; they sum to 16.  ``PlaneLayout.parse("4|2|2|8")`` reads the notation
        used throughout.

    Raises
    ------
    SpecError
        If a width is not positive or the widths do not sum to 16.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or sum(self.widths) != WORD_BITS:
            raise SpecError(
                f"plane widths {self.widths} are not a layout: give positive widths that sum to "
                f"{WORD_BITS}, such as 4|4|4|4, 4|4|8 or 4|2|2|8"
            )

    @classmethod
    def parse(cls, text: str) -> PlaneLayout:
        """``"4|4|8"`` -> ``PlaneLayout((4, 4, 8))``."""
        try:
            widths = tuple(int(part) for part in text.split("|"))
        except ValueError:
            raise SpecError(
                f"layout {text!r}: give widths separated by '|', such as 4|4|8"
            ) from None
        return cls(widths)

    def __str__(self) -> str:
        return "|".join(str(width) for width in self.widths)

    def __len__(self) -> int:
        return len(self.widths)

    def bits(self, planes: int) -> int:
        """Bits per channel in the first ``planes`` planes."""
        return sum(self.widths[:planes])

    def unread_bits(self, planes: int) -> int:
        """L of theory.md: bits of a word that ``planes`` planes leave unread."""
        return WORD_BITS - self.bits(planes)

    @property
    def scale_shift(self) -> int:
        """log2 of g/f: bits below the first plane (12 when it has four)."""
        return WORD_BITS - self.widths[0]

    @property
    def half_range(self) -> float:
        """Largest |x|/g that a row may hold: 7.5 for a first plane of four bits."""
        return ((1 << self.widths[0]) - 1) / 2

    def gain(self, planes: int) -> int:
        """log2 of the factor by which ``planes >= 1`` planes are finer than the first alone."""
        return self.bits(planes) - self.widths[0]


#: The layout that everything starts from: four planes of four bits.
DEFAULT_LAYOUT = PlaneLayout((4, 4, 4, 4))


def dither_class(token: NDArray[np.integer] | int, rows: int) -> NDArray[np.int64]:
    """Class ``s(t)``: the dither row of a token (theory.md 2).

    A block of ``rows`` consecutive tokens uses each row once, in an order that a fixed hash of the
    block number permutes, so that text repeating with a period that divides ``rows`` does not
    always meet the same row.

    Parameters
    ----------
    token : int array
        Position of the token in its sequence's cache.
    rows : int
        P, a power of two.
    """
    t = np.asarray(token, np.int64)
    block = t // rows
    mixed = (block * 0x9E3779B1) & 0xFFFFFFFF
    return (t % rows) ^ ((mixed >> 16) & (rows - 1))


def random_streams(seed: int) -> tuple[int, int, int]:
    """Seeds of the signs, the key dither and the value dither of one request.

    Three streams that no two requests share: Theorems 6 and 7 want the tables independent of each
    other and of the transform.
    """
    return 3 * seed, 3 * seed + 1, 3 * seed + 2


def dither_table(rows: int, channels: int, *, seed: int, layout: PlaneLayout) -> NDArray[np.int32]:
    """P independent dither rows, uniform on the grid (1.3) of theory.md.

    Returns
    -------
    int32 array [P, D]
        Entries in units of 2^-F of a word's last bit; int16 would hold them for first planes of
        four bits and more.
    """
    if rows < 1 or rows & (rows - 1):
        raise SpecError(f"{rows} dither rows: give a power of two, such as 64 or 256")
    half = 1 << (layout.scale_shift - 1 + DITHER_FRACTION_BITS)
    return np.random.default_rng(seed).integers(-half, half, (rows, channels), dtype=np.int32)


def padded_channels(head_dim: int) -> int:
    """Channels of a stored row: ``head_dim`` rounded up to a multiple of 32 (80 -> 96)."""
    return -(-head_dim // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitPlanes:
    """Rows stored as digit planes.

    Attributes
    ----------
    words : uint16 array [..., T, D]
        ``M + 32768`` of theory.md (2.1): offset binary, so a plane is a plain slice of its bits.
    scale_bits : uint16 array [..., T]
        g as bfloat16.
    dither : int32 array [..., T, D]
        The dither row of every token, in units of 2^-F.
    layout : PlaneLayout
    """

    words: NDArray[np.uint16]
    scale_bits: NDArray[np.uint16]
    dither: NDArray[np.int32]
    layout: PlaneLayout

    @property
    def scale(self) -> NDArray[np.float64]:
        """g, the step of the first plane [..., T]."""
        return bf16_to_float32(self.scale_bits).astype(np.float64)

    @property
    def unit(self) -> NDArray[np.float64]:
        """f = g / 2^scale_shift, the step of the last bit [..., T]."""
        return self.scale * 2.0**-self.layout.scale_shift

    @property
    def magnitude(self) -> NDArray[np.float64]:
        """Upper bound of every |x| in the row, from its scale alone [..., T]."""
        return self.scale * self.layout.half_range

    def half_step(self, planes: int) -> NDArray[np.float64]:
        """delta(n) [..., T]: largest error of a channel after ``planes`` planes (Lemma 1)."""
        if planes == 0:
            return self.magnitude
        return self.unit * 2.0 ** (self.layout.unread_bits(planes) - 1)

    def prefix(self, planes: int) -> NDArray[np.float64]:
        """The row as its first ``planes`` planes tell it, (2.2) of theory.md [..., T, D]."""
        if planes == 0:
            return np.zeros(self.words.shape)
        unread = self.layout.unread_bits(planes)
        cell = (self.words >> unread).astype(np.float64) + 0.5
        dither = self.dither * 2.0**-DITHER_FRACTION_BITS
        return self.unit[..., None] * (cell * 2.0**unread - 2.0 ** (WORD_BITS - 1) - dither)


def encode_rows(
    rows: NDArray[np.float32], dither: NDArray[np.int32], layout: PlaneLayout
) -> DigitPlanes:
    """Encode rows (2.1), in the float32 operations that every kernel repeats bit for bit.

    Parameters
    ----------
    rows : float32 array [..., T, D]
        Finite.  Keys after their transform, values minus their mean.
    dither : int32 array [..., T, D]
        The dither row of each token's class.
    layout : PlaneLayout

    Notes
    -----
    Two roundings per channel, the division by g and the sum with the dither: together at most 2^-8
    of the last bit (theory.md 2, "Rounding in the encoder").  Only they can leave the range of the
    words, hence the clip.
    """
    rows = np.asarray(rows, np.float32)
    largest = np.abs(rows).max(axis=-1)
    wanted = largest / np.float32(layout.half_range)
    scale_bits = bf16_bits_round_up(np.maximum(wanted, np.float32(SMALLEST_SCALE)))
    g = bf16_to_float32(scale_bits)[..., None]
    steps = (rows / g) * np.float32(2.0**layout.scale_shift)
    offset = dither.astype(np.float32) * np.float32(2.0**-DITHER_FRACTION_BITS)
    word = np.floor(steps + offset).astype(np.int64) + 2 ** (WORD_BITS - 1)
    words = np.clip(word, 0, 2**WORD_BITS - 1).astype(np.uint16)
    return DigitPlanes(words=words, scale_bits=scale_bits, dither=dither, layout=layout)


def row_bytes(channels: int, width: int) -> int:
    """Bytes of one row of a plane of ``width`` bits."""
    return channels * width // 8


def pack_plane(words: NDArray[np.uint16], layout: PlaneLayout, plane: int) -> NDArray[np.uint8]:
    """One plane (0 is the first) as bytes.  THE order of channels inside a row.

    A byte holds ``m = 8 / width`` channels that lie ``D / m`` apart: byte ``i`` holds channels
    ``i, i + D/m, i + 2 D/m, ...``, the first in its lowest bits.  So a 32-bit word masked with
    ``0x0f0f0f0f`` is four neighbouring channels of the lower half of the row, ready for an int8
    tensor-core product.

    Parameters
    ----------
    words : uint16 array [..., D]
    plane : int
        Its width must divide 8 (the analysis alone also counts other widths).

    Returns
    -------
    uint8 array [..., D * width / 8]
    """
    width, per_byte, stride = _packing(layout, plane, words.shape[-1])
    digits = (words >> layout.unread_bits(plane + 1)) & (2**width - 1)
    packed = np.zeros((*words.shape[:-1], stride), np.uint8)
    for k in range(per_byte):
        part = digits[..., k * stride : (k + 1) * stride].astype(np.uint8)
        packed |= part << np.uint8(width * k)
    return packed


def unpack_plane(packed: NDArray[np.uint8], layout: PlaneLayout, plane: int) -> NDArray[np.uint16]:
    """Undo `pack_plane`: the plane's bits at their place in the word, all others zero [..., D]."""
    channels = packed.shape[-1] * 8 // layout.widths[plane]
    width, per_byte, _ = _packing(layout, plane, channels)
    parts = [(packed >> np.uint8(width * k)) & np.uint8(2**width - 1) for k in range(per_byte)]
    digits = np.concatenate(parts, axis=-1).astype(np.uint16)
    return digits << np.uint16(layout.unread_bits(plane + 1))


def _packing(layout: PlaneLayout, plane: int, channels: int) -> tuple[int, int, int]:
    width = layout.widths[plane]
    if 8 % width:
        raise SpecError(
            f"plane {plane} of {layout} is {width} bits wide and cannot be packed into bytes: "
            "kernels take planes of 1, 2, 4 or 8 bits"
        )
    per_byte = 8 // width
    if channels % per_byte:
        raise SpecError(f"{channels} channels do not fill bytes of {per_byte} channels each")
    return width, per_byte, channels // per_byte
