"""What every implementation of a decode step must do, whatever it is made of."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import oracles
from alignedkv.errors import ActivationError, LaunchError
from alignedkv.formats import BF16, FP16, FP32
from alignedkv.kernels.arrays import HEAD_HINTS, CacheArrays, DecodeResult, HeadState
from alignedkv.kernels.storage import allocate_numpy, exact_slots, from_float64, to_float32
from alignedkv.planes import unpack_plane
from problems import RECIPES, Problem, hinted, make, recipe
from strategies import ADVERSARIAL

UNIT = {"float16": FP16, "bfloat16": BF16, "float32": FP32}


def solve(implementation: ModuleType, problem: Problem, steps: int = 2) -> list[DecodeResult]:
    """Probe, then decode the same query a few times, each with the state of the one before."""
    p = problem
    state = implementation.probe(
        p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta, sinks=p.sinks
    )
    results = []
    for _ in range(steps):
        found = implementation.decode(p.spec, p.cache, p.query, state, p.arguments, sinks=p.sinks)
        results.append(found)
        state = found.state
    return results


def errors(problem: Problem, found: DecodeResult, exact: oracles.Exact) -> tuple[Any, Any]:
    """Error and what is allowed, [B, H]: the bound and the output's own rounding."""
    dtype = problem.spec.query_dtype
    output = to_float32(found.output, dtype).astype(np.float64)
    error = np.abs(output - exact.output).max(axis=-1)
    size = np.maximum(np.abs(output), np.abs(exact.output)).max(axis=-1)
    u = UNIT[dtype].unit_roundoff
    rounding = u / (1 - u) * size + UNIT[dtype].smallest_subnormal
    return error, found.bound.astype(np.float64) + rounding


@pytest.mark.parametrize("name", RECIPES)
def test_outputs_lie_within_their_bounds(implementation: ModuleType, name: str) -> None:
    problem = make(RECIPES[name])
    exact = problem.exact()
    for found in solve(implementation, problem):
        error, allowed = errors(problem, found, exact)
        assert (error <= allowed).all()
        _check_answer(problem, found)


def _check_answer(problem: Problem, found: DecodeResult) -> None:
    """Shapes, dtypes, and what follows from other parts of the answer."""
    spec, (batch, heads, _) = problem.spec, problem.query.shape
    kv_heads = heads // spec.group
    assert found.output.shape == problem.query.shape
    assert found.output.dtype == problem.query.dtype
    assert found.reads.shape == (batch, kv_heads, 2, spec.stored_planes)
    for name, dtype in (("bound", "f4"), ("size", "f4"), ("missed", "u1")):
        assert getattr(found, name).shape == (batch, heads)
        assert getattr(found, name).dtype == dtype
    for name in HEAD_HINTS:
        assert getattr(found.state, name).shape == (batch, heads)
        assert getattr(found.state, name).dtype == np.float32

    start = problem.cache.starts.astype(np.int64)
    if problem.arguments.window:
        start = np.maximum(start, problem.cache.lengths - problem.arguments.window)
    attended = np.maximum(problem.cache.lengths - start, 0)
    some = np.repeat(attended > 0, heads).reshape(batch, heads)
    allowed = problem.arguments.tolerance * (found.size - found.bound)
    assert (found.missed[some] == ~(found.bound <= allowed)[some]).all()
    assert not found.missed[~some].any()
    assert not to_float32(found.output, spec.query_dtype)[~some].any()

    # The first key plane of every token that is not kept exact, once a pass and part of the group;
    # planes nest.
    others = attended - _kept_exact(problem.cache, start)
    passes, rest = np.divmod(found.reads[:, :, 0, 0], np.maximum(others, 1)[:, None])
    assert not rest.any()
    assert (passes <= (1 + problem.arguments.repairs) * spec.subgroups).all()
    assert (passes >= spec.subgroups * (others > 0)[:, None]).all()
    assert (np.diff(found.reads.astype(np.int64), axis=-1) <= 0).all()


def _kept_exact(cache: CacheArrays, attended_from: NDArray[np.int64]) -> NDArray[np.int64]:
    """Attended tokens of each sequence that are kept exact [B]."""
    sequences = zip(attended_from, cache.starts, cache.lengths, strict=True)
    slots = [
        exact_slots(cache, np.arange(first, max(first, length)), start=start, length=length)
        for first, start, length in sequences
    ]
    return np.array([(slot >= 0).sum() for slot in slots])


