"""Probabilistic estimates: they hold where rounding is random and fail where it is not."""

import math

import numpy as np
import pytest

from alignedkv.analysis import bounds
from alignedkv.errors import SpecError
from alignedkv.formats import BF16, FP32, round_to, ulp

U = 2.0**-8
SUMS = 4000


def random_signs(rng, shape):
    """Relative errors as large as they may be, of random sign: the worst case of the model."""
    return U * rng.choice([-1.0, 1.0], shape)


def round_stochastically(number_format, x, rng):
    """Round to one of the two neighbours, the nearer the likelier, so that the mean is x."""
    spacing = ulp(number_format, x)
    lower = np.floor(x / spacing) * spacing
    return lower + spacing * (rng.random(x.shape) < (x - lower) / spacing)


def share_outside(errors, estimate):
    return np.mean(np.abs(errors) > estimate)


def errors_of_float32_sums(x):
    exact = np.array([math.fsum(row) for row in x])
    return bounds.running_sum(FP32, x).value - exact


@pytest.mark.parametrize("failure", [0.3, 0.1, 1e-9])
def test_azuma_z_inverts_the_tail(failure):
    assert 2 * math.exp(-(bounds.azuma_z(failure) ** 2) / 2) == pytest.approx(failure)


@pytest.mark.parametrize("failure", [0.0, 1.0, -0.1, math.nan])
def test_impossible_failure_probabilities_are_refused(failure):
    with pytest.raises(SpecError, match="failure probability"):
        bounds.azuma_z(failure)


# --- S5 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [0.5, 0.27, 0.1, 0.03])
def test_sums_with_random_errors_fail_no_more_often_than_claimed(failure):
    rng = np.random.default_rng(1)
    n = 60
    partial = np.ones(SUMS)
    for _ in range(n - 1):
        before_rounding = partial + 1
        partial = before_rounding * (1 + random_signs(rng, SUMS))
    errors = partial - n
    largest_partial_sums = np.arange(2, n + 1) * (1 + bounds.gamma(n - 1, U))
    estimate = bounds.sum_error_estimate(largest_partial_sums, U, failure=failure)
    assert share_outside(errors, estimate) <= failure
    # From the other side: two thirds of it would fail at an eighth of the claimed rate or more.
    assert share_outside(errors, 2 / 3 * estimate) >= failure / 8

    looser = bounds.tree_sum_error_estimate(np.ones(n), n - 1, U, failure=failure)
    assert estimate <= looser <= 2.5 * estimate


@pytest.mark.parametrize("failure", [0.5, 0.1])
def test_stochastic_rounding_is_covered_with_twice_the_roundoff(failure):
    rng = np.random.default_rng(2)
    x = round_to(BF16, rng.random((SUMS, 64)))
    partial = x[:, 0]
    for k in range(1, x.shape[1]):
        partial = round_stochastically(BF16, partial + x[:, k], rng)
    errors = partial - x.sum(axis=1)
    exact_partial_sums = np.cumsum(x, axis=1)[:, 1:]
    allowed = bounds.sum_error_estimate(exact_partial_sums, BF16.eps, failure=failure)
    assert share_outside(errors, allowed) <= failure
    scale = BF16.eps * np.sqrt((exact_partial_sums**2).sum(axis=1))
    assert np.sqrt(np.mean((errors / scale) ** 2)) >= 1 / 5
    tree = bounds.tree_sum_error_estimate(x, x.shape[1] - 1, BF16.eps, failure=failure)
    assert share_outside(errors, tree) <= failure


def test_irregular_data_rounded_to_nearest_stay_within_the_estimate():
    x = round_to(FP32, np.random.default_rng(3).normal(size=(400, 256)))
    errors = errors_of_float32_sums(x)
    partial_sums = np.cumsum(x, axis=1)[:, 1:]
    u = FP32.unit_roundoff
    estimate = bounds.sum_error_estimate(partial_sums, u, failure=0.1)
    assert share_outside(errors, estimate) <= 0.1
    assert np.max(np.abs(errors) / estimate) >= 0.25
    # What the estimate is for: the bound that always holds is far away.
    assert np.all(estimate < bounds.sum_error_bound(x, u) / 16)


