"""What a step tells itself and the next: near rows, the remembered rest, adaptive feedback."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from alignedkv.kernels.arrays import DecodeResult, HeadState
from alignedkv.kernels.reference_hints import Near, expected_log_z, near_rows, next_rest
from alignedkv.kernels.reference_rows import read_rows
from alignedkv.policy import (
    FEEDBACK_GAIN,
    LEAST_REST,
    MARGIN_FALL,
    MARGIN_RANGE,
    MARGIN_RISE,
    NEAR_FIRST,
    NEAR_LAST,
    REST_GAIN,
    START_MARGIN,
)
from problems import RECIPES, Problem, Recipe, hinted, make, near_of, recipe, rest_of, stored
from strategies import Shape, activations


def decode(
    implementation: ModuleType, p: Problem, state: HeadState, **changes: Any
) -> DecodeResult:
    arguments = replace(p.arguments, **changes)
    found: DecodeResult = implementation.decode(
        p.spec, p.cache, p.query, state, arguments, sinks=p.sinks
    )
    return found


# Near rows.


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("as many as are near", {"shape": {"tokens": NEAR_FIRST + NEAR_LAST + 1}}),
        ("two", {"shape": {"tokens": 2}}),
        ("more", {"shape": {"tokens": 300}}),
        ("window", {"shape": {"tokens": 300}, "arguments": {"window": 200}}),
        ("padding", {"shape": {"tokens": 300}, "starts": (0, 90), "lengths": (260, 300)}),
        ("exact rows", {"shape": {"tokens": 300}, "policy": {"exact_first": 2, "exact_last": 9}}),
        ("softcap", {"shape": {}, "spec": {"softcap": True}, "arguments": {"softcap": 3.0}}),
    ],
)
def test_near_rows_are_summed_from_their_first_planes(name: str, changes: dict[str, Any]) -> None:
    """Against the oracles' digits and Hadamard matrix, token by token."""
    p = make(recipe(**{**changes, "shape": {"kv_heads": 1, "group": 2, **changes["shape"]}}))
    found = near_of(p)
    for b, head in np.ndindex(*p.query.shape[:2]):
        length, start = int(p.cache.lengths[b]), int(p.cache.starts[b])
        if p.arguments.window:
            start = max(start, length - p.arguments.window)
        total = 0.0
        for t in range(start, length):
            newest = length - 1
            if t < newest and (t < start + NEAR_FIRST or t >= newest - NEAR_LAST):
                score, cap = score_of_first_plane(p, b, head, t), p.arguments.softcap
                total += np.exp(cap * np.tanh(score / cap) if cap else score)
        np.testing.assert_allclose(found.log_sum[b, head], np.log(total), rtol=0, atol=1e-9)


def score_of_first_plane(p: Problem, b: int, head: int, t: int) -> float:
    """Of a token of KV head 0, before a cap."""
    query = p.query[b, head].astype(np.float64)
    turned = oracles.hadamard_matrix(64) * p.cache.signs @ (p.cache.balance[b, 0] * query)
    score = turned @ first_plane(p, b, t) + query @ p.cache.key_mean[b, 0]
    return float(p.arguments.scaling * score)


def first_plane(p: Problem, b: int, t: int) -> np.ndarray:
    """k' of KV head 0 as one plane tells it."""
    row = read_rows(p.spec, p.cache, b, 0, np.array([t])).keys
    digits = oracles.prefix_of(
        row.words[0].tolist(), row.dither[0].tolist(), Fraction(row.scale[0]), row.layout.widths, 1
    )
    return np.array([float(x) for x in digits])


def test_nothing_is_near_in_an_empty_sequence() -> None:
    p = make(RECIPES["empty"])
    near = near_of(p)
    assert np.isneginf(near.log_sum[1]).all()
    assert np.isfinite(near.log_sum[0]).all()
    assert np.isfinite(near.offset).all()


@given(st.integers(0, 400))
def test_near_rows_are_the_first_and_the_last_but_the_newest(count: int) -> None:
    near = near_rows(count)
    older = max(count - 1, 0)
    assert near.sum() == min(older, NEAR_FIRST + NEAR_LAST)
    assert near[: min(NEAR_FIRST, older)].all()
    assert near[max(older - NEAR_LAST, 0) : older].all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_the_offset_is_what_normal_keys_add_to_log_z(head_dim: int, size: float) -> None:
    """log Z less log T is the mean score and half the variance.

    NEAR_SPREAD stands for 7.5 g / sqrt 8; the largest of 64 to 256 normal numbers is 2.4 to 2.9
    deviations.
    """
    shape = Shape(tokens=2000, head_dim=head_dim, group=4)
    normal = activations("normal", shape, seed=1)
    given = replace(normal, keys=normal.keys + 0.5, query=size * normal.query)
    p = stored(Recipe(shape=shape), given)
    scores = p.arguments.scaling * np.einsum("bhd,btd->bht", p.query, p.keys[:, 0])
    half_variance = scores.var(axis=-1) / 2
    offset = near_of(p).offset - scores.mean(axis=-1)
    assert (np.abs(offset / half_variance - 1) < 0.4).all()