@pytest.mark.parametrize("bound", ["estimate", "deterministic", "statistical"])
@pytest.mark.parametrize("data", ADVERSARIAL)
def test_no_data_breaks_a_bound(implementation: ModuleType, data: str, bound: str) -> None:
    problem = make(recipe(data=data, policy={"bound": bound}, shape={"batch": 1, "tokens": 167}))
    exact = problem.exact()
    for found in solve(implementation, problem):
        error, allowed = errors(problem, found, exact)
        assert (error <= allowed).all()
        if found.missed.any():  # only where 16 bits a number are too few
            assert (found.reads[:, :, :, -1] > 0).all()


@pytest.mark.parametrize("theta", [0.0, 1e-4, 0.1, np.inf])
@pytest.mark.parametrize("log_z", [-np.inf, -30.0, 0.0, 30.0, np.nan])
@pytest.mark.parametrize("spread", [0.0, 5.0, np.nan])
def test_wrong_hints_cost_bytes_not_truth(
    implementation: ModuleType, theta: float, log_z: float, spread: float
) -> None:
    problem = make(recipe(policy={"bound": "deterministic"}, shape={"batch": 1, "kv_heads": 1}))
    exact = problem.exact()
    shape = problem.query.shape[:2]
    state = HeadState(
        log_z=np.full(shape, log_z, np.float32),
        rest=np.full(shape, log_z, np.float32),
        spread=np.full(shape, spread, np.float32),
        theta=np.full(shape, theta, np.float32),
        margin=np.full(shape, spread, np.float32),
        step=np.zeros(1, np.uint32),
    )
    for repairs in (0, 1):
        arguments = replace(problem.arguments, repairs=repairs)
        found = implementation.decode(problem.spec, problem.cache, problem.query, state, arguments)
        error, allowed = errors(problem, found, exact)
        assert (error <= allowed).all()
        for name in ("log_z", "theta", "margin"):
            assert np.isfinite(getattr(found.state, name)).all()
        assert not np.isnan(found.state.rest).any()
    assert not found.missed.any()


def test_all_planes_are_read_where_theta_is_zero(implementation: ModuleType) -> None:
    problem = make(recipe(shape={"batch": 1, "tokens": 40}))
    found = implementation.decode(
        problem.spec, problem.cache, problem.query, hinted(problem, theta=0.0), problem.arguments
    )
    assert (found.reads == 40).all()


def test_the_probe_reads_first_planes_and_starts_feedback(implementation: ModuleType) -> None:
    problem = make(recipe(shape={"tokens": 500}))
    state = implementation.probe(
        problem.spec, problem.cache, problem.query, problem.arguments, start_theta=2.0**-8
    )
    exact = problem.exact()
    # Plane 1 leaves scores within e(1); log Z moves by less (theory.md, Lemma 14).
    assert np.abs(state.log_z - exact.log_z).max() < 0.5
    size = np.abs(exact.output).max(axis=-1)
    assert (state.theta / (problem.arguments.tolerance * 2.0**-8 * size)).max() < 1.5
    assert state.step[0] == 0


def test_feedback_settles_at_the_tolerance(implementation: ModuleType) -> None:
    problem = make(recipe(shape={"batch": 1, "tokens": 500}))
    found = solve(implementation, problem, steps=8)[-1]
    used = found.bound / (problem.arguments.tolerance * found.size)
    # START_MARGIN below, less what eight steps took from it; within a plane's width of it.
    assert not found.missed.any()
    assert (used > 2.0**-2.6).all()


def test_sampling_is_reproducible_and_changes_with_step_and_seed(
    implementation: ModuleType,
) -> None:
    problem = make(RECIPES["estimate-sampled"])
    p, (first, second) = problem, solve(implementation, problem)
    state = implementation.probe(p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta)

    def outputs(seed: int, step: int) -> np.ndarray:
        arguments = replace(p.arguments, seed=seed)
        at = replace(state, step=np.array([step], np.uint32))
        return implementation.decode(p.spec, p.cache, p.query, at, arguments).output

    assert (outputs(0, 0) == first.output).all()
    assert (outputs(0, 0) == outputs(0, 0)).all()
    assert (outputs(0, 0) != outputs(0, 1)).any()
    assert (outputs(0, 0) != outputs(1, 0)).any()
    assert second.state.step[0] == 2