def test_equal_addends_rounded_to_nearest_break_the_estimate_but_not_the_bound():
    # Within a binade of the partial sum all roundings have one sign: errors add up coherently.
    x = np.full((1, 2048), np.float32(0.1), dtype=np.float64)
    error = abs(errors_of_float32_sums(x)[0])
    partial_sums = np.cumsum(x, axis=1)[:, 1:]
    u = FP32.unit_roundoff
    impossible = 1e-20
    assert error > bounds.sum_error_estimate(partial_sums, u, failure=impossible)[0]
    assert error <= bounds.running_sum(FP32, x).error_bound[0]
    assert error <= bounds.sum_error_bound(x, u)[0]


def test_ties_break_the_tree_estimate_but_not_the_bound():
    # 1 and then addends of u, each a tie that is lost, on the round-to-nearest side of the model.
    u = FP32.unit_roundoff
    x = np.array([[1.0] + [u] * 4000])
    error = abs(errors_of_float32_sums(x)[0])
    assert error == 4000 * u
    assert error > bounds.tree_sum_error_estimate(x, 4000, u, failure=1e-20)[0]
    assert error <= bounds.tree_sum_error_bound(x, 4000, u)[0]


def test_estimates_reduce_the_axis_they_are_told():
    x = np.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(
        bounds.sum_error_estimate(x, U, failure=0.1, axis=0),
        bounds.sum_error_estimate(x.T, U, failure=0.1),
    )
    assert bounds.tree_sum_error_estimate(x, 2, U, failure=0.1, axis=0).shape == (4,)


# --- S6 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [0.5, 0.27, 0.1])
@pytest.mark.parametrize("power", [1, -1])
def test_products_of_random_factors_fail_no_more_often_than_claimed(failure, power):
    n = 200
    factors = 1 + random_signs(np.random.default_rng(4), (SUMS, n))
    errors = np.prod(factors**power, axis=1) - 1
    estimate = bounds.product_error_estimate(n, U, failure=failure)
    assert share_outside(errors, estimate) <= failure
    assert share_outside(errors, 2 / 3 * estimate) >= failure / 8
    assert estimate < bounds.gamma(n, U) / 4


def test_products_of_factors_with_one_sign_break_the_estimate_but_not_gamma():
    n = 200
    error = (1 + U) ** n - 1
    assert error > bounds.product_error_estimate(n, U, failure=1e-20)
    assert error <= bounds.gamma(n, U)


# --- section 7.3 ------------------------------------------------------------------------------


def test_ordinary_attention_has_the_estimated_error_on_random_data():
    rng = np.random.default_rng(5)
    probabilities = rng.dirichlet(np.ones(64), size=2000)
    values = rng.normal(size=(2000, 64, 1))
    exact = np.einsum("nt,ntd->nd", probabilities, values)
    weights = round_to(BF16, probabilities)
    computed = round_to(BF16, np.einsum("nt,ntd->nd", weights, values))
    estimate = bounds.ordinary_attention_error_estimate(probabilities, values, u=U)
    bound = bounds.ordinary_attention_error_bound(probabilities, values, u=U)
    assert np.sqrt(np.mean(((computed - exact) / estimate) ** 2)) == pytest.approx(1, rel=0.1)
    assert np.all(np.abs(computed - exact) <= bound)
    assert np.all(estimate < bound)


def test_rounded_inputs_have_the_estimated_score_error_on_random_data():
    rng = np.random.default_rng(6)
    keys, scaling = rng.normal(size=(4000, 64)), 1 / 8
    squared_ratios = []
    for query in rng.normal(size=(20, 64)):  # the rounding of a query is common to all keys
        errors = scaling * (round_to(BF16, keys) @ round_to(BF16, query) - keys @ query)
        estimate = bounds.rounded_inputs_score_error_estimate(query, keys, scaling=scaling, u=U)
        squared_ratios.append(np.mean((errors / estimate) ** 2))
    assert np.sqrt(np.mean(squared_ratios)) == pytest.approx(1, rel=0.1)
