"""Device functions on rows: where they lie, their scales, digits, classes and dtypes.

Factories take what a spec fixes and close over it, so that Numba sees constants: widths become
shifts and masks, planes that are not stored and dtypes that do not occur vanish.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels.sampling import DRAW_BITS, MIX_1, MIX_2, SPREAD
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import DITHER_FRACTION_BITS

device = cuda.jit(device=True)

_CLASS_SPREAD = 0x9E3779B1
_MASK = np.uint64(0xFFFFFFFF)
_SPREAD, _MIX_1, _MIX_2 = np.uint64(SPREAD), np.uint64(MIX_1), np.uint64(MIX_2)
_UNDRAWN = np.uint64(32 - DRAW_BITS)
_SHIFT_13, _SHIFT_16 = np.uint64(13), np.uint64(16)


@device
def bfloat16(bits):
    """float32 of 16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def loader(dtype: str) -> Any:
    """Element of an array of a named dtype -> float64."""
    if dtype == "bfloat16":

        @device
        def load(x):
            return np.float64(bfloat16(x))

    else:

        @device
        def load(x):
            return np.float64(np.float32(x))

    return load


def rounder(dtype: str) -> Any:
    """float64 -> what to store into an array of a named dtype, rounded to float32 on the way."""
    if dtype == "bfloat16":

        @device
        def rounded(x):
            bits = np.int64(np.float32(x).view(np.uint32))
            if x != x:
                return np.uint16((bits >> 16) | 0x40)
            return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

    else:

        @device
        def rounded(x):
            return np.float32(x)

    return rounded


def address_function(page_tokens: int | None) -> Any:
    """THE address function of these kernels (`storage.row_addresses`)."""
    if page_tokens is None:

        @device
        def row_of(cache, home, t):
            return np.int64(home) * cache.capacity + t

    else:

        @device
        def row_of(cache, home, t):
            b, h = home // cache.kv_heads, home % cache.kv_heads
            page = np.int64(cache.block_table[b, t // page_tokens])
            return (page * cache.kv_heads + h) * page_tokens + t % page_tokens

    return row_of


def class_function(rows: int) -> Any:
    """`planes.dither_class` of one token."""

    @device
    def class_of(t):
        mixed = ((t // rows) * _CLASS_SPREAD) & 0xFFFFFFFF
        return (t % rows) ^ ((mixed >> 16) & (rows - 1))

    return class_of


def member_function(rows: int) -> Any:
    """The token of a class in a block of P tokens: the other way round."""

    @device
    def member_of(block, own):
        mixed = (block * _CLASS_SPREAD) & 0xFFFFFFFF
        return block * rows + (own ^ ((mixed >> 16) & (rows - 1)))

    return member_of


@device
def token_range(cache, home, window):
    """First attended token of a home, and the one after the last."""
    b = home // cache.kv_heads
    start, length = np.int64(cache.starts[b]), np.int64(cache.lengths[b])
    if window > 0:
        start = max(start, length - window)
    return min(start, length), length


def product_function(spec: DecodeSpec, plane: int) -> Any:
    """Product of one plane of a key row with G queries, as steps of g.

    Eight (of a width w: 32/w) products are summed in float32, such words in float64:
    `arithmetic.numba_cuda` counts on that.
    """
    width = spec.layout.widths[plane]
    group, digits_in_word, per_byte = spec.subgroup, 32 // width, 8 // width
    words, stride = spec.channels * width // 32, spec.channels * width // 8
    mask = (1 << width) - 1
    middle = np.float32(mask / 2)
    finer = 2.0 ** -spec.layout.gain(plane + 1)

    @device
    def add_product(plane, row, queries, out):
        """``out[g] += digits . queries[g]``, digits as distances from the middle of the cell."""
        digits = cuda.local.array(digits_in_word, np.float32)
        for j in range(words):
            word = np.int64(plane[row, j])
            for b in range(4):
                for k in range(per_byte):
                    digit = (word >> (8 * b + width * k)) & mask
                    digits[b * per_byte + k] = np.float32(digit) - middle
            for g in range(group):
                part = np.float32(0)
                for b in range(4):
                    for k in range(per_byte):
                        channel = 4 * j + b + k * stride
                        part += digits[b * per_byte + k] * queries[g, channel]
                out[g] += np.float64(part) * finer

    return add_product


def _digit_function(spec: DecodeSpec, plane: int) -> Any:
    width = spec.layout.widths[plane]
    stride, mask = spec.channels * width // 8, (1 << width) - 1
    middle, finer = np.float32(mask / 2), np.float32(2.0 ** -spec.layout.gain(plane + 1))

    @device
    def digit_of(plane, row, channel):
        byte = np.int64(plane[row, channel % stride])
        digit = (byte >> (width * (channel // stride))) & mask
        return (np.float32(digit) - middle) * finer

    return digit_of


def prefix_function(spec: DecodeSpec) -> Any:
    """One channel of a value row after ``count`` planes, in steps of g: exact in float32.

    The prefix takes 17 bits and the dither of its class 20, all of them multiples of 2^-16.
    """
    stored = spec.stored_planes
    first, second = (_digit_function(spec, n) for n in (0, 1))
    third, fourth = (_digit_function(spec, min(n, stored - 1)) for n in (2, 3))
    unit = np.float32(2.0 ** -(DITHER_FRACTION_BITS + spec.layout.scale_shift))

    @device
    def prefix_of(planes, row, count, dither, own, channel):
        x = first(planes[0], row, channel)
        if count > 1:
            x += second(planes[1], row, channel)
        if stored > 2:  # noqa: SIM102 - Numba prunes what is constant alone
            if count > 2:
                x += third(planes[2], row, channel)
        if stored > 3:  # noqa: SIM102
            if count > 3:
                x += fourth(planes[3], row, channel)
        return x - np.float32(dither[1, own, channel]) * unit

    return prefix_of


@device
def mix(word):
    """`sampling.mix` of one word."""
    word = word ^ (word >> _SHIFT_16)
    word = (word * _MIX_1) & _MASK
    word = word ^ (word >> _SHIFT_13)
    word = (word * _MIX_2) & _MASK
    return word ^ (word >> _SHIFT_16)


@device
def stream_key(seed, step, home):
    """`sampling.stream_key`."""
    word = mix((np.uint64(seed) + _SPREAD) & _MASK) ^ (np.uint64(step) & _MASK)
    return mix(mix(word) ^ (np.uint64(home) & _MASK))


@device
def draw(key, t):
    """`sampling.draws` of one token."""
    word = ((np.uint64(t) * _SPREAD) & _MASK) ^ key
    return np.int64(mix(word) >> _UNDRAWN)