def test_the_offset_under_a_softcap_is_the_capped_mean() -> None:
    p = make(recipe(spec={"softcap": True}, arguments={"softcap": 3.0}))
    p.cache.key_mean[:] = 1.0
    base = p.arguments.scaling * p.query.astype(np.float64).sum(axis=-1)
    np.testing.assert_allclose(near_of(p).offset, 3.0 * np.tanh(base / 3.0), rtol=1e-12)


# The rest.

numbers = st.floats(-50, 50)


@given(numbers, st.floats(2.0**-9, 60), numbers)
def test_what_a_step_found_is_what_the_next_expects(
    log_sum: float, beyond: float, offset: float
) -> None:
    near = Near(log_sum=np.array(log_sum), offset=np.array(offset))
    log_z = np.array(log_sum + beyond)
    with np.errstate(invalid="ignore"):
        rest = next_rest(np.array(-np.inf), near, log_z)
    np.testing.assert_allclose(expected_log_z(near, rest), log_z, rtol=0, atol=1e-10)


@given(numbers, st.floats(0.01, 60), numbers, numbers)
def test_the_rest_goes_a_quarter_of_the_way(
    log_sum: float, beyond: float, offset: float, rest: float
) -> None:
    near = Near(log_sum=np.array(log_sum), offset=np.array(offset))
    with np.errstate(invalid="ignore"):
        found = next_rest(np.array(-np.inf), near, np.array(log_sum + beyond))
    moved = next_rest(np.array(rest), near, np.array(log_sum + beyond))
    np.testing.assert_allclose(moved - found, (1 - REST_GAIN) * (rest - found), atol=1e-10)


@pytest.mark.parametrize(
    ("log_sum", "log_z"),
    [(2.0, 2.0), (2.0, 1.0), (2.0, 2.0 + LEAST_REST / 2), (-np.inf, 1.0), (-np.inf, -np.inf),
     (np.nan, 1.0), (2.0, np.nan), (2.0, np.inf)],
)  # fmt: skip
@pytest.mark.parametrize("rest", [-np.inf, 0.5])
def test_the_rest_stays_where_a_step_says_nothing_of_it(
    log_sum: float, log_z: float, rest: float
) -> None:
    near = Near(log_sum=np.array(log_sum), offset=np.array(0.0))
    with np.errstate(all="ignore"):
        assert next_rest(np.array(rest), near, np.array(log_z)) == rest


def test_lost_near_rows_expect_nothing() -> None:
    near = Near(log_sum=np.array([np.nan, 1.0]), offset=np.array([0.0, np.nan]))
    with np.errstate(invalid="ignore"):
        assert np.isneginf(expected_log_z(near, np.zeros(2))).all()


def test_the_rest_of_a_constant_query_converges_geometrically(implementation: ModuleType) -> None:
    p = make(recipe(shape={"tokens": 400}))
    state = hinted(p, theta=0.0, log_z=p.exact().log_z + 2.0)
    errors = []
    settled = rest_of(p, p.exact().log_z)
    for _ in range(6):
        errors.append(state.rest - settled)
        following = decode(implementation, p, state).state
        state = replace(following, theta=state.theta)  # all planes: the same log Z every time
    assert (np.abs(errors[0]) > 1).all()
    # float32 scores, the last plane, and rests held in float32.
    np.testing.assert_allclose(errors[5], (1 - REST_GAIN) ** 5 * errors[0], rtol=0.01, atol=1e-3)


def test_the_newest_row_is_rest(implementation: ModuleType) -> None:
    tokens = NEAR_FIRST + NEAR_LAST + 1
    p = make(
        recipe(
            shape={"tokens": tokens, "batch": 1, "kv_heads": 1, "group": 2},
            policy={"bound": "deterministic"},
        )
    )
    found = decode(implementation, p, hinted(p, theta=np.inf), repairs=0)
    scores = [score_of_first_plane(p, 0, head, tokens - 1) for head in range(2)]
    np.testing.assert_allclose(found.state.rest[0], scores - near_of(p).offset[0], atol=1e-3)


