"""Plans: against the oracle of the study, against the rule written out, and their properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignedkv.analysis.alignment import SMALLEST_PROBABILITY, align, group_max
from alignedkv.analysis.certificate import certify
from alignedkv.analysis.encoding import encode_case, transformed_keys
from alignedkv.analysis.plan import (
    DecisionGroups,
    Decisions,
    Hint,
    Shares,
    fixed_plan,
    previous_step_hint,
    two_pass_hint,
)
from alignedkv.analysis.plan_search import search_plan
from alignedkv.analysis.scores import score_position
from alignedkv.errors import SpecError
from alignedkv.planes import encode_rows
from alignedkv.policy import BoundKind, PrecisionPolicy, feedback_theta, planes_for
from analysis_cases import make_case, sample_cases

#: Mean bits of K and V by `plan2` of study/gran.py on the bundled sample, positions 1011 and 1023
#: of all nine heads, for every tolerance 2^x:
#:   Head(k[h, :n], v[h, :n], q[3h:3h+3, i], .125, |q| over heads and positions)
#:   plan2(head, klay(head, (4, 8, 12, 16)), vlay(head, (0, 4, 8, 12, 16)), 2**x, z=7.152)
ORACLE_BITS = {
    -9: (7.5751, 4.8964),
    -8: (6.8076, 4.2540),
    -7: (6.1560, 3.5679),
    -6: (5.5701, 2.9114),
    -5: (5.0027, 2.3564),
    -4: (4.6484, 1.7510),
}
#: The oracle adds five standard deviations to a weight that it has only estimated.
ORACLE_MARGIN = 5.0


def scored(case, policy, index=0, **options):
    return score_position(encode_case(case, policy, **options), index)


@pytest.fixture(scope="module")
def sample():
    return sample_cases()


#: And it asks more of keys than of values: see the test.
ORACLE_SHARES = tuple(Shares(value=1.5, row=row) for row in (0.5, 0.2, 0.06, 0.02))


@pytest.mark.parametrize("as_oracle", [True, False])
@pytest.mark.parametrize("exponent", ORACLE_BITS)
def test_bits_agree_with_the_oracle(sample, exponent, as_oracle):
    """Within 0.1 bit with the oracle's margin; with the defaults, no more than the oracle.

    The oracle lowers its log-sum-exp by five standard deviations of every score, and less so once
    keys are refined: it asks more of keys, which come first, than of values. The sharper one of
    theory.md 6 treats both alike and reads 0.1 to 0.3 bit less, at the same bound.
    """
    margin = {"plan_margin": ORACLE_MARGIN} if as_oracle else {}
    policy = PrecisionPolicy(
        sample_values=False, tolerance=2.0**exponent, dither_rows=256, **margin
    )
    shares = ORACLE_SHARES if as_oracle else None
    bits = []
    for case in sample:
        encoded = encode_case(case, policy)
        for index in (3, 15):
            result = search_plan(score_position(encoded, index), policy, shares=shares)
            assert not result.certificate.missed.any()
            assert result.certificate.holds.all()
            bits.append(result.plan.mean_bits)
    mean = np.mean(bits)
    oracle = np.mean(ORACLE_BITS[exponent])
    if as_oracle:
        assert abs(mean - oracle) <= 0.1
    else:
        assert oracle - 0.4 <= mean <= oracle


@pytest.mark.parametrize("bound", BoundKind)
@pytest.mark.parametrize("layout", ["4|4|4|4", "4|2|2|8", "3|5|8"])
def test_first_plane_rule_is_the_formula(bound, layout):
    """(6.2) written out for one token after the other."""
    policy = PrecisionPolicy(
        sample_values=False, bound=bound, key_layout=layout, value_layout=layout, skip_share=0.3
    )
    scores = scored(make_case(group=3), policy)
    theta = scores.size * np.array([1e-2, 1e-3, 3e-3])
    hint = Hint(log_z=scores.log_z + 0.1, spread=scores.spread * 1.5)
    plan = align(scores, policy, theta=theta, decisions=Decisions.FIRST_PLANE, hint=hint).plan()
    stored = scores.keys.stored
    deterministic = bound is BoundKind.DETERMINISTIC
    for t in range(scores.tokens):
        key_excess, sizes = [], []
        for h in range(3):
            sigma = scores.score_deviation(1)[h, t]
            error = scores.score_error(1)[h, t] if deterministic else sigma
            weight = np.exp(
                min(scores.planes[0, h, t] + policy.plan_margin * sigma - hint.log_z[h], 0)
            )
            size = scores.values.magnitude[t] + hint.spread[h]
            key_excess.append(np.log2(weight * error * size / theta[h]))
            sizes.append(weight * scores.values.magnitude[t] / theta[h])
        wanted = planes_for(np.array(max(key_excess)), policy.key_layout, stored)
        assert plan.key_planes[t] == wanted
        if max(sizes) <= policy.skip_share:
            assert plan.value_planes[t] == 0
            continue
        level = plan.key_planes[t] - 1
        weights = [
            np.exp(
                min(
                    scores.planes[level, h, t]
                    + policy.plan_margin * scores.score_deviation(level + 1)[h, t]
                    - hint.log_z[h],
                    0,
                )
            )
            / theta[h]
            for h in range(3)
        ]
        step = scores.values.half_step(1)[t] / (1.0 if deterministic else np.sqrt(3))
        excess = np.log2(max(weights) * step)
        assert plan.value_planes[t] == planes_for(np.array(excess), policy.value_layout, stored)


@pytest.mark.parametrize("decisions", list(Decisions)[:3])
def test_larger_theta_never_reads_more_keys(decisions):
    policy = PrecisionPolicy(sample_values=False)
    scores = scored(make_case(tokens=200), policy)
    alignment = align(scores, policy, theta=scores.size, decisions=decisions)
    counts = [alignment.key_planes(m) for m in np.arange(-16, 2, 0.5)]
    assert all((fine >= coarse).all() for fine, coarse in pairwise(counts))
    assert (counts[0] > counts[-1]).any()


def test_first_plane_reads_no_less_than_every_plane():
    """A finer score has a smaller margin, so later decisions can only drop planes on average."""
    policy = PrecisionPolicy(sample_values=False)
    scores = scored(make_case(tokens=400, sharpness=3), policy)
    hint = previous_step_hint(scores)
    bits = {
        decisions: align(
            scores, policy, theta=scores.size * 2.0**-13, decisions=decisions, hint=hint
        )
        .plan()
        .key_bits.mean()
        for decisions in (Decisions.FIRST_PLANE, Decisions.EVERY_PLANE, Decisions.SETTLED)
    }
    assert bits[Decisions.FIRST_PLANE] >= bits[Decisions.EVERY_PLANE]
    assert bits[Decisions.SETTLED] >= bits[Decisions.EVERY_PLANE]


@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=20),
    tokens=st.integers(1, 8),
    first=st.integers(0, 20),
)
def test_groups_take_their_maximum(values, tokens, first):
    out = group_max(np.array(values), tokens, first)
    for t in range(len(values)):
        group = [v for i, v in enumerate(values) if (first + i) // tokens == (first + t) // tokens]
        assert out[t] == max(group)


@pytest.mark.parametrize("tokens", [2, 8, 32])
def test_groups_read_alike_and_no_less(tokens):
    policy = PrecisionPolicy(sample_values=False, skip_share=2.0)
    scores = scored(make_case(tokens=100, sharpness=4), policy)
    plans = {
        g: align(scores, policy, theta=scores.size * 2.0**-8, groups=DecisionGroups.of(g)).plan()
        for g in (1, tokens)
    }
    for name in ("key_planes", "value_planes"):
        one, grouped = getattr(plans[1], name), getattr(plans[tokens], name)
        for start in range(0, 100, tokens):
            assert len(set(grouped[start : start + tokens])) == 1
        if name == "key_planes":
            assert (grouped >= one).all()
            assert (grouped > one).any()


def test_value_rows_are_skipped_only_together():
    policy = PrecisionPolicy(sample_values=False, skip_share=4.0)
    scores = scored(make_case(tokens=96, sharpness=4), policy)
    theta = scores.size * 2.0**-6
    single = align(scores, policy, theta=theta).plan().value_planes > 0
    rows = align(scores, policy, theta=theta, groups=DecisionGroups(value_rows=16)).plan()
    expected = np.repeat(single.reshape(-1, 16).any(axis=1), 16)
    assert not single.all()
    assert ((rows.value_planes > 0) == expected).all()


def test_a_group_of_heads_reads_what_its_most_demanding_head_needs():
    policy = PrecisionPolicy(sample_values=False)
    case = make_case(group=3, tokens=80)
    scores = scored(case, policy)
    theta = scores.size * 2.0**-9
    hint = previous_step_hint(scores)
    together = align(scores, policy, theta=theta, hint=hint).plan()
    alone = []
    for h in range(3):
        huge = np.full(3, 1e30)
        huge[h] = theta[h]
        alone.append(align(scores, policy, theta=huge, hint=hint).plan().key_planes)
    assert (together.key_planes == np.max(alone, axis=0)).all()


def test_settled_heads_use_planes_that_were_read():
    policy = PrecisionPolicy(sample_values=False, bound=BoundKind.STATISTICAL, tolerance=2.0**-5)
    scores = scored(make_case(group=3, tokens=120), policy)
    plan = align(scores, policy, theta=scores.size * 2.0**-9).plan()
    assert plan.decisions is Decisions.SETTLED
    assert (plan.key_used <= plan.key_planes).all()
    assert (plan.key_used >= 1).all()
    assert (plan.key_used < plan.key_planes).any()


def test_two_pass_hint_lies_below_log_z():
    for sharpness in (0.0, 1.0, 4.0):
        scores = scored(
            make_case(tokens=300, sharpness=sharpness), PrecisionPolicy(sample_values=False)
        )
        assert (two_pass_hint(scores).log_z <= scores.log_z).all()


def test_exact_rows_read_the_input_type():
    policy = PrecisionPolicy(sample_values=False, exact_first=2, exact_last=3)
    scores = scored(make_case(tokens=40, positions=(30,), window=20), policy)
    plan = align(scores, policy, theta=scores.size * 2.0**-9).plan()
    exact = np.isin(np.arange(scores.tokens), [0, 1, 17, 18, 19])
    assert scores.tokens == 20
    assert (scores.is_exact == exact).all()
    assert (plan.key_bits[exact] == 16).all()
    assert not plan.key_planes[exact].any()
    assert plan.key_planes[~exact].all()


def test_sampling_reads_in_proportion_to_size():
    policy = PrecisionPolicy(sample_values=True)
    scores = scored(make_case(tokens=300, sharpness=4), policy)
    theta = scores.size * 2.0**-6
    shares = Shares(row=0.5)
    alignment = align(scores, policy, theta=theta)
    plan = alignment.plan(shares=shares)
    level = plan.key_planes.astype(int) - 1
    weight = 2.0 ** alignment.value_weights[level, np.arange(300)]
    wanted = np.clip(weight * scores.values.magnitude / 0.5, SMALLEST_PROBABILITY, 1)
    assert plan.is_sampled.any()
    assert np.allclose(plan.probability[plan.is_sampled], wanted[plan.is_sampled])
    assert (plan.value_planes[plan.is_sampled] == 1).all()
    assert plan.value_bits.sum() < 4 * 300


def test_feedback_finds_a_theta_that_meets_the_tolerance():
    policy = PrecisionPolicy(sample_values=False, tolerance=2.0**-6)
    case = make_case(tokens=256, positions=tuple(range(240, 256)))
    encoded = encode_case(case, policy)
    scores = score_position(encoded, 0)
    theta = policy.tolerance * scores.size * policy.start_theta(256)
    missed = []
    for index in range(16):
        scores = score_position(encoded, index)
        plan = align(scores, policy, theta=theta, hint=previous_step_hint(scores)).plan()
        certificate = certify(scores, plan, policy)
        tau = policy.tolerance * scores.size
        missed.append(certificate.missed.mean())
        theta = feedback_theta(theta, certificate.bound, tau, np.ones_like(tau))
    # Once settled, bounds stay near the margin, a bit, below the tolerance.
    assert np.mean(missed[4:]) < 0.5
    assert (certificate.bound > tau / 8).all()


def test_search_reads_everything_where_nothing_is_enough():
    policy = PrecisionPolicy(sample_values=False, tolerance=2.0**-20, stored_planes=1)
    result = search_plan(scored(make_case(), policy), policy)
    assert result.certificate.missed.all()
    assert (result.plan.key_planes == 1).all()


@pytest.mark.parametrize("bound", BoundKind)
def test_search_meets_the_tolerance(bound):
    policy = PrecisionPolicy(sample_values=False, tolerance=2.0**-4, bound=bound)
    scores = scored(make_case(tokens=128, sharpness=1), policy)
    result = search_plan(scores, policy)
    assert not result.certificate.missed.any()
    full = fixed_plan(scores, key_planes=4, value_planes=4)
    assert result.plan.read_fraction < full.read_fraction == 1.0


def test_search_needs_fewer_bits_with_samples():
    skip = PrecisionPolicy(sample_values=False, tolerance=2.0**-4)
    sample = PrecisionPolicy(tolerance=2.0**-4, sample_values=True)
    case = make_case(tokens=3000, sharpness=2)
    bits = [search_plan(scored(case, p), p).plan.mean_bits[1] for p in (skip, sample)]
    assert bits[1] < bits[0]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_rows_are_those_of_the_contract(head_dim, dtype):
    """The compiled encoder and the NumPy one agree bit for bit."""
    case = make_case(head_dim=head_dim, dtype=dtype, tokens=70)
    encoded = encode_case(case, PrecisionPolicy(sample_values=False), page=32)
    rows = encoded.transform.keys(case.key)
    assert (rows == transformed_keys(encoded.transform, case.key.astype(np.float32))).all()
    padded = np.zeros((70, encoded.values.words.shape[1]), np.float32)
    padded[:, :head_dim] = case.value.astype(np.float32) - encoded.value_mean
    for stored, source in ((encoded.keys, rows), (encoded.values, padded)):
        planes = stored.planes()
        again = encode_rows(source, planes.dither, stored.layout)
        assert (again.words == stored.words).all()
        assert (again.scale_bits == stored.scale_bits).all()


@pytest.mark.parametrize("layout", ["4|4|4|4", "4|4|8", "3|5|8", "5|3|2|6"])
def test_scores_are_those_of_the_prefixes(layout):
    policy = PrecisionPolicy(sample_values=False, key_layout=layout)
    case = make_case(head_dim=80, positions=(20, 47), window=30)
    encoded = encode_case(case, policy)
    for index in range(2):
        scores = score_position(encoded, index)
        query = case.query[:, index].astype(np.float64)
        q = encoded.transform.exact_queries(query)
        planes = encoded.keys.span(scores.first, scores.end).planes()
        for n in range(scores.keys.stored):
            offset = encoded.transform.offsets(query, case.tokens)[:, scores.first : scores.end]
            expected = case.scaling * (q @ planes.prefix(n + 1).T + offset)
            assert np.allclose(scores.planes[n], expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_skipped_at_share_zero():
    policy = PrecisionPolicy(sample_values=False, skip_share=0.0)
    scores = scored(make_case(tokens=100, sharpness=5), policy)
    plan = align(scores, policy, theta=scores.size).plan()
    assert (plan.value_planes >= 1).all()


def test_infinite_theta_reads_first_key_planes_alone():
    """The probe of a first step: it wants log Z and the spread from first planes alone."""
    policy = PrecisionPolicy(sample_values=False, skip_share=0.0)
    scores = scored(make_case(tokens=100), policy)
    plan = align(scores, policy, theta=np.full(2, np.inf)).plan()
    assert (plan.key_planes == 1).all()
    assert (plan.value_planes == 1).all()


def test_groups_and_samples_contradict():
    policy = PrecisionPolicy(sample_values=True)
    scores = scored(make_case(), policy)
    with pytest.raises(SpecError, match="one by one"):
        align(scores, policy, theta=scores.size, groups=DecisionGroups.of(4))


def test_groups_are_positive():
    with pytest.raises(SpecError, match="positive"):
        DecisionGroups(keys=0)


@given(seed=st.integers(0, 2**20), sharpness=st.sampled_from([0.0, 1.0, 30.0]))
@settings(max_examples=20)
def test_bits_are_counted_per_row(seed, sharpness):
    policy = PrecisionPolicy(sample_values=False, key_layout="4|2|2|8", value_layout="4|4|8")
    scores = scored(make_case(seed=seed, sharpness=sharpness, tokens=20), policy)
    plan = align(scores, policy, theta=scores.size * 2.0**-8).plan()
    assert (plan.key_bits == [policy.key_layout.bits(n) for n in plan.key_planes]).all()
    assert (plan.value_bits == [policy.value_layout.bits(n) for n in plan.value_planes]).all()
    keys, values = plan.mean_bits
    assert plan.read_fraction == pytest.approx((keys + values) / 32)
