"""Rows to words: the key transform, row scales, digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.hot_loops.compiled import compiled, compiled_sums
from alignedkv.planes import WORD_BITS

_HALF_WORDS = 2 ** (WORD_BITS - 1)
_LARGEST_WORD = 2**WORD_BITS - 1


@compiled
def transform_rows(
    rows: NDArray[np.float32],
    gain: NDArray[np.float32],
    mean: NDArray[np.float32],
    page: int,
    signs: NDArray[np.float32],
    block: int,
    out: NDArray[np.float32],
) -> None:
    """`KeyTransform.keys`, one row at a time.

    Parameters
    ----------
    rows : float32 array [T, D]
    gain : float32 array [D]
    mean : float32 array [pages, D]
    page : int
        Tokens of a page.
    signs : float32 array [C]
    block : int
    out : float32 array [T, C]
        Receives the result.
    """
    tokens, head_dim = rows.shape
    channels = out.shape[1]
    for t in range(tokens):
        centre = mean[t // page]
        row = out[t]
        for i in range(head_dim):
            row[i] = (rows[t, i] * gain[i] - centre[i] * gain[i]) * signs[i]
        for i in range(head_dim, channels):
            row[i] = 0
        distance = 1
        while distance < block:
            for start in range(0, channels, 2 * distance):
                for i in range(start, start + distance):
                    low, high = row[i], row[i + distance]
                    row[i], row[i + distance] = low + high, low - high
            distance *= 2


@compiled_sums
def row_magnitudes(rows: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Largest |x| of every row [T]."""
    for t in range(len(rows)):
        largest = np.float32(0)
        for i in range(rows.shape[1]):
            largest = max(largest, abs(rows[t, i]))
        out[t] = largest


@compiled
def encode_words(
    rows: NDArray[np.float32],
    scale: NDArray[np.float32],
    table: NDArray[np.float32],
    classes: NDArray[np.int64],
    scale_shift: int,
    words: NDArray[np.uint16],
) -> None:
    """Words of (2.1), `planes.encode_rows` after its scale; channels that rows lack are zeros.

    Parameters
    ----------
    rows : float32 array [T, D]
    scale : float32 array [T]
        g.
    table : float32 array [P, C]
        Dither rows in units of a word's last bit.
    classes : int64 array [T]
    scale_shift : int
        log2(g / f).
    words : uint16 array [T, C]
        Receives the result.
    """
    tokens, head_dim = rows.shape
    factor = np.float32(2.0**scale_shift)
    for t in range(tokens):
        g = scale[t]
        dither = table[classes[t]]
        for i in range(words.shape[1]):
            steps = (rows[t, i] / g) * factor if i < head_dim else np.float32(0)
            word = np.int64(np.floor(steps + dither[i])) + _HALF_WORDS
            words[t, i] = min(max(word, 0), _LARGEST_WORD)
