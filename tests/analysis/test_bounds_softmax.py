"""Softmax, log-sum-exp and ordinary attention: bounds against arithmetic emulated rationally.

exp and log are those of float64, whose errors are 2^-40 of the bounds that are tested; a slack of
1e-15 or 1e-13 in a comparison is for the float64 arithmetic of the test itself.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import rational
from alignedkv.analysis import bounds
from alignedkv.errors import SpecError
from alignedkv.formats import BF16, FP16, FP32, FloatFormat, round_to

#: Half of fp32's precision, and its exponents: no weight or probability in these tests underflows.
COARSE = FloatFormat(name="coarse", bits=20, precision=12)
U = COARSE.unit_roundoff
#: Numbers of the coarse format whose differences are not: the subtraction of the maximum rounds.
SCORES = st.lists(st.integers(-4095, 4095).map(lambda m: m / 512), min_size=1, max_size=24)


def softmax(scores):
    weights = np.exp(scores - np.max(scores))
    return weights / weights.sum()


def log_sum_exp(scores):
    return np.max(scores) + np.log(np.sum(np.exp(scores - np.max(scores))))


def assert_between(error, bound, share):
    """The bound holds, and the error reaches the given share of it."""
    assert share * bound <= abs(error) <= bound


def coarse_softmax(scores, add):
    """Probabilities and log-sum-exp, every operation rounded; the last item is the log's error."""
    largest = max(scores)
    differences = [rational.round_scalar(COARSE, Fraction(s) - Fraction(largest)) for s in scores]
    weights = [rational.round_scalar(COARSE, math.exp(d)) for d in differences]
    total = add(COARSE, weights)
    probabilities = [rational.round_scalar(COARSE, Fraction(w) / total) for w in weights]
    logarithm = rational.round_scalar(COARSE, math.log(total))
    computed = rational.round_scalar(COARSE, Fraction(largest) + Fraction(logarithm))
    return np.array(probabilities), computed, U * abs(math.log(total))


# --- Lemma 13, total variation ----------------------------------------------------------------

ERRORS = arrays(np.float64, 12, elements=st.floats(-3, 3))


@given(arrays(np.float64, 12, elements=st.floats(-5, 5)), ERRORS)
def test_total_variation_is_never_exceeded(scores, errors):
    distance = np.abs(softmax(scores + errors) - softmax(scores)).sum() / 2
    assert distance <= bounds.total_variation_bound(np.ptp(errors)) + 1e-15


@pytest.mark.parametrize("oscillation", [0.0, 2.0**-20, 0.5, 4.0, 30.0])
def test_total_variation_is_attained(oscillation):
    # theory.md, proof of Lemma 13: the set that gains has probability 1/(1 + sqrt r).
    gains = 1 / (1 + math.exp(oscillation / 2))
    scores = np.log([gains, 1 - gains])
    moved = softmax(scores + np.array([oscillation, 0.0]))
    bound = float(bounds.total_variation_bound(oscillation))
    assert abs(moved[0] - gains) == pytest.approx(bound, rel=2.0**-30, abs=1e-15)


def test_errors_of_magnitude_e_move_at_most_half_of_e():
    e = np.array([0.0, 0.01, 0.3, 5.0])
    assert np.all(bounds.total_variation_bound(2 * e) <= e / 2)


@given(ERRORS, arrays(np.float64, (12, 3), elements=st.floats(-8, 8)))
def test_average_changes_within_its_bound(errors, values):
    scores = np.linspace(-1, 1, 12)
    change = np.abs((softmax(scores + errors) - softmax(scores)) @ values)
    assert np.all(change <= bounds.average_change_bound(np.ptp(errors), values) + 1e-13)


def test_average_change_is_attained_by_two_values():
    gains = 1 / (1 + math.exp(1.0))
    scores = np.log([gains, 1 - gains])
    values = np.array([[3.0], [-1.0]])
    change = (softmax(scores + np.array([2.0, 0.0])) - softmax(scores)) @ values
    assert change == pytest.approx(bounds.average_change_bound(2.0, values))


def test_a_common_shift_costs_nothing_and_no_shift_costs_more_than_everything():
    assert bounds.total_variation_bound([0.0, np.inf]).tolist() == [0.0, 1.0]


def test_negative_oscillation_is_refused():
    with pytest.raises(SpecError, match="cannot be negative"):
        bounds.total_variation_bound([-1.0, 2.0])


# --- Lemma 14, softmax and log-sum-exp in floating point --------------------------------------


