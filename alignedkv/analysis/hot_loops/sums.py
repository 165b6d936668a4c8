"""Sums over channels and over tokens of rows as their read planes tell them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.hot_loops.compiled import compiled, compiled_sums
from alignedkv.planes import WORD_BITS

#: "Unread bits" of a value row that is skipped, and of one that is used in its exact form.
SKIPPED = WORD_BITS
EXACT = -1
_HALF_WORDS = 2 ** (WORD_BITS - 1)


@compiled_sums
def prefix_products(
    words: NDArray[np.uint16],
    unit: NDArray[np.float64],
    queries: NDArray[np.float64],
    dither_products: NDArray[np.float64],
    classes: NDArray[np.int64],
    unread: NDArray[np.int64],
    out: NDArray[np.float64],
) -> None:
    """q'.k'(n) for every number n of planes: (2.2) of theory.md inside a dot product.

    Parameters
    ----------
    words : uint16 array [T, C]
    unit : float64 array [T]
        f.
    queries : float64 array [G, C]
        q'.
    dither_products : float64 array [P, G]
        C_s = q'.U_s.
    classes : int64 array [T]
    unread : int64 array [N]
        Bits that 1, 2, ... planes leave unread, 16 first to last.
    out : float64 array [N, G, T]
        Receives the products.
    """
    tokens, channels = words.shape
    planes, group = len(unread), len(queries)
    digits = np.empty(channels)
    halves = np.empty(group)
    for g in range(group):
        halves[g] = queries[g].sum()
    for t in range(tokens):
        above = WORD_BITS
        for n in range(planes):
            mask = (1 << (above - unread[n])) - 1
            for i in range(channels):
                digits[i] = (words[t, i] >> unread[n]) & mask
            step = 2.0 ** unread[n]
            for g in range(group):
                product = 0.0
                for i in range(channels):
                    product += queries[g, i] * digits[i]
                before = out[n - 1, g, t] if n > 0 else 0.0
                out[n, g, t] = before + step * product
            above = unread[n]
        for n in range(planes):
            offset = 2.0 ** (unread[n] - 1) - _HALF_WORDS
            for g in range(group):
                inner = out[n, g, t] + offset * halves[g] - dither_products[classes[t], g]
                out[n, g, t] = unit[t] * inner


class ValueRows(NamedTuple):
    """Stored values and what is read of each.

    Attributes
    ----------
    words : uint16 array [T, C]
    unit : float64 array [T]
        f.
    table : float64 array [P, C]
        Dither rows in units of a word's last bit.
    classes : int64 array [T]
    unread : int64 array [T]
        Bits of each row that are not read: `SKIPPED` and `EXACT` rows are not read at all.
    exact : float32 array [T, D]
        The rows themselves, before the mean was subtracted.
    mean : float64 array [D]
    """

    words: NDArray[np.uint16]
    unit: NDArray[np.float64]
    table: NDArray[np.float64]
    classes: NDArray[np.int64]
    unread: NDArray[np.int64]
    exact: NDArray[np.float32]
    mean: NDArray[np.float64]


@compiled
def _read_row(rows: ValueRows, t: int, row: NDArray[np.float64]) -> None:
    """Row t as its read planes tell it; zeros if it is skipped."""
    unread = rows.unread[t]
    if unread == SKIPPED:
        row[:] = 0.0
    elif unread == EXACT:
        for i in range(len(row)):
            row[i] = np.float64(rows.exact[t, i]) - rows.mean[i]
    else:
        unit, step, dither = rows.unit[t], 2.0**unread, rows.table[rows.classes[t]]
        for i in range(len(row)):
            cell = np.float64(rows.words[t, i] >> unread) + 0.5
            row[i] = unit * (cell * step - _HALF_WORDS - dither[i])


@compiled_sums
def weighted_rows(
    weights: NDArray[np.float64],
    rows: ValueRows,
    out: NDArray[np.float64],
) -> None:
    """Sum of w_t v'_t(n_t) over the tokens.

    Parameters
    ----------
    weights : float64 array [G, T]
    rows : ValueRows
    out : float64 array [G, D]
        Receives the sums.
    """
    group, tokens = weights.shape
    head_dim = out.shape[1]
    row = np.empty(head_dim)
    for t in range(tokens):
        if rows.unread[t] == SKIPPED:
            continue
        _read_row(rows, t, row)
        for g in range(group):
            weight = weights[g, t]
            for i in range(head_dim):
                out[g, i] += weight * row[i]


@compiled_sums
def weighted_exact_rows(
    weights: NDArray[np.float64], rows: NDArray[np.float32], out: NDArray[np.float64]
) -> None:
    """Sum of w_t v_t over the tokens, v exactly; weights [G, T], rows [T, D], out [G, D]."""
    group, tokens = weights.shape
    for t in range(tokens):
        for g in range(group):
            weight = weights[g, t]
            for i in range(out.shape[1]):
                out[g, i] += weight * rows[t, i]


@compiled_sums
def channel_deviations(
    linear: NDArray[np.float64],
    square: NDArray[np.float64],
    centre: NDArray[np.float64],
    slack: NDArray[np.float64],
    rows: ValueRows,
    out_linear: NDArray[np.float64],
    out_square: NDArray[np.float64],
) -> None:
    """Sums of w_t d_tj and of w_t d_tj^2, d_tj = |v'_tj(n_t) - c_j| + slack_t.

    Parameters
    ----------
    linear, square : float64 arrays [G, T]
        Weights of the two sums.
    centre : float64 array [G, D]
    slack : float64 array [T]
    rows : ValueRows
    out_linear, out_square : float64 arrays [G, D]
        Receive the sums.
    """
    group, tokens = linear.shape
    head_dim = centre.shape[1]
    row = np.empty(head_dim)
    for t in range(tokens):
        _read_row(rows, t, row)
        for g in range(group):
            first, second = linear[g, t], square[g, t]
            for i in range(head_dim):
                distance = abs(row[i] - centre[g, i]) + slack[t]
                out_linear[g, i] += first * distance
                out_square[g, i] += second * distance * distance


@compiled_sums
def threshold_tables(
    bins: NDArray[np.int64],
    linear: NDArray[np.float64],
    square: NDArray[np.float64],
    centre: NDArray[np.float64],
    rows: NDArray[np.float32],
    out_linear: NDArray[np.float64],
    out_square: NDArray[np.float64],
) -> None:
    """What leaving a plane unread adds to the sums of `channel_deviations`, by threshold.

    Parameters
    ----------
    bins : int64 array [N, T]
        Bin of the threshold from which on plane n + 2 is unread; the last row is for the error
        that remains when all planes are read.
    linear, square : float64 arrays [N, G, T]
        Weights that are added there.
    centre : float64 array [G, D]
    rows : float32 array [T, D]
        v, exactly.
    out_linear, out_square : float64 arrays [bins, G, D]
        Receive the sums.
    """
    steps, group, tokens = linear.shape
    head_dim = centre.shape[1]
    distance = np.empty(head_dim)
    for t in range(tokens):
        for g in range(group):
            for i in range(head_dim):
                distance[i] = abs(rows[t, i] - centre[g, i])
            n = 0
            while n < steps:
                # Planes that share a bin share one pass over the channels.
                slot = bins[n, t]
                first, second = linear[n, g, t], square[n, g, t]
                n += 1
                while n < steps and bins[n, t] == slot:
                    first += linear[n, g, t]
                    second += square[n, g, t]
                    n += 1
                into_linear, into_square = out_linear[slot, g], out_square[slot, g]
                for i in range(head_dim):
                    into_linear[i] += first * distance[i]
                    into_square[i] += second * distance[i] * distance[i]
