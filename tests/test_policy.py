"""Thresholds and plane counts: what follows from a policy, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.errors import SpecError
from alignedkv.planes import PlaneLayout
from alignedkv.policy import (
    FEEDBACK_GAIN,
    MARGIN_FALL,
    MARGIN_RANGE,
    MARGIN_RISE,
    SETTLING_STEPS,
    START_MARGIN,
    THETA_RANGE,
    BoundKind,
    PrecisionPolicy,
    feedback_margin,
    feedback_theta,
    model_policy,
    output_policy,
    planes_for,
)
from strategies import layouts


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("tolerance", 0.0, r"\(0, 1\)"),
        ("tolerance", 1.0, r"\(0, 1\)"),
        ("failure", 0.0, "probability"),
        ("bound", "certain", "deterministic"),
        ("dither_rows", 48, "power of two"),
        ("skip_share", -0.1, "at least 0"),
        ("plan_margin", -1.0, "at least 0"),
        ("exact_first", -1, "at least 0"),
        ("exact_last", -1, "at least 0"),
        ("stored_planes", 0, "1 to 4"),
        ("stored_planes", 5, "1 to 4"),
        ("key_layout", "4|4", "sum to 16"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    name: str, given: object, allowed: str
) -> None:
    with pytest.raises(SpecError, match=allowed):
        PrecisionPolicy(**{name: given})


def test_sampling_has_no_deterministic_bound() -> None:
    with pytest.raises(SpecError, match="sample_values"):
        PrecisionPolicy(bound="deterministic", sample_values=True)


@pytest.mark.parametrize("bound", list(BoundKind))
def test_values_are_sampled_with_an_estimate_unless_said(bound: BoundKind) -> None:
    assert PrecisionPolicy(bound=bound).sampled is (bound is BoundKind.ESTIMATE)
    assert PrecisionPolicy(bound=bound, sample_values=False).sampled is False
    assert PrecisionPolicy(bound="statistical", sample_values=True).sampled is True


@pytest.mark.parametrize("given", list(BoundKind))
@pytest.mark.parametrize("bound", list(BoundKind))
def test_another_bound_kind_brings_its_own_sampling(given: BoundKind, bound: BoundKind) -> None:
    changed = replace(PrecisionPolicy(bound=given), bound=bound)
    assert changed == PrecisionPolicy(bound=bound)
    assert changed.sampled is (bound is BoundKind.ESTIMATE)


def test_sampling_that_was_asked_for_is_kept_or_refused() -> None:
    asked = PrecisionPolicy(sample_values=True)
    assert replace(asked, bound="statistical").sampled
    with pytest.raises(SpecError, match="sample_values"):
        replace(asked, bound="deterministic")


def test_names_become_values() -> None:
    policy = PrecisionPolicy(bound="statistical", key_layout="4|4|8", stored_planes=3)
    assert policy.bound is BoundKind.STATISTICAL
    assert policy.key_layout == PlaneLayout((4, 4, 8))
    assert policy.planes_stored(policy.key_layout) == 3
    assert PrecisionPolicy().planes_stored(policy.key_layout) == 3


def test_the_two_ready_policies() -> None:
    assert output_policy().tolerance == 2.0**-7
    assert model_policy(failure=1e-6).tolerance == 2.0**-5
    assert model_policy(failure=1e-6).failure == 1e-6
    assert output_policy().exact_first == model_policy().exact_first == 4
    assert model_policy(exact_first=0).exact_first == 0


@pytest.mark.parametrize(
    ("bound", "head_dim", "tokens", "wanted"),
    [  # theory.md 5.4: 7.3; 7.9 at T = 4096 and 8.3 at T = 131072
        ("estimate", 128, 4096, 7.3),
        ("statistical", 128, 4096, 7.9),
        ("statistical", 128, 131072, 8.3),
        ("deterministic", 128, 4096, 0.0),
    ],
)
def test_deviations_are_those_of_the_theory(
    bound: str, head_dim: int, tokens: int, wanted: float
) -> None:
    z = PrecisionPolicy(bound=bound).deviations(head_dim, tokens)
    assert z == pytest.approx(wanted, abs=0.06)


@given(st.floats(1e-12, 0.5), st.integers(1, 256), st.integers(1, 1 << 20))
def test_deviations_meet_the_failure_probability(
    failure: float, head_dim: int, tokens: int
) -> None:
    policy = PrecisionPolicy(bound="statistical", failure=failure)
    z = policy.deviations(head_dim, tokens)
    events = 6 * head_dim + 2 * 4 * tokens + 1
    assert events * math.exp(-z * z / 2) == pytest.approx(failure)


@given(layouts(), st.data())
def test_planes_bring_an_addend_down_to_theta(layout: PlaneLayout, data: st.DataObject) -> None:
    """(6.2): n planes leave c 2^-gain(n); the fewest that leave no more than theta."""
    stored = data.draw(st.integers(1, len(layout)))
    excess = data.draw(st.floats(-50, 50))
    n = int(planes_for(np.array(excess), layout, stored))
    enough = [m for m in range(1, stored + 1) if excess <= layout.gain(m)]
    assert n == (enough[0] if enough else stored)


def test_planes_of_infinite_and_absent_excess() -> None:
    layout = PlaneLayout((4, 4, 4, 4))
    assert planes_for(np.array([np.inf, -np.inf, np.nan]), layout, 4).tolist() == [4, 1, 1]


@given(st.floats(1e-6, 1e6), st.floats(1e-9, 1e9), st.floats(1e-6, 1e3), st.floats(*MARGIN_RANGE))
def test_feedback_moves_towards_its_margin_and_stays_in_range(
    theta: float, bound: float, tau: float, margin: float
) -> None:
    following = float(feedback_theta(*map(np.array, (theta, bound, tau, margin))))
    lowest, highest = (ratio * tau for ratio in THETA_RANGE)
    assert lowest <= following <= highest
    if lowest < following < highest:
        assert 0.25 * (1 - 1e-12) <= following / theta <= 4 * (1 + 1e-12)
        if bound > tau:
            assert following < theta
        if bound < tau * 2.0 ** -(margin + 0.1):
            assert following > theta


def test_feedback_of_a_bound_that_was_met_exactly_keeps_its_margin() -> None:
    found = feedback_theta(*map(np.array, (0.01, 1.0, 1.0, 1.5)))
    assert found == pytest.approx(0.01 * 2.0 ** -(1.5 * FEEDBACK_GAIN))


def test_a_miss_widens_the_margin_at_once_and_hits_narrow_it_slowly() -> None:
    margin, missed = np.array([1.0, 1.0, np.nan, 2.9, 0.155]), np.array([1, 0, 0, 1, 0], bool)
    found = feedback_margin(margin, missed)
    np.testing.assert_allclose(found, [1.25, 0.998, 0.998, 3.0, 0.153], rtol=1e-12)
    assert (MARGIN_RISE, MARGIN_FALL, START_MARGIN) == (0.25, 0.002, 1.0)


def test_the_margin_settles_where_one_step_in_126_misses() -> None:
    """Bounds that scatter by so many bits around their aim; the margin learns how many."""
    scatter, steps = np.linspace(0.02, 0.5, 97), 30_000
    bits = scatter * np.random.default_rng(0).standard_normal((steps, len(scatter)))
    margin, missed = np.full(len(scatter), START_MARGIN), np.zeros(bits.shape, bool)
    for step, deviation in enumerate(bits):
        missed[step] = deviation > margin
        margin = feedback_margin(margin, missed[step])
    share = missed[5000:].mean(axis=0)
    lowest, highest = MARGIN_RANGE
    settled = MARGIN_FALL / (MARGIN_FALL + MARGIN_RISE)
    # Rises and falls cancel over any stretch but for where it ends, unless the margin is cut off.
    ends = (highest - lowest) / (MARGIN_FALL + MARGIN_RISE) / 25_000
    assert (share <= settled + ends).all()
    assert (share[scatter > 0.15] > 0.8 * settled).all()  # 0.8 % lie 2.4 deviations above the aim


def test_hints_settle_in_time_with_a_miss_on_the_way() -> None:
    margin = np.full(2, START_MARGIN)
    for step in range(SETTLING_STEPS):
        assert margin[1] > MARGIN_RANGE[0]  # not settled before
        margin = feedback_margin(margin, np.array([False, step == 3]))
    np.testing.assert_allclose(margin, MARGIN_RANGE[0], atol=MARGIN_FALL)


@pytest.mark.parametrize("bound", list(BoundKind))
def test_theta_starts_lower_for_longer_contexts(bound: BoundKind) -> None:
    starts = [PrecisionPolicy(bound=bound).start_theta(t) for t in (128, 4096, 131072)]
    assert starts == sorted(starts, reverse=True)
    assert starts[0] > starts[-1] > 0
