"""How many bits of an addend a sum can use, against sums of addends that were read so."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

import rational
from alignedkv.analysis import bounds
from alignedkv.errors import SpecError
from alignedkv.formats import BF16, FP16, exponent
from rational import TOY

P = TOY.precision


def read(x, bits):
    """The middle of the numbers that share sign, exponent and `bits` leading bits with x."""
    if x == 0 or bits == P:
        return Fraction(x)
    cell = Fraction(2) ** (int(exponent(x)) - int(bits) + 1)
    middle = (abs(Fraction(x)) // cell) * cell + cell / 2
    return middle if x > 0 else -middle


@given(rational.addends())
def test_the_bits_suffice(x):
    usable = bounds.addend_bits(TOY, x)
    change = Fraction(0)
    for addend, bits, allowed in zip(x, usable.bits, usable.addend_error, strict=True):
        error = read(addend, bits) - Fraction(addend)
        assert abs(error) <= Fraction(float(allowed))
        change += error
    assert abs(change) <= Fraction(float(usable.error_bound))


@given(rational.addends())
def test_one_bit_less_would_not_suffice(x):
    usable = bounds.addend_bits(TOY, x)
    needed = (usable.bits > 0) & (usable.bits < P)
    half_cell_without = np.ldexp(1.0, exponent(x) - usable.bits + 1)
    assert np.all(half_cell_without[needed] > usable.addend_error[needed])


@given(rational.addends())
def test_rounding_addends_to_the_ulp_of_the_sum_stays_within_the_bound(x):
    usable = bounds.addend_bits(TOY, x)
    ulps = [2 * Fraction(float(error)) for error in usable.addend_error]
    rounded = [round(Fraction(a) / ulp) * ulp for a, ulp in zip(x, ulps, strict=True)]
    change = sum(rounded) - rational.exact_sum(x)
    assert abs(change) <= Fraction(float(usable.error_bound))


@given(rational.addends())
def test_the_summation_may_lose_as_much_and_does_not_lose_more(x):
    usable = bounds.addend_bits(TOY, x)
    lost = abs(rational.recursive_sum(TOY, x) - rational.exact_sum(x))
    assert lost <= Fraction(float(usable.summation_error_bound))
    first_term = usable.addend_error[0]
    assert usable.error_bound == pytest.approx(usable.summation_error_bound + first_term)


def test_the_bound_is_nearly_attained():
    # Unread, an addend just below an ulp of the sum counts as half an ulp.
    last_bit = 2 * TOY.unit_roundoff
    x = [1.0] + [last_bit * 31 / 32] * 12
    usable = bounds.addend_bits(TOY, x)
    assert usable.bits.tolist() == [P] + [0] * 12
    change = sum(read(a, b) for a, b in zip(x, usable.bits, strict=True)) - rational.exact_sum(x)
    assert abs(float(change)) >= 0.85 * usable.error_bound


@pytest.mark.parametrize(
    ("x", "bits"),
    [
        ([1024.0, 1.0, 1.5], [11, 1, 1]),  # after 1024, a 1 meets an ulp of 1: its leading bit
        ([1.0, 1024.0, -1024.0], [1, 11, 11]),  # the first addend meets the second sum
        ([1024.0, 2.0**-2, 0.0], [11, 0, 0]),
        ([3.0], [11]),
        ([2.0**-24, 2.0**-24], [1, 1]),  # subnormal: one significand bit is all there is
    ],
)
def test_examples_in_fp16(x, bits):
    assert bounds.addend_bits(FP16, x).bits.tolist() == bits


def test_a_flat_sum_uses_ever_fewer_bits():
    # The running sum of n ones has exponent log2 n, so the n-th needs log2 n bits less.
    bits = bounds.addend_bits(BF16, np.ones(128)).bits
    expected = [8 - int(math.log2(max(n, 2))) for n in range(1, 129)]
    assert bits.tolist() == expected


def test_it_is_vectorised_over_any_axis():
    x = np.random.default_rng(2).integers(-15, 16, (4, 9, 3)).astype(np.float64)
    whole = bounds.addend_bits(TOY, x, axis=1)
    assert whole.bits.shape == x.shape
    for i, j in np.ndindex(4, 3):
        one = bounds.addend_bits(TOY, x[i, :, j])
        np.testing.assert_array_equal(whole.bits[i, :, j], one.bits)
        np.testing.assert_array_equal(whole.addend_error[i, :, j], one.addend_error)
        assert whole.error_bound[i, j] == one.error_bound


def test_addends_of_another_format_are_refused():
    with pytest.raises(SpecError, match="not toy numbers"):
        bounds.addend_bits(TOY, [1.0, 1.01])
