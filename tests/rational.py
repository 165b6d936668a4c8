"""Floating-point arithmetic in exact rationals: what the bounds on it are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from hypothesis import strategies as st

from alignedkv.formats import FloatFormat

#: u = 2^-5: with so few bits every rounding matters. No sum in the tests overflows.
TOY = FloatFormat(name="toy", bits=11, precision=5)


def exact_sum(x: Sequence[float]) -> Fraction:
    return sum(map(Fraction, x), Fraction(0))


def exact_dot(x: Sequence[float], y: Sequence[float]) -> Fraction:
    return sum((Fraction(a) * Fraction(b) for a, b in zip(x, y, strict=True)), Fraction(0))


def round_scalar(number_format: FloatFormat, x: float | Fraction) -> float:
    """Round one number to the format in exact rational arithmetic: slow and obviously right.

    Parameters
    ----------
    number_format : FloatFormat
    x : float or Fraction
        A Fraction is any rational number, rounded once.

    Returns
    -------
    float
        What `round_to` returns for the same number, bit for bit.
    """
    if isinstance(x, float) and not math.isfinite(x):
        saturates = math.isinf(x) and not number_format.has_infinity
        return math.copysign(number_format.max, x) if saturates else x
    sign = math.copysign(1.0, x)
    magnitude = abs(Fraction(x))

    quantum = Fraction(number_format.smallest_subnormal)
    while magnitude >= quantum * 2**number_format.precision:
        quantum *= 2
    nearest = round(magnitude / quantum) * quantum  # round() of a Fraction: ties to even

    if nearest > Fraction(number_format.max):
        beyond = math.inf if number_format.has_infinity else number_format.max
        return sign * beyond
    return sign * float(nearest)


def rounded(number_format: FloatFormat, x: Fraction) -> Fraction:
    return Fraction(round_scalar(number_format, x))


def recursive_sum(number_format: FloatFormat, x: Sequence[float | Fraction]) -> Fraction:
    total = Fraction(x[0])
    for addend in x[1:]:
        total = rounded(number_format, total + Fraction(addend))
    return total


def pairwise_sum(number_format: FloatFormat, x: Sequence[float | Fraction]) -> Fraction:
    if len(x) == 1:
        return Fraction(x[0])
    half = 1 << ((len(x) - 1).bit_length() - 1)
    left, right = pairwise_sum(number_format, x[:half]), pairwise_sum(number_format, x[half:])
    return rounded(number_format, left + right)


def chunked_sum(number_format: FloatFormat, x: Sequence[float], chunk: int) -> Fraction:
    starts = range(0, len(x), chunk)
    return recursive_sum(
        number_format, [recursive_sum(number_format, x[i : i + chunk]) for i in starts]
    )


def dot(number_format: FloatFormat, x: Sequence[float], y: Sequence[float]) -> Fraction:
    """Products rounded, then added recursively."""
    return recursive_sum(
        number_format,
        [rounded(number_format, Fraction(a) * Fraction(b)) for a, b in zip(x, y, strict=True)],
    )


def fused_dot(number_format: FloatFormat, x: Sequence[float], y: Sequence[float]) -> Fraction:
    """Fused multiply-add: one rounding per term."""
    total = Fraction(0)
    for a, b in zip(x, y, strict=True):
        total = rounded(number_format, total + Fraction(a) * Fraction(b))
    return total


def truncated_mma(
    accumulator: float, products: Sequence[Fraction], precision: int, alignment_bits: int
) -> Fraction:
    """One matrix instruction: align to the largest exponent, cut off, add, cut off."""
    addends = [Fraction(accumulator), *products]
    largest = max(map(abs, addends))
    if largest == 0:
        return Fraction(0)
    kept = Fraction(2) ** (_exponent(largest) - precision + 1 - alignment_bits)
    total = sum(math.trunc(addend / kept) * kept for addend in addends)
    if total == 0:
        return Fraction(0)
    last_bit = Fraction(2) ** (_exponent(abs(total)) - precision + 1)
    return math.trunc(total / last_bit) * last_bit


def numbers(
    number_format: FloatFormat = TOY, *, exponents: tuple[int, int] = (-8, 8)
) -> st.SearchStrategy[float]:
    """Numbers of a format: any significand, last bit within the given exponents."""
    largest = (1 << number_format.precision) - 1
    return st.builds(math.ldexp, st.integers(-largest, largest), st.integers(*exponents))


def addends(
    number_format: FloatFormat = TOY, *, max_size: int = 24, **options: tuple[int, int]
) -> st.SearchStrategy[list[float]]:
    """Lists of numbers; some with repeated runs, and some whose second half cancels the first."""
    plain = st.lists(numbers(number_format, **options), min_size=1, max_size=max_size)
    half = st.lists(numbers(number_format, **options), min_size=1, max_size=max_size // 2)
    repeated = half.map(lambda x: x + [x[0]] * len(x))
    cancelling = half.map(lambda x: x + [-addend for addend in x])
    return st.one_of(plain, repeated, cancelling)


def _exponent(x: Fraction) -> int:
    """floor(log2 x) of a positive rational number."""
    estimate = x.numerator.bit_length() - x.denominator.bit_length()
    return estimate if Fraction(2) ** estimate <= x else estimate - 1
