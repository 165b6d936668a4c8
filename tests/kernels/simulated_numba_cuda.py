"""The Numba CUDA kernels in Numba's simulator.

`test_numba_cuda` runs this file, in a process of its own.

By hand: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/kernels/simulated_numba_cuda.py``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alignedkv.kernels import arithmetic, numba_cuda, reference
from alignedkv.kernels.arrays import CacheArrays, DecodeResult, HeadState
from alignedkv.kernels.numba_cuda import columns
from alignedkv.kernels.numba_cuda.emit import compiled
from alignedkv.kernels.reference_plan import key_transform, read_rows, score_rows
from numba_cuda_checks import NAMES, check_step, probed
from problems import RECIPES, SMALL, Problem, Recipe, make, recipe
from strategies import ADVERSARIAL, Shape

pytestmark = [
    pytest.mark.skipif(
        not numba_cuda.SIMULATED, reason="set NUMBA_ENABLE_CUDASIM=1 before Numba is imported"
    ),
    # NumPy warns where a device is silent.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the simulator safe and quick, and new arrays full of NaN.

    Two of its threads may allocate one shared array twice, as it looks and then writes; and its
    threads wait for each other most of the time.
    """
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    lock = threading.Lock()

    def shared_array(self: Any, shape: Any, dtype: Any) -> Any:
        frame = sys._getframe(1)
        with lock:
            place = (frame.f_code, frame.f_lineno)
            return self._allocations.setdefault(place, np.empty(shape, dtype))

    def poisoned(shape: tuple[int, ...], dtype: str) -> Any:
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xFF
        return array

    monkeypatch.setattr(FakeCUDAShared, "array", shared_array)
    monkeypatch.setattr(numba_cuda, "_new", poisoned)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def tiny(large: Recipe) -> Recipe:
    """A recipe with as few tokens as its group and head size leave time for."""
    shape = large.shape
    group = min(shape.group, 2) if shape.group <= SMALL.group else shape.group
    tokens = max(6, min(shape.tokens, 28, 28 * 128 // (group * shape.head_dim)))
    shrunk = Shape(
        batch=2 if large.starts or large.lengths else 1,
        kv_heads=1,
        group=group,
        tokens=tokens,
        head_dim=shape.head_dim,
    )

    def scaled(positions: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return positions and tuple(t * tokens // shape.tokens for t in positions)

    arguments = dict(large.arguments)
    if "window" in arguments:
        arguments["window"] = arguments["window"] * tokens // shape.tokens
    return replace(
        large,
        shape=shrunk,
        starts=scaled(large.starts),
        lengths=scaled(large.lengths),
        arguments=arguments,
    )


#: What the shared recipes leave out once they are tiny.
MORE = {
    # The order of dither rows is a hash of the block of tokens, and the identity in the first.
    "later-classes": Recipe(
        shape=Shape(batch=1, kv_heads=1, group=1, tokens=90),
        policy={"dither_rows": 32, "bound": "deterministic"},
        starts=(70,),
    ),
    "all-rows-exact-certain": recipe(policy={"exact_first": 200, "bound": "deterministic"}),
}


def run(problem: Problem, state: HeadState, **options: Any) -> DecodeResult:
    p = problem
    return numba_cuda.decode(p.spec, p.cache, p.query, state, p.arguments, sinks=p.sinks, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_reference_s(name: str) -> None:
    problem = make(tiny(RECIPES[name]))
    state = probed(problem)
    check_step(problem, state, run(problem, state, splits=1))


def test_later_blocks_of_dither_rows_are_those_of_the_reference() -> None:
    problem = make(MORE["later-classes"])
    state = probed(problem)
    check_step(problem, state, run(problem, state))


def test_rows_that_are_all_exact_have_no_error_but_of_sums() -> None:
    problem = make(tiny(MORE["all-rows-exact-certain"]))
    state = probed(problem)
    check_step(problem, state, run(problem, state))


@pytest.mark.parametrize("name", ["d80-g1", "softcap"])
def test_prepared_facts_are_the_reference_s(name: str) -> None:
    p = make(tiny(RECIPES[name]))
    arguments = numba_cuda.launch_arguments(
        p.spec, p.cache, p.query, probed(p), p.arguments, sinks=None, splits=1
    )
    cached, _, _, work, _ = arguments
    kernels = compiled(p.spec, threads=numba_cuda.THREADS)
    kernels.prepare[(1, p.spec.group), numba_cuda.THREADS](*arguments)

    query = p.query[0].astype(np.float64)
    transform = key_transform(p.cache, 0, 0)
    rows = read_rows(p.spec, p.cache, 0, 0, np.arange(3))
    scores = score_rows(p.spec, p.arguments, transform, rows, query)
    turned = p.arguments.scaling * transform.exact_queries(query)
    model = arithmetic.numba_cuda(tile=numba_cuda.THREADS)
    norm1 = np.abs(turned).sum(axis=-1)
    shift = (scores.shift / rows.keys.scale)[:, 0] + model.score_norm1 * norm1
    dither = cached.dither[0] * 2.0**-4 / 4096
    np.testing.assert_allclose(work.queries[0], turned, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(work.products[0], turned @ dither.T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(work.facts[0, :, columns.NORM1], norm1, rtol=1e-12)
    np.testing.assert_allclose(work.facts[0, :, columns.SHIFT], shift, rtol=1e-12)


def test_theta_zero_asks_for_every_plane_whatever_the_weight() -> None:
    p = make(tiny(RECIPES["estimate"]))
    state = probed(p)
    state = replace(state, theta=np.zeros_like(state.theta), log_z=np.full_like(state.log_z, 1e4))
    p = replace(p, arguments=replace(p.arguments, repairs=0))
    assert (run(p, state).reads == p.keys.shape[2]).all()


@pytest.mark.parametrize("data", ADVERSARIAL)
def test_no_data_breaks_a_bound(data: str) -> None:
    shape = Shape(batch=1, kv_heads=1, group=1, tokens=23)
    problem = make(Recipe(data=data, shape=shape, policy={"bound": "deterministic"}))
    found = run(problem, probed(problem))
    error = np.abs(found.output - problem.exact().output).max(axis=-1)
    assert (error <= found.bound + 2.0**-24 * found.size + 2.0**-149).all()


def test_the_probe_is_the_reference_s() -> None:
    p = make(tiny(RECIPES["ragged"]))
    wanted = probed(p)
    found = numba_cuda.probe(
        p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta, sinks=p.sinks
    )
    for name in ("log_z", "spread", "theta", "step"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)


@pytest.mark.parametrize("name", ["estimate-sampled", "sinks-certain", "exact-rows"])
def test_splits_change_nothing_but_rounding(name: str) -> None:
    problem = make(tiny(RECIPES[name]))
    state = probed(problem)
    whole, parts = (run(problem, state, splits=splits) for splits in (1, 3))
    np.testing.assert_array_equal(whole.reads, parts.reads)
    np.testing.assert_allclose(whole.bound, parts.bound, rtol=1e-6)
    np.testing.assert_allclose(whole.state.log_z, parts.state.log_z, rtol=1e-6)
    np.testing.assert_allclose(whole.output, parts.output, atol=1e-5 * np.abs(whole.output).max())


def test_draws_are_the_reference_s_for_every_seed_and_step() -> None:
    p = make(tiny(RECIPES["estimate-sampled"]))
    p = replace(p, arguments=replace(p.arguments, skip_share=1.0, repairs=0))
    state = probed(p)
    outputs = []  # of some draws at odds of about one in two
    for seed, step in ((0, 0), (0, 2**32 - 1), (123456789, 0)):
        p = replace(p, arguments=replace(p.arguments, seed=seed))
        at = replace(state, step=np.array([step], np.uint32))
        found = run(p, at)
        check_step(p, at, found)
        outputs.append(found.output)
    assert (outputs[0] != outputs[1]).any()
    assert (outputs[0] != outputs[2]).any()


@pytest.mark.parametrize("hint", [0.0, np.inf, -np.inf, np.nan])
def test_wrong_hints_cost_bytes_not_truth(hint: float) -> None:
    problem = make(tiny(RECIPES["deterministic"]))
    shape = problem.query.shape[:2]
    state = HeadState(
        log_z=np.full(shape, hint, np.float32),
        spread=np.full(shape, abs(hint), np.float32),
        theta=np.full(shape, abs(hint), np.float32),
        step=np.zeros(1, np.uint32),
    )
    found = run(problem, state)
    error = np.abs(found.output - problem.exact().output).max(axis=-1)
    assert (error <= found.bound + 2.0**-24 * found.size).all()
    assert not found.missed.any()


def test_pages_lie_where_the_block_table_says() -> None:
    p = make(tiny(RECIPES["pages-of-16"]))
    state = probed(p)
    first = run(p, state)
    moved = np.random.default_rng(0).permutation(len(p.cache.scales))
    back = np.argsort(moved)
    cache: CacheArrays = replace(
        p.cache,
        key_planes=tuple(plane[back] for plane in p.cache.key_planes),
        value_planes=tuple(plane[back] for plane in p.cache.value_planes),
        scales=p.cache.scales[back],
        block_table=moved[p.cache.block_table].astype(np.int32),
    )
    assert (cache.block_table != p.cache.block_table).any()
    again = run(replace(p, cache=cache), state)
    for name in ("output", "bound", "reads"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_masked_rows_never_leak() -> None:
    p = make(tiny(RECIPES["ragged"]))
    state = probed(p)
    first = run(p, state)
    tokens = np.arange(p.cache.scales.shape[2])
    for b in range(2):
        masked = (tokens < p.cache.starts[b]) | (tokens >= p.cache.lengths[b])
        assert masked.any()
        p.cache.scales[b][:, masked] = 0x7FC07F80  # NaN and infinity
        for plane in (*p.cache.key_planes, *p.cache.value_planes):
            plane[b][:, masked] = 0xFF
    again = run(p, state)
    for name in ("output", "bound", "size", "reads"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("bound", ["estimate", "deterministic"])
@pytest.mark.parametrize("scale", [0x7F80, 0x7FC0], ids=["inf", "nan"])
@pytest.mark.parametrize("shift", [0, 16], ids=["key", "value"])
def test_a_lost_row_is_reported(shift: int, scale: int, bound: str) -> None:
    p = make(recipe(policy={"bound": bound}, shape={"batch": 1, "group": 1, "tokens": 20}))
    state = probed(p)
    word = int(p.cache.scales[0, 1, 13]) & ~(0xFFFF << shift)
    p.cache.scales[0, 1, 13] = word | (scale << shift)
    found = run(p, state)
    assert np.isfinite(found.bound).tolist() == [[True, False]]
    assert found.missed.tolist() == [[0, 1]]


def test_infinite_theta_asks_for_first_planes_alone() -> None:
    p = make(tiny(RECIPES["estimate"]))
    p = replace(p, arguments=reference.coarse(p.arguments))
    found = run(p, reference.unknown_state(*p.query.shape[:2]))
    tokens = p.keys.shape[2]
    assert found.reads.tolist() == [[[[tokens, 0, 0, 0], [tokens, 0, 0, 0]]]]