def test_splits_change_nothing_but_rounding(implementation: ModuleType) -> None:
    for name in ("estimate", "statistical-sampled", "exact-rows-certain", "sinks", "empty"):
        p = make(RECIPES[name])
        state = implementation.probe(
            p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta, sinks=p.sinks
        )
        whole, parts = (
            implementation.decode(
                p.spec, p.cache, p.query, state, p.arguments, sinks=p.sinks, splits=splits
            )
            for splits in (1, 5)
        )
        assert (whole.reads == parts.reads).all()
        np.testing.assert_allclose(whole.bound, parts.bound, rtol=1e-5)
        np.testing.assert_allclose(whole.state.log_z, parts.state.log_z, rtol=1e-6)
        scale = np.abs(whole.output).max()
        np.testing.assert_allclose(whole.output, parts.output, atol=1e-5 * scale)


def test_masked_rows_never_leak(implementation: ModuleType) -> None:
    p = make(RECIPES["ragged"])
    first = solve(implementation, p, steps=1)[0]
    capacity = p.cache.scales.shape[2]
    for b in range(2):
        tokens = np.arange(capacity)
        masked = (tokens < p.cache.starts[b]) | (tokens >= p.cache.lengths[b])
        p.cache.scales[b][:, masked] = 0x7FC07F80  # NaN and infinity
        for plane in (*p.cache.key_planes, *p.cache.value_planes):
            plane[b][:, masked] = 0xFF
    again = solve(implementation, p, steps=1)[0]
    for name in ("output", "bound", "size", "reads"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("bound", ["estimate", "deterministic", "statistical"])
@pytest.mark.parametrize("scale", [0x7F80, 0x7FC0], ids=["inf", "nan"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_lost_row_is_reported(
    implementation: ModuleType, side: str, scale: int, bound: str
) -> None:
    p = make(recipe(policy={"bound": bound}))
    shift = 0 if side == "key" else 16
    word = int(p.cache.scales[0, 1, 50]) & ~(0xFFFF << shift)
    p.cache.scales[0, 1, 50] = word | (scale << shift)
    found = solve(implementation, p, steps=1)[0]
    hurt = np.zeros(p.query.shape[:2], bool)
    hurt[0, 3:6] = True
    assert (~np.isfinite(found.bound) == hurt).all()
    assert found.missed[hurt].all()
    assert not found.missed[~hurt].any()


def test_rows_are_encoded_where_they_belong_and_nowhere_else(implementation: ModuleType) -> None:
    for page in (None, 16):
        p = make(recipe(spec={"page_tokens": page}, shape={"tokens": 53}))
        cache = allocate_numpy(p.spec, batch=2, kv_heads=2, capacity=58)
        for array in (*cache.key_planes, *cache.value_planes, cache.scales):
            array[...] = 0xA5
        for name in ("key_mean", "balance", "value_mean"):
            getattr(cache, name)[...] = getattr(p.cache, name)
        if cache.block_table is not None:
            cache.block_table[...] = cache.block_table[::-1, ::-1].copy()
        cache.lengths[:] = (3, 1)
        keys, values = (typed(p, x)[:, :, :40] for x in (p.keys, p.values))
        implementation.encode(p.spec, cache, keys, values)
        assert cache.lengths.tolist() == [43, 41]
        touched = cache.scales != 0xA5
        assert touched.sum() == 2 * 2 * 40
        for plane in (*cache.key_planes, *cache.value_planes):
            assert (plane[~touched] == 0xA5).all()
        if page is None:
            assert touched[0, :, 3:43].all()
            assert touched[1, :, 1:41].all()


def typed(p: Problem, rows: np.ndarray) -> np.ndarray:
    """float64 copies back to the spec's row type."""
    return from_float64(rows, p.spec.row_dtype)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "d80-g1", "4|2|2|8"])
def test_dequantised_rows_lie_within_the_last_plane(implementation: ModuleType, name: str) -> None:
    p = make(RECIPES[name])
    length = p.keys.shape[2]
    keys, values = implementation.dequantise(p.spec, p.cache, tokens=length)
    half = 0.5 * 2.0**-12 * 1.03  # of the scale: half a unit and the encoder's rounding
    scales = p.cache.scales[:, :, :length]
    key_scale, value_scale = (
        to_float32(((scales >> s) & 0xFFFF).astype(np.uint16), "bfloat16").astype(float)
        for s in (0, 16)
    )
    rounding = 2.0**-23 * np.abs(p.values).max()
    assert (np.abs(values - p.values).max(axis=-1) <= half * value_scale + rounding).all()
    # Back through H, an error grows by at most the block (and beta, here 1).
    rounding = 2.0**-18 * np.abs(p.keys).max()
    block = p.spec.channels & -p.spec.channels
    assert (np.abs(keys - p.keys).max(axis=-1) <= block * half * key_scale + rounding).all()


def test_exact_rows_are_kept_and_dequantised_as_given(implementation: ModuleType) -> None:
    p = make(RECIPES["exact-rows"], encode=implementation.encode)
    start, length = p.cache.starts, p.cache.lengths
    keys, values = implementation.dequantise(p.spec, p.cache, tokens=length.max())
    for b in range(2):
        for t in (*range(start[b], start[b] + 4), *range(length[b] - 16, length[b])):
            assert (keys[b, :, t] == p.keys[b, :, t]).all()
            assert (values[b, :, t] == p.values[b, :, t]).all()


def test_appending_tokens_one_by_one_is_encoding_them_at_once(implementation: ModuleType) -> None:
    p = make(recipe(policy={"exact_first": 2, "exact_last": 3}, shape={"tokens": 23}))
    cache = allocate_numpy(p.spec, batch=2, kv_heads=2, capacity=28, exact_first=2, exact_last=3)
    for name in ("key_mean", "balance", "value_mean"):
        getattr(cache, name)[...] = getattr(p.cache, name)
    for t in range(23):
        step = (typed(p, x)[:, :, t : t + 1] for x in (p.keys, p.values))
        implementation.encode(p.spec, cache, *step)
    for name in ("scales", "lengths", "exact_keys", "exact_values"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(p.cache, name))
    for one, other in zip(
        (*cache.key_planes, *cache.value_planes),
        (*p.cache.key_planes, *p.cache.value_planes),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_numbers_are_refused_unless_masked(
    implementation: ModuleType, bad: float
) -> None:
    p = make(recipe(shape={"tokens": 20}, spec={"row_dtype": "float32"}))
    for side in (0, 1):
        cache = allocate_numpy(p.spec, batch=2, kv_heads=2, capacity=28)
        rows = [typed(p, x).copy() for x in (p.keys, p.values)]
        rows[side][1, 0, 4, 7] = bad
        with pytest.raises(ActivationError, match=r"sequence 1, KV head 0, token 4"):
            implementation.encode(p.spec, cache, *rows)
        assert cache.lengths.tolist() == [0, 0]
        cache.starts[1] = 5
        implementation.encode(p.spec, cache, *rows)
        assert cache.lengths.tolist() == [20, 20]


def test_wrong_arguments_are_refused(implementation: ModuleType) -> None:
    p = make(recipe(shape={"tokens": 20}))
    keys = typed(p, p.keys)
    state = implementation.probe(p.spec, p.cache, p.query, p.arguments, start_theta=0.01)
    with pytest.raises(LaunchError, match="room for 25"):
        implementation.encode(p.spec, p.cache, keys, keys)
    with pytest.raises(LaunchError, match="this cache takes"):
        implementation.encode(p.spec, p.cache, keys[..., :32], keys[..., :32])
    with pytest.raises(LaunchError, match="bfloat16, as uint16"):
        implementation.encode(p.spec, p.cache, p.keys, p.values)
    with pytest.raises(LaunchError, match="query has shape"):
        implementation.decode(p.spec, p.cache, p.query[:, :2], state, p.arguments)
    with pytest.raises(LaunchError, match="query are float64"):
        implementation.decode(p.spec, p.cache, p.query.astype(float), state, p.arguments)
    wrong = replace(state, theta=state.theta[:1])
    with pytest.raises(LaunchError, match=r"state\.theta"):
        implementation.decode(p.spec, p.cache, p.query, wrong, p.arguments)
    with pytest.raises(LaunchError, match="sinks given"):
        implementation.decode(
            p.spec, p.cache, p.query, state, p.arguments, sinks=np.zeros(6, np.float32)
        )


def test_stored_planes_are_the_words(implementation: ModuleType) -> None:
    """What was encoded is what `planes` says, for every layout."""
    for name in ("estimate", "4|4|8", "4|2|2|8"):
        p = make(RECIPES[name], encode=implementation.encode)
        wanted = make(RECIPES[name])
        for one, other in (
            (p.cache.key_planes, wanted.cache.key_planes),
            (p.cache.value_planes, wanted.cache.value_planes),
        ):
            for n, (mine, theirs) in enumerate(zip(one, other, strict=True)):
                np.testing.assert_array_equal(mine, theirs)
                assert unpack_plane(mine, p.spec.layout, n).any()
        np.testing.assert_array_equal(p.cache.scales, wanted.cache.scales)