@pytest.mark.parametrize("bound", ["estimate", "deterministic", "statistical"])
def test_only_a_statistical_bound_plans_with_the_log_z_of_the_step_before(
    implementation: ModuleType, bound: str
) -> None:
    """Its hints may not depend on this step's dither (theory.md 5.3)."""
    p = make(recipe(shape={"tokens": 400}, policy={"bound": bound}))
    size = np.abs(p.exact().output).max()
    state = hinted(p, theta=2.0**-14 * size, log_z=p.exact().log_z)

    def reads(**changes: float) -> np.ndarray:
        wrong = {name: np.full_like(state.rest, value) for name, value in changes.items()}
        found = decode(implementation, p, replace(state, **wrong), repairs=0)
        if bound == "statistical" and wrong.get("rest") is not None:
            assert (found.state.rest == wrong["rest"]).all()
        return found.reads

    settled = bound == "statistical"
    assert (reads() == reads(log_z=30.0)).all() != settled
    assert (reads() == reads(rest=30.0)).all() == settled


def test_a_known_rest_saves_bytes(implementation: ModuleType) -> None:
    p = make(recipe(shape={"tokens": 700}))
    exact = p.exact()
    size = np.abs(exact.output).max(axis=-1)
    known = hinted(p, theta=2.0**-13 * size, log_z=exact.log_z, spread=size)
    unknown = replace(known, rest=np.full_like(known.rest, -np.inf))
    told, untold = (decode(implementation, p, s, repairs=0) for s in (known, unknown))
    assert told.reads.sum() < 0.97 * untold.reads.sum()
    assert np.isfinite(untold.state.rest).all()


# Feedback.


def test_a_miss_widens_the_margin_and_theta_aims_at_it(implementation: ModuleType) -> None:
    p = make(recipe(policy={"tolerance": 2.0**-9}))
    exact = p.exact()
    size = np.abs(exact.output).max(axis=-1)
    second = np.arange(6) >= 3  # KV head: what one head asks for is read for its group
    theta = np.where(second, 2.0**-7, 2.0**-19) * size
    state = hinted(p, theta=theta, log_z=exact.log_z, spread=size)
    state.margin[:, :] = [START_MARGIN, np.nan, 0.155, 2.9, 0.15, np.nan]
    first, repaired = (decode(implementation, p, state, repairs=r) for r in (0, 1))
    assert (first.missed == second).all()
    margin = np.where(np.isnan(state.margin), START_MARGIN, state.margin)
    wanted = np.clip(margin + np.where(first.missed, MARGIN_RISE, -MARGIN_FALL), *MARGIN_RANGE)
    np.testing.assert_allclose(first.state.margin, wanted, rtol=1e-6)
    bits = np.log2(p.arguments.tolerance * first.size / first.bound) - wanted
    moved = np.log2(first.state.theta) - np.log2(state.theta)
    np.testing.assert_allclose(moved, np.clip(FEEDBACK_GAIN * bits, -2, 2), atol=1e-4)

    # All of it comes from the first pass; a repair's answer has its own log Z.
    assert not repaired.missed.any()
    for name in ("theta", "margin", "rest"):
        np.testing.assert_array_equal(getattr(first.state, name), getattr(repaired.state, name))
    assert (first.state.log_z != repaired.state.log_z).any()


def test_feedback_stays_where_there_is_nothing_to_aim_at(implementation: ModuleType) -> None:
    """An output of zeros, a lost row, an empty sequence."""
    p = make(recipe(starts=(0, 133)))
    shape = Shape(batch=2, kv_heads=2, group=3)
    normal = activations("normal", shape)
    zeros = stored(Recipe(shape=shape), replace(normal, values=0 * normal.values))
    lost = make(recipe())
    lost.cache.scales[0, 0, 5] = 0x7FC0
    for problem, mine in ((zeros, np.s_[:]), (lost, np.s_[0, :3]), (p, np.s_[1])):
        state = hinted(problem, theta=0.25, log_z=9.0)
        state.margin[...] = 1.5
        found = decode(implementation, problem, state).state
        assert (found.theta[mine] == 0.25).all()
        assert (found.margin[mine] == 1.5).all()
        if problem is not zeros:
            np.testing.assert_array_equal(found.rest[mine], state.rest[mine])
            assert (found.margin != 1.5).any()


def test_a_probe_leaves_a_rest_and_a_fresh_margin(implementation: ModuleType) -> None:
    p = make(recipe(shape={"tokens": 400}, policy={"tolerance": 2.0**-12}))
    state = implementation.probe(p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta)
    assert (state.margin == START_MARGIN).all()
    # First planes tell it.
    assert np.abs(state.rest - rest_of(p, p.exact().log_z)).max() < 0.5
