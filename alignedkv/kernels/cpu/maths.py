"""Exponentials, logarithms and digits, in forms that LLVM turns into vector code.

Callers may have their sums reordered (`compiled.fast`), and LLVM then reorders across an inlined
call as well: nothing here may depend on the order of two additions, so no magic numbers that round.

Accuracies are stated where they enter a bound or a tie; `tests/kernels/test_cpu.py` measures them.
"""

from __future__ import annotations

import numpy as np

from alignedkv.kernels.cpu.compiled import compiled, fast

LOG2_E = 1.4426950408889634
#: ln 2 in two parts, the first with zeros at the end, so that k times it is exact.
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
#: Fields of a double.
_FRACTION_MASK, _ONE_BITS, _BIAS = 0xFFFFFFFFFFFFF, 0x3FF0000000000000, 1023
#: log2(1 + t) as a quartic on [0, 1], exact at both ends: error below 2^-12.
_LOG = (1.4383793298276428, -0.6758806548950589, 0.31815448354653536, -0.08065315847911925)


@compiled
def exp(x: float) -> float:
    """e^x with a relative error below 2^-36; 0 below -708, inf above 709, NaN for NaN."""
    clipped = max(x, -708.0)
    clipped = min(clipped, 709.0)
    whole = np.floor(clipped * LOG2_E + 0.5)
    r = (clipped - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = 1 / 40320 + r * (1 / 362880)
    series = 1 / 720 + r * (1 / 5040 + r * series)
    series = 1 / 24 + r * (1 / 120 + r * series)
    series = 1.0 + r * (1.0 + r * (0.5 + r * (1 / 6 + r * series)))
    power = np.int64((np.int64(np.int32(whole)) + _BIAS) << 52).view(np.float64)
    result = series * power
    result = 0.0 if x < -708.0 else result
    result = np.inf if x > 709.0 else result
    return result if x == x else x


@compiled
def expm1(x: float) -> float:
    """e^x - 1 for x >= 0, with a relative error below 2^-22."""
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6)))))
    return series if x < 0.3 else exp(x) - 1.0


@compiled
def log2(x: float) -> float:
    """log2 of a positive double, with an error below 2^-12; -1023 for 0.

    For plans only: a tie may fall either way (theory.md 6).
    """
    bits = np.float64(x).view(np.int64)
    exponent = np.float64(np.int32(bits >> 52)) - _BIAS
    t = np.int64((bits & _FRACTION_MASK) | _ONE_BITS).view(np.float64) - 1.0
    return exponent + t * (_LOG[0] + t * (_LOG[1] + t * (_LOG[2] + t * _LOG[3])))


@fast
def scale(numbers, factor):
    """Multiply a contiguous array of any shape in place; by 0, clear it.

    Explicit loops compile ten times faster than slices do.
    """
    flat = numbers.ravel()
    for i in range(flat.size):
        flat[i] = flat[i] * factor if factor != 0 else 0.0


@fast
def add_scaled(numbers, factor, out):
    """``out += factor numbers`` for contiguous arrays of equal size."""
    source, target = numbers.ravel(), out.ravel()
    for i in range(target.size):
        target[i] += factor * source[i]


# Digits.  A plane's digit moves the middle of a cell to that of the finer cell it names.  One loop
# for each width, because a shift by a variable is no vector instruction; and the number of bytes is
# an argument, because LLVM does not vectorise up to a bound that it has to load.


@compiled
def first_digits(plane, row, out, slot):
    """The first plane of a row, four bits wide, as cell middles -7.5 .. 7.5: steps of g.

    Parameters
    ----------
    plane : uint8 array [rows, C / 2]
    row, slot : int
        From this row to ``out[slot]``.
    out : float32 array [slots, C]
    """
    _set_nibbles(plane, row, np.float32(1.0), out, slot, plane.shape[1])


@compiled
def prefix_digits(planes, widths, row, count, out, slot):
    """The first ``count`` planes of a row as cell middles in units f, dither not subtracted."""
    unread = 12
    _set_nibbles(planes[0], row, np.float32(1 << unread), out, slot, planes[0].shape[1])
    for n in range(1, count):
        unread -= widths[n]
        step, stride = np.float32(1 << unread), planes[n].shape[1]
        if widths[n] == 4:
            _add_nibbles(planes[n], row, step, out, slot, stride)
        elif widths[n] == 2:
            _add_pairs(planes[n], row, step, out, slot, stride)
        else:
            _add_bytes(planes[n], row, step, out, slot, stride)


@fast
def _set_nibbles(plane, row, step, out, slot, stride):
    for i in range(stride):
        byte = np.int32(plane[row, i])
        low = np.float32(np.int32(byte & np.int32(15))) - np.float32(7.5)
        high = np.float32(np.int32(byte >> np.int32(4))) - np.float32(7.5)
        out[slot, i] = low * step
        out[slot, i + stride] = high * step


@fast
def _add_nibbles(plane, row, step, out, slot, stride):
    for i in range(stride):
        byte = np.int32(plane[row, i])
        low = np.float32(np.int32(byte & np.int32(15))) - np.float32(7.5)
        high = np.float32(np.int32(byte >> np.int32(4))) - np.float32(7.5)
        out[slot, i] += low * step
        out[slot, i + stride] += high * step


@fast
def _add_pairs(plane, row, step, out, slot, stride):
    for i in range(stride):
        byte = np.int32(plane[row, i])
        first = np.float32(np.int32(byte & np.int32(3))) - np.float32(1.5)
        second = np.float32(np.int32((byte >> np.int32(2)) & np.int32(3))) - np.float32(1.5)
        third = np.float32(np.int32((byte >> np.int32(4)) & np.int32(3))) - np.float32(1.5)
        fourth = np.float32(np.int32(byte >> np.int32(6))) - np.float32(1.5)
        out[slot, i] += first * step
        out[slot, i + stride] += second * step
        out[slot, i + 2 * stride] += third * step
        out[slot, i + 3 * stride] += fourth * step


@fast
def _add_bytes(plane, row, step, out, slot, stride):
    for i in range(stride):
        out[slot, i] += (np.float32(np.int32(plane[row, i])) - np.float32(127.5)) * step


@fast
def dot(queries, g, rows, slot):
    """Product of ``queries[g]`` and ``rows[slot]`` in float32, in any order."""
    total = np.float32(0)
    for i in range(rows.shape[1]):
        total += queries[g, i] * rows[slot, i]
    return np.float64(total)


@fast
def dot_double(queries, g, rows, slot):
    """`dot` in float64."""
    total = 0.0
    for i in range(rows.shape[1]):
        total += np.float64(queries[g, i]) * np.float64(rows[slot, i])
    return total


@fast
def add_rows(weights, rows, count, out):
    """``out[g] += sum_r weights[g, r] rows[r]`` in float32, four rows at a time.

    Parameters
    ----------
    weights : float32 array [G, slots]
        0 from ``count`` to the next multiple of four.
    rows : float32 array [slots, C]
    count : int
    out : float32 array [G, C]
    """
    for r in range(0, count, 4):
        for g in range(out.shape[0]):
            a, b, c, d = weights[g, r], weights[g, r + 1], weights[g, r + 2], weights[g, r + 3]
            for i in range(out.shape[1]):
                left = a * rows[r, i] + b * rows[r + 1, i]
                out[g, i] += left + (c * rows[r + 2, i] + d * rows[r + 3, i])
