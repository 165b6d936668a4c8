"""Deterministic bounds on sums and dot products: never exceeded, and nearly attained."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rational
from alignedkv.analysis import bounds
from alignedkv.errors import SpecError
from alignedkv.formats import FP16, FP32, FloatFormat
from rational import TOY

U = TOY.unit_roundoff


def absorbed(n):
    """1 followed by addends of u: each is a tie that rounds back to 1 and is lost."""
    return np.array([1.0] + [U] * (n - 1))


def error(computed, exact):
    return abs(fraction(computed) - exact)


def fraction(x):
    """The exact value of a float, of a NumPy scalar or array of no dimensions, or of a Fraction."""
    return x if isinstance(x, Fraction) else Fraction(float(x))


# --- constants and heights --------------------------------------------------------------------


def test_gamma_is_its_formula_and_grows():
    assert bounds.gamma(0, U) == 0
    assert bounds.gamma(3, 0.25) == 3.0
    values = [bounds.gamma(n, U) for n in range(32)]
    assert np.all(np.diff(values) > 0)


@pytest.mark.parametrize(("n", "u"), [(32, U), (1, 1.0), (-1, U)])
def test_gamma_refuses_what_bounds_nothing(n, u):
    with pytest.raises(SpecError, match="n u < 1"):
        bounds.gamma(n, u)


@given(st.integers(1, 40), st.integers(1, 45))
def test_heights_are_those_of_the_trees(n, chunk):
    def height_of_recursion(size):
        return 0 if size == 1 else 1 + height_of_recursion(size - size // 2)

    assert bounds.recursive_height(n) == n - 1
    assert bounds.pairwise_height(n) == height_of_recursion(n)
    within_chunk, chunks = min(chunk, n) - 1, -(-n // chunk)
    assert bounds.chunked_height(n, chunk) == within_chunk + chunks - 1


def test_heights_refuse_empty_sums_and_chunks():
    for height in (bounds.recursive_height, bounds.pairwise_height):
        with pytest.raises(SpecError, match="number of addends is 0"):
            height(0)
    with pytest.raises(SpecError, match="chunk is 0"):
        bounds.chunked_height(4, 0)


# --- S1, the running error bound --------------------------------------------------------------


@given(rational.addends())
def test_running_sum_is_the_recursive_sum_and_its_bound_holds(x):
    result = bounds.running_sum(TOY, x)
    for k, partial in enumerate(result.partial_sums):
        assert partial == rational.recursive_sum(TOY, x[: k + 1])
    assert result.value == result.partial_sums[-1]
    assert error(result.value, rational.exact_sum(x)) <= fraction(result.error_bound)


@given(rational.addends(FP32, exponents=(-140, 20), max_size=6))
def test_running_sum_emulates_float32_exactly(x):
    expected = np.add.accumulate(np.array(x, dtype=np.float32))
    np.testing.assert_array_equal(bounds.running_sum(FP32, x).partial_sums, expected)


def test_running_bound_is_attained_by_ties():
    x = absorbed(20)
    result = bounds.running_sum(TOY, x)
    lost = error(result.value, rational.exact_sum(x))
    assert lost == 19 * Fraction(U)
    assert float(lost) == pytest.approx(float(result.error_bound), rel=2.0**-30)


def test_running_bound_sees_cancellation_that_the_a_priori_bound_cannot():
    x = np.array([1024.0, -1024.0] + [U] * 8)
    assert bounds.running_sum(TOY, x).error_bound < 1e-3 * bounds.sum_error_bound(x, U)


def test_running_sum_is_vectorised_over_any_axis():
    x = np.random.default_rng(1).integers(-15, 16, (3, 7, 5)).astype(np.float64)
    whole = bounds.running_sum(TOY, x, axis=1)
    assert whole.partial_sums.shape == x.shape
    for i, j in np.ndindex(3, 5):
        one = bounds.running_sum(TOY, x[i, :, j])
        np.testing.assert_array_equal(whole.partial_sums[i, :, j], one.partial_sums)
        assert whole.value[i, j] == one.value
        assert whole.error_bound[i, j] == one.error_bound


def test_a_single_addend_is_exact():
    result = bounds.running_sum(TOY, [3.0])
    assert result.value == 3.0
    assert result.error_bound == 0.0


def test_overflow_leaves_no_finite_bound():
    assert bounds.running_sum(FP16, [65504.0, 65504.0]).error_bound == np.inf


@pytest.mark.parametrize(
    ("number_format", "x", "message"),
    [
        (TOY, [], "number of addends is 0"),
        (TOY, [1.0, 1.03], "not toy numbers"),
        (FloatFormat(name="float64", bits=64, precision=53), [1.0], "rounds twice"),
    ],
)
def test_running_sum_refuses_what_it_cannot_emulate(number_format, x, message):
    with pytest.raises(SpecError, match=message):
        bounds.running_sum(number_format, x)


# --- S2 and S3, a priori ----------------------------------------------------------------------


@given(rational.addends(), st.integers(1, 24))
def test_a_priori_bounds_hold_for_every_order(x, chunk):
    exact, n = rational.exact_sum(x), len(x)
    any_order = fraction(bounds.sum_error_bound(x, U))
    for computed, height in (
        (rational.recursive_sum(TOY, x), bounds.recursive_height(n)),
        (rational.pairwise_sum(TOY, x), bounds.pairwise_height(n)),
        (rational.chunked_sum(TOY, x, chunk), bounds.chunked_height(n, chunk)),
    ):
        assert error(computed, exact) <= any_order
        assert error(computed, exact) <= fraction(bounds.tree_sum_error_bound(x, height, U))


def test_any_order_bound_is_nearly_attained():
    x = absorbed(3)
    lost = error(rational.recursive_sum(TOY, x), rational.exact_sum(x))
    assert float(lost) >= 0.9 * bounds.sum_error_bound(x, U)


def test_pairwise_bound_is_nearly_attained():
    # At every level the left sum is 1 and the right one u: a tie that is lost.
    right_halves = [np.full(2**level, U / 2**level) for level in range(4)]
    x = np.concatenate([[1.0], *right_halves])
    lost = error(rational.pairwise_sum(TOY, x), rational.exact_sum(x))
    bound = bounds.tree_sum_error_bound(x, bounds.pairwise_height(len(x)), U)
    assert lost == 4 * Fraction(U)
    assert float(lost) >= 0.75 * bound


def test_chunked_bound_is_nearly_attained():
    # The first chunk loses an addend of u at each step, and so does the sum of the chunks.
    x = np.concatenate([absorbed(4), np.tile([U, 0, 0, 0], 3)])
    lost = error(rational.chunked_sum(TOY, x, 4), rational.exact_sum(x))
    bound = bounds.tree_sum_error_bound(x, bounds.chunked_height(len(x), 4), U)
    assert lost == 6 * Fraction(U)
    assert float(lost) >= 0.65 * bound


def test_a_priori_bounds_reduce_the_axis_they_are_told():
    x = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(
        bounds.sum_error_bound(x, U, axis=0), bounds.sum_error_bound(x.T, U)
    )
    np.testing.assert_array_equal(
        bounds.tree_sum_error_bound(x, 2, U, axis=0), bounds.tree_sum_error_bound(x.T, 2, U)
    )


# --- S4, dot products -------------------------------------------------------------------------

#: Products of such numbers stay in the normal range of the toy format.
FACTORS = {"exponents": (-5, 2)}


@given(st.lists(st.tuples(rational.numbers(**FACTORS), rational.numbers(**FACTORS)), min_size=1))
def test_dot_bound_holds_with_and_without_fused_multiply_add(pairs):
    x, y = zip(*pairs, strict=True)
    bound = fraction(bounds.dot_error_bound(x, y, U))
    exact = rational.exact_dot(x, y)
    assert error(rational.dot(TOY, x, y), exact) <= bound
    assert error(rational.fused_dot(TOY, x, y), exact) <= bound


def test_dot_bound_is_nearly_attained():
    # The first product, 1 + u, is a tie that rounds to 1; the others are u and are lost whole.
    x, y = [1.5, U, U], [0.6875, 1.0, 1.0]
    lost = error(rational.dot(TOY, x, y), rational.exact_dot(x, y))
    assert lost == 3 * Fraction(U)
    assert float(lost) >= 0.9 * bounds.dot_error_bound(x, y, U)


def test_dot_bound_broadcasts():
    x, y = np.arange(1.0, 4.0), np.ones((5, 3))
    assert bounds.dot_error_bound(x, y, U).shape == (5,)
