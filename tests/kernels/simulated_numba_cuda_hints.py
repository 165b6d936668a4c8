"""What the Numba CUDA kernels are told, plan and tell the next step, in Numba's simulator.

`test_numba_cuda` runs this file, in a process of its own.

By hand: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/kernels/simulated_numba_cuda_hints.py``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from alignedkv.kernels import arithmetic, numba_cuda, reference
from alignedkv.kernels.arrays import HEAD_HINTS, HeadState
from alignedkv.kernels.numba_cuda import columns
from alignedkv.kernels.numba_cuda.emit import compiled
from alignedkv.kernels.reference_hints import expected_log_z
from alignedkv.kernels.reference_plan import score_rows
from alignedkv.kernels.reference_rows import key_transform, read_rows
from alignedkv.policy import NEAR_FIRST, NEAR_LAST
from numba_cuda_checks import check_step, probed
from numba_cuda_simulation import SIMULATED, run, simulator, tiny  # noqa: F401 - a fixture
from problems import RECIPES, Problem, make, near_of, recipe

pytestmark = SIMULATED


def beyond_near(**changes: object) -> Problem:
    """One head with a dozen tokens more than are near."""
    tokens = NEAR_FIRST + NEAR_LAST + 12
    shape = {"batch": 1, "kv_heads": 1, "group": 1, "tokens": tokens}
    return make(recipe(shape=shape, **changes))


@pytest.mark.parametrize("name", ["d80-g1", "softcap", "estimate", "exact-rows", "statistical"])
def test_prepared_facts_are_the_reference_s(name: str) -> None:
    p = make(tiny(RECIPES[name]))
    state = probed(p)
    state = replace(state, rest=np.full_like(state.rest, 0.5))
    arguments = numba_cuda.launch_arguments(
        p.spec, p.cache, p.query, state, p.arguments, sinks=None, splits=1
    )
    cached, _, _, work, _ = arguments
    kernels = compiled(p.spec, threads=numba_cuda.THREADS)
    kernels.prepare[(1, p.spec.group), numba_cuda.THREADS](*arguments)

    query = p.query[0].astype(np.float64)
    transform = key_transform(p.cache, 0, 0)
    rows = read_rows(p.spec, p.cache, 0, 0, int(p.cache.starts[0]) + np.arange(3))
    rows = replace(rows, is_exact=np.zeros(3, np.bool_), exact_keys=rows.exact_keys[:0])
    scores = score_rows(p.spec, p.arguments, transform, rows, query)
    turned = p.arguments.scaling * transform.exact_queries(query)
    model = arithmetic.numba_cuda(tile=numba_cuda.THREADS)
    norm1 = np.abs(turned).sum(axis=-1)
    shift = (scores.shift / rows.keys.scale)[:, 0] + model.score_norm1 * norm1
    dither = cached.dither[0] * 2.0**-4 / 4096
    facts = work.facts[0].T
    np.testing.assert_allclose(work.queries[0], turned, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(work.products[0], turned @ dither.T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(facts[columns.NORM1], norm1, rtol=1e-12)
    np.testing.assert_allclose(facts[columns.SHIFT], shift, rtol=1e-12)

    near = near_of(p)
    origin = 0.0 if p.spec.softcap else facts[columns.BASE]
    expected = expected_log_z(near, np.float64(state.rest))[0]
    if name == "statistical":
        expected = state.log_z[0]
    else:
        np.testing.assert_allclose(facts[columns.NEAR] + origin, near.log_sum[0], rtol=1e-5)
        np.testing.assert_allclose(facts[columns.OFFSET] + origin, near.offset[0], rtol=1e-12)
    np.testing.assert_allclose(facts[columns.LOG_Z] + origin, expected, rtol=1e-5)


def test_the_probe_is_the_reference_s() -> None:
    p = make(tiny(RECIPES["ragged"]))
    wanted = probed(p)
    found = numba_cuda.probe(
        p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta, sinks=p.sinks
    )
    for name in (*HEAD_HINTS, "step"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_theta_zero_asks_for_every_plane_whatever_the_weight() -> None:
    p = make(tiny(RECIPES["estimate"]))
    state = probed(p)
    state = replace(state, theta=np.zeros_like(state.theta), rest=np.full_like(state.rest, 1e4))
    p = replace(p, arguments=replace(p.arguments, repairs=0))
    assert (run(p, state).reads == p.keys.shape[2]).all()


def test_infinite_theta_asks_for_first_planes_alone() -> None:
    p = make(tiny(RECIPES["estimate"]))
    p = replace(p, arguments=reference.coarse(p.arguments))
    found = run(p, reference.unknown_state(*p.query.shape[:2]))
    tokens = p.keys.shape[2]
    assert found.reads.tolist() == [[[[tokens, 0, 0, 0], [tokens, 0, 0, 0]]]]


@pytest.mark.parametrize("hint", [0.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("bound", ["deterministic", "statistical"])
def test_wrong_hints_cost_bytes_not_truth(bound: str, hint: float) -> None:
    problem = make(tiny(recipe(policy={"bound": bound, "tolerance": 2.0**-6})))
    shape = problem.query.shape[:2]
    hints = {name: np.full(shape, abs(hint), np.float32) for name in HEAD_HINTS}
    hints["log_z"][:] = hints["rest"][:] = hint
    found = run(problem, HeadState(**hints, step=np.zeros(1, np.uint32)))
    error = np.abs(found.output - problem.exact().output).max(axis=-1)
    assert (error <= found.bound + 2.0**-24 * found.size).all()
    assert not found.missed.any()
    for name in ("log_z", "theta", "margin"):
        assert np.isfinite(getattr(found.state, name)).all()
    assert not np.isnan(found.state.rest).any()


@pytest.mark.parametrize("bound", ["estimate", "deterministic"])
def test_the_rest_is_learned_beyond_the_near_rows(bound: str) -> None:
    p = beyond_near(policy={"bound": bound}, arguments={"repairs": 0})
    states = [replace(probed(p), rest=np.full((1, 1), -np.inf, np.float32))]
    for query in (-p.query, 0.5 * p.query, 0.25 * p.query):
        at = replace(p, query=query)
        found = run(at, states[-1])
        check_step(at, states[-1], found)
        states.append(found.state)
    rests = [float(state.rest[0, 0]) for state in states]
    assert rests[0] == -np.inf
    assert np.isfinite(rests[1:]).all()
    assert len(set(rests)) == len(rests)


def test_a_heavier_rest_is_a_lighter_row() -> None:
    p = beyond_near(arguments={"repairs": 0})
    state = probed(p)
    read = [
        int(run(p, replace(state, rest=state.rest + np.float32(more))).reads.sum())
        for more in (-2.0, 4.0)
    ]
    assert read[0] > read[1]


@pytest.mark.parametrize(("theta", "missed"), [(np.inf, True), (0.0, False)])
def test_the_margin_follows_misses(theta: float, missed: bool) -> None:
    p = make(tiny(recipe(arguments={"repairs": 0})))
    state = probed(p)
    for told, held, widened in ((0.0, 0.15, 0.25), (1.0, 0.998, 1.25), (2.9, 2.898, 3.0)):
        state = replace(
            state, theta=np.full_like(state.theta, theta), margin=np.full_like(state.theta, told)
        )
        found = run(p, state)
        check_step(p, state, found)
        assert (found.missed == missed).all()
        np.testing.assert_allclose(found.state.margin, widened if missed else held)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("theta", [2.0**-7, 2.0**-9, 2.0**-11])
def test_settled_plans_are_the_reference_s(theta: float, sampled: bool) -> None:
    """Most tokens use fewer planes than were read for them, and some may stop at either of two."""
    p = make(
        recipe(
            policy={"bound": "statistical", "sample_values": sampled, "dither_rows": 32},
            shape={"batch": 1, "kv_heads": 1, "group": 2, "tokens": 46},
            arguments={"repairs": 0},
        )
    )
    state = probed(p)
    state = replace(state, theta=np.full_like(state.theta, theta))
    found = run(p, state, splits=2)
    check_step(p, state, found)
    wanted = reference.decode(p.spec, p.cache, p.query, state, p.arguments)
    # Three planes leave open sixteen times what four do, of which float32 is a quarter.
    assert (found.bound <= (1 + 2.0**-6) * wanted.bound).all()
