"""The three bounds: never (or no more often than claimed) exceeded, merged, and not idle."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import soundness
from alignedkv.analysis.alignment import align
from alignedkv.analysis.bound_sums import (
    BoundSums,
    accumulate,
    deterministic_bound,
    estimate_bound,
    growth,
    merge,
)
from alignedkv.analysis.certificate import certify
from alignedkv.analysis.encoding import encode_case
from alignedkv.analysis.plan import Decisions, Shares, fixed_plan
from alignedkv.analysis.plan_search import search_plan
from alignedkv.analysis.reading import read
from alignedkv.analysis.sampling import bennett_bound
from alignedkv.analysis.scores import score_position
from alignedkv.analysis.statistical import largest_weights, may_stop, statistical_bound
from alignedkv.errors import SpecError
from alignedkv.policy import BoundKind, PrecisionPolicy
from analysis_cases import make_case

DETERMINISTIC = PrecisionPolicy(bound=BoundKind.DETERMINISTIC)


def scored(case, policy, index=0, **options):
    return score_position(encode_case(case, policy, **options), index)


def planned(case, policy, theta=2.0**-8, **options):
    scores = scored(case, policy)
    return scores, align(scores, policy, theta=scores.size * theta, **options).plan()


def exact_attention(case, index):
    """Softmax attention of one position, one head after the other."""
    first, end = case.visible(index)
    outputs = []
    for h, query in enumerate(case.query[:, index].astype(np.float64)):
        scores = [float(case.scaling * (query @ k)) for k in case.key[first:end].astype(float)]
        if case.softcap is not None:
            scores = [case.softcap * math.tanh(s / case.softcap) for s in scores]
        extra = [] if case.sinks is None else [case.sinks[h]]
        top = max(scores + extra)
        weights = [math.exp(s - top) for s in scores]
        total = sum(weights) + sum(math.exp(s - top) for s in extra)
        outputs.append(
            sum(w * v for w, v in zip(weights, case.value[first:end].astype(float), strict=True))
            / total
        )
    return np.array(outputs)


CASES = {
    "plain": {},
    "window": {"positions": (10, 30, 47), "window": 7},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": np.array([1.5, -np.inf])},
    "padding": {"start": 20, "positions": (20, 47)},
    "all at once": {
        "positions": (25, 47),
        "window": 9,
        "softcap": 2.0,
        "sinks": np.array([0.3, 2.0]),
        "start": 20,
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bound", BoundKind)
def test_bounds_hold_beside_an_independent_attention(changes, bound):
    case = make_case(sharpness=1.0, **changes)
    policy = PrecisionPolicy(bound=bound, exact_last=1)
    encoded = encode_case(case, policy)
    for index in range(len(case.positions)):
        scores = score_position(encoded, index)
        assert np.allclose(scores.output, exact_attention(case, index), rtol=1e-9, atol=1e-12)
        plan = align(scores, policy, theta=scores.size * 2.0**-9).plan()
        certificate = certify(scores, plan, policy)
        assert certificate.holds.all()
        assert (certificate.error == np.abs(certificate.output - scores.output).max(axis=1)).all()


def test_padding_may_hold_anything():
    case = make_case(start=5)
    key = case.key.copy()
    key[:5] = np.nan
    clean, dirty = make_case(start=5), make_case(start=5, key=key)
    policy = PrecisionPolicy()
    outputs = [certify(*planned(c, policy), policy).output for c in (clean, dirty)]
    assert (outputs[0] == outputs[1]).all()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_all_planes_leave_half_a_unit(head_dim, dtype):
    policy = PrecisionPolicy(bound=BoundKind.DETERMINISTIC)
    case = make_case(head_dim=head_dim, dtype=dtype, sharpness=0.5)
    scores = scored(case, policy)
    full = certify(scores, fixed_plan(scores, key_planes=4, value_planes=4), policy)
    assert full.holds.all()
    assert (full.relative_bound < 2.0**-5).all()
    one = certify(scores, fixed_plan(scores, key_planes=1, value_planes=1), policy)
    assert (one.bound > 100 * full.bound).all()


def test_deterministic_bound_is_never_exceeded():
    """A small share of tools/soundness.py."""
    found = soundness.deterministic_failures(seed=1, cases=10_000)
    assert found["failures"] == {"channel": 0, "scalar": 0}
    # And it is not idle: some case comes close.
    assert found["largest_error_over_bound"]["channel"] > 0.5


EXTREMES = {
    "zero rows": np.zeros((8, 64)),
    "constant rows": np.full((8, 64), 3.0),
    "subnormals": np.full((8, 64), 2.0**-24) * np.arange(8)[:, None],
    "tiny": np.full((8, 64), 1e-38) * np.arange(1, 9)[:, None],
    "top of bfloat16": np.where(np.arange(8 * 64).reshape(8, 64) % 3, 3.3e38, -3.3e38),
    "one huge element": np.where(np.arange(8 * 64).reshape(8, 64) == 77, 1e30, 1.0),
}


@pytest.mark.parametrize("rows", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("side", ["key", "value", "query"])
@pytest.mark.filterwarnings("error")
def test_extreme_rows_are_no_errors(rows, side):
    wrong = {side: (rows[:1, None] if side == "query" else rows).astype(np.float32)}
    case = make_case(tokens=8, dtype="float32", group=1, **wrong)
    for bound in BoundKind:
        policy = PrecisionPolicy(bound=bound)
        scores, plan = planned(case, policy)
        for certificate in (
            certify(scores, plan, policy),
            search_plan(scores, policy).certificate,
        ):
            assert np.isfinite(certificate.output).all()
            assert certificate.holds.all()
            assert (certificate.bound >= 0).all()


def test_one_token_is_its_own_output():
    case = make_case(tokens=1)
    policy = DETERMINISTIC
    scores = scored(case, policy)
    certificate = certify(scores, fixed_plan(scores, key_planes=1, value_planes=4), policy)
    # The value is its own mean: nothing is left to encode.
    assert (certificate.error == 0).all()
    assert certificate.holds.all()


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("sampled", [False, True])
def test_sums_of_splits_merge(splits, sampled):
    policy = PrecisionPolicy(sample_values=sampled, skip_share=1.0)
    case = make_case(tokens=100, sharpness=5, sinks=np.array([0.0, 3.0]))
    scores, plan = planned(case, policy, theta=2.0**-5)
    reading = read(scores, plan)
    whole = accumulate(reading)
    edges = np.linspace(0, scores.tokens, splits + 1).astype(int)
    parts = [accumulate(reading, slice(a, b)) for a, b in pairwise(edges)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    for field in fields(BoundSums):
        assert np.allclose(getattr(merged, field.name), getattr(whole, field.name), rtol=1e-12)
        if field.name not in ("sampled_variance", "sampled_largest", "skipped"):
            assert getattr(whole, field.name).any()
    sinks = scores.sinks
    assert np.allclose(
        estimate_bound(merged, reading.spread, sinks, 7.0),
        estimate_bound(whole, reading.spread, sinks, 7.0),
    )


@pytest.mark.parametrize("bound", [BoundKind.DETERMINISTIC, BoundKind.ESTIMATE])
def test_channel_form_is_the_tighter(bound):
    policy = PrecisionPolicy(bound=bound)
    for seed in range(5):
        scores, plan = planned(make_case(seed=seed, tokens=200), policy)
        channel = certify(scores, plan, policy).bound
        scalar = certify(scores, plan, policy, form="scalar").bound
        assert (channel < scalar).all()
        assert (scalar < 3.5 * channel).all()


def test_deterministic_scalar_is_the_formula():
    """(4.3), one token after the other."""
    scores, plan = planned(make_case(sharpness=1), DETERMINISTIC)
    reading = read(scores, plan)
    got = deterministic_bound(accumulate(reading), reading.spread, scores.sinks)
    for h in range(2):
        a0 = a1 = ev = s = 0.0
        for t in range(scores.tokens):
            p = reading.probability[h, t]
            n, e = plan.key_planes[t], scores.base_error[h, t]
            e += scores.one_norm[h] * scores.keys.half_step(n)[t]
            a0 += p * math.expm1(e)
            a1 += p * math.expm1(e) * scores.values.magnitude[t]
            ev += p * reading.value_error[t]
            s += p * math.exp(-e)
        rho = np.abs(reading.output[h] - scores.encoded.value_mean).max()
        assert got[h] == pytest.approx(ev + (a1 + (rho + ev) * a0) / s, rel=1e-12)


def test_estimate_is_the_formula():
    """(5.7) in both forms, one token and one channel after the other."""
    policy = PrecisionPolicy(skip_share=1.0, sample_values=False)
    scores, plan = planned(make_case(sharpness=2), policy, theta=2.0**-5)
    z = policy.deviations(64, 48)
    reading = read(scores, plan)
    assert (plan.value_planes == 0).any()
    values = scores.values.planes()
    for h in range(2):
        random = scalar_random = scalar_second = skipped = 0.0
        second = np.zeros(64)
        centre = reading.output[h] - scores.encoded.value_mean
        rho = np.abs(centre).max()
        for t in range(scores.tokens):
            p, n = reading.probability[h, t], plan.value_planes[t]
            sigma2 = (scores.two_norm[h] * scores.keys.half_step(plan.key_planes[t])[t]) ** 2 / 3
            row = values.prefix(int(n))[t, :64] if n else np.zeros(64)
            distance = np.abs(row - centre) + (0 if n else scores.values.magnitude[t])
            size = scores.values.magnitude[t] + rho
            error = reading.value_error[t]
            own = p**2 * error**2 / 3 if n else 0.0
            random = random + p**2 * math.expm1(sigma2) * distance**2 + own
            scalar_random += p**2 * math.expm1(sigma2) * size**2 + own
            second += p * sigma2 * distance
            scalar_second += p * sigma2 * size
            skipped += 0.0 if n else p * error
        channel = (z * np.sqrt(random) + second).max() + skipped
        assert certify(scores, plan, policy).bound[h] == pytest.approx(channel, rel=1e-9)
        scalar = z * math.sqrt(scalar_random) + scalar_second + skipped
        got = certify(scores, plan, policy, form="scalar").bound[h]
        assert got == pytest.approx(scalar, rel=1e-3)  # skipped rows: a, or a and its rounding


def test_estimate_is_tighter_than_what_is_proved():
    case = make_case(tokens=400, sharpness=0.3)
    bounds = {}
    for bound in BoundKind:
        policy = PrecisionPolicy(bound=bound)
        scores = scored(case, policy)
        plan = fixed_plan(scores, key_planes=2, value_planes=1)
        bounds[bound] = certify(scores, plan, policy).bound
    assert (bounds[BoundKind.ESTIMATE] < bounds[BoundKind.STATISTICAL]).all()
    assert (bounds[BoundKind.STATISTICAL] < bounds[BoundKind.DETERMINISTIC]).all()


def test_statistical_failures_stay_below_the_claim():
    """A small share of tools/soundness.py; the linear part alone comes close to its claim."""
    rows = soundness.statistical_failures(seed=2, draws=60)
    for row in rows:
        spare = 3 * math.sqrt(row["linear_part_claimed"] / 60)
        assert row["failure_rate"] <= row["claimed"]
        assert row["linear_part_rate"] <= row["linear_part_claimed"] + spare
    assert max(row["linear_part_rate"] for row in rows if row["z"] == 1.0) > 0.1
    assert max(row["failure_rate"] for row in rows if row["z"] == 1.0) > 0.1


def test_the_estimate_has_a_counterexample():
    """theory.md 5.5: planes chosen from the scores that they refine; the settled rule is immune."""
    rows = {row["plan"]: row for row in soundness.counterexample(seed=0, tokens=4096, draws=3)}
    assert rows["first_plane"]["mean_error_over_estimate"] > 1.2
    assert rows["settled"]["largest_error_over_estimate"] < 0.5
    assert rows["fixed"]["largest_error_over_estimate"] < 0.5


def test_statistical_bound_wants_a_settled_or_fixed_plan():
    policy = PrecisionPolicy(bound=BoundKind.STATISTICAL)
    scores, plan = planned(make_case(), policy, decisions=Decisions.EVERY_PLANE)
    with pytest.raises(SpecError, match="settled"):
        certify(scores, plan, policy)


def test_capped_scores_are_bounded_by_theorem_5():
    policy = PrecisionPolicy(bound=BoundKind.STATISTICAL)
    scores, plan = planned(make_case(softcap=4.0), policy)
    expected = certify(scores, plan, DETERMINISTIC).bound
    assert (certify(scores, plan, policy).bound == expected).all()
    with pytest.raises(SpecError, match="capped"):
        statistical_bound(read(scores, plan), deviations=8.0, expected=scores.size)


def test_sampled_rows_have_no_deterministic_bound():
    policy = PrecisionPolicy(sample_values=True)
    scores, plan = planned(make_case(tokens=200), policy, theta=2.0**-4)
    assert plan.is_sampled.any()
    with pytest.raises(SpecError, match="chance"):
        certify(scores, plan, DETERMINISTIC)


def test_largest_weights_are_no_smaller_than_the_exact_ones():
    policy = PrecisionPolicy(bound=BoundKind.STATISTICAL)
    for sharpness in (0.5, 2.0, 5.0):
        scores, plan = planned(make_case(tokens=300, sharpness=sharpness), policy)
        upper = largest_weights(read(scores, plan), policy.deviations(64, 300))
        assert (upper >= scores.probability * (1 - 1e-9)).all()


def test_rows_near_a_threshold_may_stop_at_two_counts():
    policy = PrecisionPolicy(bound=BoundKind.STATISTICAL)
    scores, plan = planned(make_case(tokens=300, sharpness=1.0), policy, theta=2.0**-10)
    stops = may_stop(scores, plan, policy.deviations(64, 300))
    used = plan.key_used.astype(int) - 1
    assert np.take_along_axis(stops, used[None], axis=0).all()
    counts = stops.sum(axis=0)
    assert counts.min() == 1
    assert counts.max() > 1


def test_sampling_is_unbiased_and_within_its_bound():
    """Theorem S1 at small z over many draws of the rows, one channel."""
    policy = PrecisionPolicy(sample_values=True)
    case = make_case(tokens=400, sharpness=3)
    scores = scored(case, policy)
    alignment = align(scores, policy, theta=scores.size * 2.0**-8)
    plan = alignment.plan(shares=Shares(row=16.0))
    assert plan.is_sampled.sum() > 100
    draws = np.array([read(scores, plan, seed=s).output[:, 0] for s in range(400)])
    full = read(scores, plan, seed=0)
    sums = accumulate(full).normalised(scores.sinks)
    for z in (1.5, 2.0, 2.5):
        bound = bennett_bound(0.0, sums.sampled_variance, sums.sampled_largest, z)
        centre = draws.mean(axis=0)
        rate = (np.abs(draws - centre) > bound).mean(axis=0)
        allowed = 2 * math.exp(-z * z / 2)
        assert (rate <= allowed + 3 * math.sqrt(allowed / 400)).all()
    # Unbiased: the mean of the draws is what reading all rows to one plane (or more) gives.
    assert (plan.value_planes > 1).any()
    expected = read(scores, replace(plan, probability=np.ones(400))).output[:, 0]
    spread = draws.std(axis=0) / math.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - expected) < 5 * spread).all()


@given(g=st.floats(1e-8, 1e4), v=st.floats(1e-8, 1e4), m=st.floats(0, 10), z=st.floats(0.5, 9))
@settings(max_examples=50)
def test_bennett_is_between_gauss_and_bernstein(g, v, m, z):
    bound = float(bennett_bound(g, v, m, z))
    gauss = z * math.sqrt(g + v)
    bernstein = z * z * m / 6 + math.sqrt((z * z * m / 6) ** 2 + z * z * (g + v))
    assert gauss * (1 - 1e-12) <= bound <= bernstein * (1 + 1e-9)


def test_growth_does_not_overflow():
    relative = np.array([[-1000.0, -5.0, 0.0]])
    error = np.array([[1500.0, 0.5, 2000.0]])
    grown = growth(relative, error)[0]
    assert grown[0] == pytest.approx(math.exp(500.0))
    assert grown[1] == pytest.approx(math.exp(-5) * math.expm1(0.5))
    assert np.isfinite(grown).all()
    assert grown[2] > 1e300