@given(SCORES, st.sampled_from([rational.recursive_sum, rational.pairwise_sum]), st.data())
def test_softmax_and_log_sum_exp_stay_within_their_bounds(scores, add, data):
    score_error = data.draw(st.sampled_from([0.0, 2.0**-12, 0.25]))
    signs = data.draw(arrays(np.float64, len(scores), elements=st.sampled_from([-1.0, 1.0])))
    exact_scores = np.array(scores) + score_error * signs
    n = len(scores)
    arithmetic = {
        "score_error": score_error,
        "exp_error": U,
        "height": n - 1 if add is rational.recursive_sum else bounds.pairwise_height(n),
        "u": U,
    }

    probabilities, computed, log_error = coarse_softmax(scores, add)
    log_ratio = np.abs(np.log(probabilities / softmax(exact_scores)))
    assert np.all(log_ratio <= bounds.softmax_error_bound(scores, **arithmetic))
    bound = bounds.log_sum_exp_error_bound(scores, computed, log_error=log_error, **arithmetic)
    assert abs(computed - log_sum_exp(exact_scores)) <= bound


def test_one_token_is_exact_up_to_its_score_error():
    probabilities, computed, _ = coarse_softmax([3.0], rational.recursive_sum)
    assert probabilities == [1.0]
    assert computed == 3.0


def test_score_errors_alone_attain_the_bounds():
    # One score too high, all others too low.
    e, T = 0.01, 4096
    errors = np.full(T, -e)
    errors[0] = e
    scores = np.zeros(T)
    arithmetic = {"score_error": e, "exp_error": 0.0, "height": 12, "u": FP32.unit_roundoff}
    log_ratio = np.log(softmax(scores + errors) / softmax(scores))
    assert_between(log_ratio[0], bounds.softmax_error_bound(scores, **arithmetic)[0], 0.99)

    shift = log_sum_exp(scores - e) - log_sum_exp(scores)
    bound = bounds.log_sum_exp_error_bound(scores, math.log(T), log_error=0.0, **arithmetic)
    assert_between(shift, bound, 0.99)


def test_subtracting_the_maximum_alone_comes_near_the_bounds():
    # The difference is a tie just above 8 and loses u of itself.
    scores, computed_differences = [0.0, -8 * (1 + U)], [0.0, -8.0]
    arithmetic = {"score_error": 0.0, "exp_error": 0.0, "height": 1, "u": U}
    log_ratio = np.log(softmax(computed_differences) / softmax(scores))
    assert_between(log_ratio[1], bounds.softmax_error_bound(scores, **arithmetic)[1], 0.4)

    # For the sum to feel it, the tokens far below the maximum must be many.
    far = 10**6
    error = math.log1p(far * math.exp(-8.0)) - math.log1p(far * math.exp(scores[1]))
    computed = math.log1p(far * math.exp(-8.0))
    bound = bounds.log_sum_exp_error_bound(scores, computed, log_error=0.0, **arithmetic)
    assert_between(error, bound, 0.5)


def test_the_exponential_alone_comes_near_the_bounds():
    # One weight too large, all others too small.
    x, T = 2.0**-8, 1024
    weights = np.full(T, 1 - x)
    weights[0] = 1 + x
    arithmetic = {"score_error": 0.0, "exp_error": x, "height": 0, "u": 2.0**-53}
    log_ratio = np.log(T * weights[0] / weights.sum())
    assert_between(log_ratio, bounds.softmax_error_bound(np.zeros(T), **arithmetic)[0], 0.49)

    computed = math.log(T * (1 - x))
    bound = bounds.log_sum_exp_error_bound(np.zeros(T), computed, log_error=0.0, **arithmetic)
    assert_between(computed - math.log(T), bound, 0.49)


def test_the_summation_alone_comes_near_the_bounds():
    # Every weight but the first is absorbed by the running sum 1: adding it is less than a tie.
    n, below = 101, math.floor(64 * math.log(U)) / 64
    scores = [0.0] + [below] * (n - 1)
    arithmetic = {"score_error": 0.0, "exp_error": U, "height": n - 1, "u": U}
    probabilities, computed, log_error = coarse_softmax(scores, rational.recursive_sum)
    assert computed == 0.0
    log_ratio = np.log(probabilities / softmax(scores))
    assert_between(log_ratio[0], bounds.softmax_error_bound(scores, **arithmetic)[0], 0.75)
    bound = bounds.log_sum_exp_error_bound(scores, computed, log_error=log_error, **arithmetic)
    assert_between(log_sum_exp(scores), bound, 0.75)


