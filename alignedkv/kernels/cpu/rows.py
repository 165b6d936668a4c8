"""Rows on the CPU: encoding them, and where they lie.

Encoding repeats `KeyTransform.keys` and `encode_rows` operation by operation, in float32 and
without contraction, so that its bits are theirs.
"""

from __future__ import annotations

import numba
import numpy as np

from alignedkv.kernels.cpu.compiled import compiled, parallel
from alignedkv.kernels.storage import LOST_SCALE
from alignedkv.planes import SMALLEST_SCALE

_SMALLEST = np.float32(SMALLEST_SCALE)
_HALF_RANGE = np.float32(7.5)
_UNITS = np.float32(4096.0)
_DITHER_UNIT = np.float32(2.0**-4)
_LOWEST, _HIGHEST = np.float32(-32768), np.float32(32767)
_CLASS_SPREAD = 0x9E3779B1
#: Rows that one task of `encode` takes.
ROWS_PER_TASK = 64


@compiled
def row_of(block_table, page, heads, capacity, b, h, t):
    """THE address function of the CPU kernels (`storage.row_addresses`)."""
    if page == 0:
        return (np.int64(b) * heads + h) * capacity + t
    return (np.int64(block_table[b, t // page]) * heads + h) * page + t % page


@compiled
def class_of(t, rows):
    """`planes.dither_class`."""
    mixed = ((t // rows) * _CLASS_SPREAD) & 0xFFFFFFFF
    return (t % rows) ^ ((mixed >> 16) & (rows - 1))


@compiled
def butterfly(row, block):
    """Unnormalised Walsh-Hadamard transform of each block, in place: `transform.hadamard`."""
    distance = 1
    while distance < block:
        for start in range(0, len(row), 2 * distance):
            for i in range(start, start + distance):
                low, high = row[i], row[i + distance]
                row[i], row[i + distance] = low + high, low - high
        distance *= 2


@compiled
def _scale_bits(row):
    """bfloat16 bits of the row scale, (2.1)."""
    largest = np.float32(0)
    for x in row:
        largest = max(largest, abs(x))
    wanted = max(np.float32(largest / _HALF_RANGE), _SMALLEST)
    return (np.int64(np.float32(wanted).view(np.uint32)) + 0xFFFF) >> 16


@compiled
def _write_row(row, dither, planes, widths, address):
    """Encode one row into its planes and return the bits of its scale."""
    bits = _scale_bits(row)
    scale = np.uint32(bits << 16).view(np.float32)
    channels = len(row)
    words = np.empty(channels, np.int64)
    for i in range(channels):
        steps = np.float32(row[i] / scale) * _UNITS
        cell = np.floor(steps + np.float32(dither[i]) * _DITHER_UNIT)
        cell = min(max(cell, _LOWEST), _HIGHEST)
        words[i] = np.int64(cell) + 32768
    unread = 16
    for n in range(len(widths)):
        width = widths[n]
        if width == 0:
            break
        unread -= width
        stride = channels * width // 8
        for i in range(stride):
            byte = 0
            for k in range(8 // width):
                digit = (words[i + k * stride] >> unread) & ((1 << width) - 1)
                byte |= digit << (width * k)
            planes[n][address, i] = np.uint8(byte)
    return bits


@parallel
def encode(
    keys,  # float32 [B, Hkv, S, D]
    values,  # float32 [B, Hkv, S, D]
    key_mean,  # float32 [B, Hkv, D]
    balance,  # float32 [B, Hkv, D]
    value_mean,  # float32 [B, Hkv, D]
    signs,  # float32 [C]
    block,  # channels of a Hadamard block
    dither,  # int16 [2, P, C]
    key_planes,  # 4 x uint8 [rows, bytes]
    value_planes,  # 4 x uint8 [rows, bytes]
    widths,  # 4 x int, 0 where a plane is not stored
    scales,  # uint32 [rows]
    block_table,  # int32 [B, pages]
    page,  # tokens of a page, 0 for contiguous storage
    capacity,  # tokens, where contiguous
    lengths,  # int32 [B]
):
    """Write rows behind each sequence's length.

    Returns
    -------
    uint8 array [2, B, Hkv, S]
        1 where a key (0) or value (1) row is not finite once centred; zeros were encoded for it,
        under `storage.LOST_SCALE`.
    """
    batch, heads, count, head_dim = keys.shape
    channels = len(signs)
    lost = np.zeros((2, batch, heads, count), np.uint8)
    pieces = (count + ROWS_PER_TASK - 1) // ROWS_PER_TASK
    for task in numba.prange(batch * heads * pieces):
        b, h, piece = task // pieces // heads, task // pieces % heads, task % pieces
        row = np.zeros(channels, np.float32)
        gain = np.empty(head_dim, np.float32)
        for i in range(head_dim):
            gain[i] = np.float32(1.0 / block) / balance[b, h, i]
        for s in range(ROWS_PER_TASK * piece, min(ROWS_PER_TASK * (piece + 1), count)):
            t = np.int64(lengths[b]) + s
            address = row_of(block_table, page, heads, capacity, b, h, t)
            own = class_of(t, dither.shape[1])
            for i in range(head_dim):
                scaled = np.float32(keys[b, h, s, i] * gain[i])
                centred = np.float32(scaled - np.float32(key_mean[b, h, i] * gain[i]))
                row[i] = np.float32(centred * signs[i])
            row[head_dim:] = 0
            butterfly(row, block)
            lost[0, b, h, s] = _clear_if_lost(row)
            bits = _write_row(row, dither[0, own], key_planes, widths, address)
            key_bits = LOST_SCALE if lost[0, b, h, s] else bits
            for i in range(head_dim):
                row[i] = np.float32(values[b, h, s, i] - value_mean[b, h, i])
            row[head_dim:] = 0
            lost[1, b, h, s] = _clear_if_lost(row)
            bits = _write_row(row, dither[1, own], value_planes, widths, address)
            value_bits = LOST_SCALE if lost[1, b, h, s] else bits
            scales[address] = np.uint32(key_bits | (value_bits << 16))
    return lost


@compiled
def _clear_if_lost(row):
    for x in row:
        if not np.isfinite(x):
            row[:] = 0
            return 1
    return 0
