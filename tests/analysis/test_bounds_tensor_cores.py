"""Bounds on matrix instructions against an exact emulation of aligned, truncated addition."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rational
from alignedkv.analysis import bounds
from alignedkv.errors import SpecError
from rational import TOY

U = TOY.unit_roundoff
ALIGNMENT_BITS = (0, 1, 2, 3)


def mma(accumulator, products, alignment_bits):
    return rational.truncated_mma(accumulator, products, TOY.precision, alignment_bits)


@given(
    rational.numbers(),
    st.lists(st.tuples(rational.numbers(), rational.numbers()), min_size=1, max_size=16),
    st.sampled_from(ALIGNMENT_BITS),
)
def test_bound_of_one_instruction_holds(accumulator, pairs, alignment_bits):
    products = [Fraction(a) * Fraction(b) for a, b in pairs]
    computed = mma(accumulator, products, alignment_bits)
    bound = bounds.mma_error_bound(
        [float(product) for product in products],
        accumulator,
        float(computed),
        alignment_bits=alignment_bits,
        u=U,
    )
    exact = Fraction(accumulator) + sum(products)
    assert abs(computed - exact) <= Fraction(float(bound))


@pytest.mark.parametrize("alignment_bits", ALIGNMENT_BITS)
@pytest.mark.parametrize("products_per_mma", [4, 8, 16])
def test_bound_of_one_instruction_is_nearly_attained(products_per_mma, alignment_bits):
    # All products but one lie just below one kept bit and are cut off whole. The last lies just
    # below the last bit of the result: what alignment leaves of it, truncation of the result takes.
    last_bit = Fraction(2 * U)
    kept = last_bit / 2**alignment_bits
    products = [kept * Fraction(31, 32)] * (products_per_mma - 1) + [last_bit - kept / 32]
    computed = mma(1.0, products, alignment_bits)
    assert computed == 1
    bound = bounds.mma_error_bound(
        [float(product) for product in products], 1.0, 1.0, alignment_bits=alignment_bits, u=U
    )
    assert float(sum(products)) >= 0.6 * bound


@given(
    st.lists(st.tuples(rational.numbers(), rational.numbers()), min_size=1, max_size=40),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(ALIGNMENT_BITS),
    rational.numbers(),
)
def test_bound_of_a_dot_product_holds(pairs, products_per_mma, alignment_bits, accumulator):
    x, y = zip(*pairs, strict=True)
    total = Fraction(accumulator)
    for start in range(0, len(x), products_per_mma):
        steps = slice(start, start + products_per_mma)
        products = [Fraction(a) * Fraction(b) for a, b in zip(x[steps], y[steps], strict=True)]
        total = mma(total, products, alignment_bits)
    bound = bounds.mma_dot_error_bound(
        x,
        y,
        products_per_mma=products_per_mma,
        alignment_bits=alignment_bits,
        u=U,
        accumulator=accumulator,
    )
    exact = Fraction(accumulator) + rational.exact_dot(x, y)
    assert abs(total - exact) <= Fraction(float(bound))


def test_bound_of_a_dot_product_is_nearly_attained():
    # Every instruction cuts off all of its products.
    lost_product = 2 * U * 31 / 32
    x, total = [lost_product] * 8, Fraction(1)
    for start in (0, 4):
        total = mma(total, list(map(Fraction, x[start : start + 4])), 0)
    assert total == 1
    bound = bounds.mma_dot_error_bound(x, np.ones(8), products_per_mma=4, u=U, accumulator=1.0)
    assert float(rational.exact_sum(x)) >= 0.4 * bound


def test_alignment_bits_of_an_h100_tighten_the_bound_as_theory_says():
    x = np.ones(16)
    unknown = bounds.mma_dot_error_bound(x, x, products_per_mma=16)
    hopper = bounds.mma_dot_error_bound(x, x, products_per_mma=16, alignment_bits=2)
    assert unknown == pytest.approx(18 * 2.0**-23 * 16)
    assert hopper == pytest.approx(5.25 * 2.0**-23 * 16)


def test_impossible_instructions_are_refused():
    with pytest.raises(SpecError, match="alignment_bits is -1"):
        bounds.mma_error_bound([1.0], 0.0, 1.0, alignment_bits=-1)
    with pytest.raises(SpecError, match="products_per_mma is 0"):
        bounds.mma_dot_error_bound([1.0], [1.0], products_per_mma=0)