def test_division_alone_comes_near_the_bound():
    # Three equal weights: 1/3 is rounded by up to u, relatively.
    probabilities, _, _ = coarse_softmax([0.0] * 3, rational.pairwise_sum)
    arithmetic = {"score_error": 0.0, "exp_error": 0.0, "height": 0, "u": U}
    log_ratio = np.log(3 * probabilities[0])
    assert_between(log_ratio, bounds.softmax_error_bound([0.0] * 3, **arithmetic)[0], 0.3)


def test_the_logarithm_and_the_last_addition_attain_the_bound():
    arithmetic = {"score_error": 0.0, "exp_error": 0.0, "height": 0, "u": U}
    bound = bounds.log_sum_exp_error_bound([0.0], 0.01, log_error=0.01, **arithmetic)
    assert_between(0.01, bound, 0.99)
    # The log-sum-exp of one score is the score; 1 + u is a tie that the last addition rounds to 1.
    bound = bounds.log_sum_exp_error_bound([1 + U], 1.0, log_error=0.0, **arithmetic)
    assert_between(U, bound, 0.99)


def test_softmax_bounds_reduce_the_axis_they_are_told():
    scores = np.random.default_rng(3).normal(size=(4, 6))
    arithmetic = {"score_error": 0.1, "exp_error": 1e-3, "height": 5, "u": U}
    by_column = bounds.softmax_error_bound(scores, axis=0, **arithmetic)
    by_row = bounds.softmax_error_bound(scores.T, **arithmetic)
    np.testing.assert_array_equal(by_column, by_row.T)
    by_column = bounds.log_sum_exp_error_bound(
        scores, np.ones(6), log_error=0.0, axis=0, **arithmetic
    )
    assert by_column.shape == (6,)


@pytest.mark.parametrize("exp_error", [-0.1, 0.5, math.nan])
def test_exponentials_without_correct_bits_are_refused(exp_error):
    with pytest.raises(SpecError, match="exp_error"):
        bounds.softmax_error_bound([0.0], score_error=0.0, exp_error=exp_error, height=0, u=U)


# --- section 7.3, ordinary attention ----------------------------------------------------------


def ordinary_attention(probabilities, values, number_format):
    weights = round_to(number_format, probabilities)
    return round_to(number_format, weights @ values)


@pytest.mark.parametrize("number_format", [FP16, BF16], ids=lambda fmt: fmt.name)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 17]), st.sampled_from([0.0, 1.0, 6.0]))
def test_ordinary_attention_stays_within_its_bound(number_format, seed, T, spread):
    rng = np.random.default_rng(seed)
    probabilities = softmax(rng.uniform(-2, 2, T))  # no weight underflows in fp16
    values = rng.normal(size=(T, 4)) * 2.0 ** rng.uniform(-spread, spread, (T, 1))
    error = np.abs(
        ordinary_attention(probabilities, values, number_format) - probabilities @ values
    )
    bound = bounds.ordinary_attention_error_bound(
        probabilities, values, u=number_format.unit_roundoff
    )
    assert np.all(error <= bound)


def test_ordinary_attention_attains_its_bound():
    # The weight lies just above a tie and rounds up by u, and so does the output that it makes.
    u = BF16.unit_roundoff
    above = 1 + 1e-9
    weight = (1 + u) / 2 * above
    value = (1 + 3 * u) / (1 + 2 * u) * above
    probabilities, values = np.array([weight, 1 - weight]), np.array([[value], [0.0]])
    error = ordinary_attention(probabilities, values, BF16) - probabilities @ values
    bound = bounds.ordinary_attention_error_bound(probabilities, values, u=u)
    assert_between(error[0], bound[0], 0.98)


@given(
    st.lists(
        st.tuples(rational.numbers(exponents=(-5, 2)), rational.numbers(exponents=(-5, 2))),
        min_size=1,
        max_size=12,
    )
)
def test_ordinary_scores_stay_within_their_bound(pairs):
    toy = rational.TOY
    query, key = zip(*pairs, strict=True)
    scaling = Fraction(1, 3)
    product = rational.dot(toy, query, key)
    computed = rational.rounded(toy, rational.rounded(toy, scaling) * product)
    exact = scaling * rational.exact_dot(query, key)
    bound = bounds.ordinary_score_error_bound(
        query, [key], scaling=float(scaling), u=toy.unit_roundoff
    )
    assert abs(computed - exact) <= Fraction(float(bound[0]))
