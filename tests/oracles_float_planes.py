"""Float planes of one number, in Python integers and fractions: slow and obviously right."""

from __future__ import annotations

from fractions import Fraction

from alignedkv.formats import FloatFormat


def value_of(code: int, number_format: FloatFormat) -> Fraction:
    """The number that a bit pattern stands for."""
    fraction_bits = number_format.precision - 1
    fraction = code & ((1 << fraction_bits) - 1)
    exponent = (code & 0x7FFF) >> fraction_bits
    hidden = 1 << fraction_bits if exponent else 0
    quantum = max(exponent, 1) - number_format.bias - fraction_bits
    magnitude = (hidden + fraction) * Fraction(2) ** quantum
    return -magnitude if code >> 15 else magnitude


def numbers_with_prefix(code: int, bits: int, number_format: FloatFormat) -> list[Fraction]:
    """Every finite number whose first ``bits`` bits are those of ``code``, in order of the rest."""
    unread = 16 - bits
    first = code >> unread << unread
    return [
        value_of(first | rest, number_format)
        for rest in range(1 << unread)
        if (first | rest) & 0x7FFF <= number_format.code_of_max
    ]


def prefix_value(code: int, bits: int, number_format: FloatFormat) -> Fraction:
    """The middle one of them, or the largest if the middle one is not finite."""
    numbers = numbers_with_prefix(code, bits, number_format)
    middle = (1 << (16 - bits)) >> 1
    return numbers[min(middle, len(numbers) - 1)]
