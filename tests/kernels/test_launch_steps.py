"""Steps against the reference and the exact answer; on a GPU, and in part without one."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import oracles
from alignedkv.errors import LaunchError
from alignedkv.formats import BF16, FP16, FP32
from alignedkv.kernels import launch, reference
from alignedkv.kernels.arrays import HEAD_HINTS, CacheArrays, DecodeResult, HeadState
from alignedkv.kernels.compile import build
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.device import device_target
from alignedkv.kernels.launch import steps
from alignedkv.kernels.legality import default_config, restrictions
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import allocate_numpy, to_float32
from alignedkv.kernels.target import SM90
from alignedkv.kernels.workspace import Workspace, allocate_workspace
from emulator.machines import Emulated, Gpu, Machine, emulate_places
from problems import RECIPES, Problem, Recipe, make, recipe, stored
from strategies import Activations, Shape

UNIT = {"float16": FP16, "bfloat16": BF16, "float32": FP32}
#: Recipes that host threads solve in seconds each.
QUICK = ("estimate", "one-token", "d96-g5", "pages-of-16")
#: What a configuration may have otherwise than the default.
CHANGES: tuple[dict[str, Any], ...] = (
    {"warps": 4},
    {"blocks_per_sm": 1},
    {"key_stages": 2},
    {"key_stages": 3, "warps": 4},
    {"strided_tiles": False},
    {"waves": 2},
)
LONG = recipe(shape={"tokens": 3000, "batch": 1})
STEP_RECIPE = recipe(
    spec={"row_dtype": "float32", "query_dtype": "float32"},
    policy={"exact_first": 2, "exact_last": 3},
    shape={"tokens": 150},
)
#: Bytes before and behind every array of a guarded workspace.
GUARD = 256
PATTERN = 0xC7


# ---- to the GPU and back ------------------------------------------------------------------------


def uploaded(part: Any, machine: Machine) -> Any:
    """A dataclass of NumPy arrays with its arrays on a machine."""
    moved: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, np.ndarray):
            value = machine.put(value)
        elif isinstance(value, tuple):
            value = tuple(machine.put(array) for array in value)
        moved[field.name] = value
    return type(part)(**moved)


def downloaded(part: Any, machine: Machine) -> Any:
    """A dataclass of a machine's arrays as NumPy arrays."""
    moved: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, HeadState):
            value = downloaded(value, machine)
        elif isinstance(value, tuple):
            value = tuple(machine.get(array) for array in value)
        elif hasattr(value, "shape"):
            value = np.array(machine.get(value))
        moved[field.name] = value
    return type(part)(**moved)


def on_machine(problem: Problem, machine: Machine) -> dict[str, Any]:
    """Arguments of `launch.decode` but for the state."""
    return {
        "spec": problem.spec,
        "cache": uploaded(problem.cache, machine),
        "query": machine.put(problem.query, problem.spec.query_dtype),
        "arguments": problem.arguments,
        "sinks": None if problem.sinks is None else machine.put(problem.sinks),
    }


def errors(problem: Problem, found: DecodeResult, exact: oracles.Exact) -> tuple[Any, Any]:
    """Error and what is allowed, [B, H]: the bound and the output's own rounding."""
    dtype = UNIT[problem.spec.query_dtype]
    output = to_float32(found.output, problem.spec.query_dtype).astype(np.float64)
    error = np.abs(output - exact.output).max(axis=-1)
    size = np.maximum(np.abs(output), np.abs(exact.output)).max(axis=-1)
    u = dtype.unit_roundoff
    return error, found.bound.astype(np.float64) + u / (1 - u) * size + dtype.smallest_subnormal


@pytest.fixture(scope="module")
def built() -> None:
    """Kernels of all recipes, compiled on all cores before the first of them runs."""
    target = device_target(0)
    specs = {make(each).spec for each in (*RECIPES.values(), STEP_RECIPE)}
    wanted = {(spec, default_config(spec, target)) for spec in specs}
    spec = make(LONG).spec
    wanted |= {(spec, replace(default_config(spec, target), **change)) for change in CHANGES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(build, *each, file, target.arch)
            for each in wanted
            for file in ("decode.cu", "prepare.cu")
        ]
        for job in jobs:
            job.result()


@pytest.fixture
def gpu(built: None) -> Gpu:
    """A GPU whose kernels are compiled."""
    return Gpu()


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Host threads for a few recipes, or for all with ``--slow``; a GPU for all."""
    if request.param == "gpu":
        return request.getfixturevalue("gpu")
    name = request.getfixturevalue("name")
    if name not in QUICK and not request.config.getoption("--slow"):
        pytest.skip("runs on host threads only with --slow")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile kernels for the host")
    emulate_places(monkeypatch)
    return Emulated()


# ---- answers ------------------------------------------------------------------------------------


def solve(
    problem: Problem, machine: Machine, steps: int = 2
) -> Iterator[tuple[HeadState, DecodeResult]]:
    """Probe, then decode the same query; each step with the state that it was given."""
    given = on_machine(problem, machine)
    state = launch.probe(**given, start_theta=problem.start_theta)
    for _ in range(steps):
        before = downloaded(state, machine)
        found = launch.decode(**given, state=state)
        yield before, downloaded(found, machine)
        state = found.state


@pytest.mark.parametrize("name", RECIPES)
def test_errors_lie_within_bounds(name: str, machine: Machine) -> None:
    """Repairs included."""
    p = make(RECIPES[name])
    exact = p.exact()
    for _, found in solve(p, machine):
        error, allowed = errors(p, found, exact)
        assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("name", RECIPES)
def test_planes_read_are_the_references_and_bounds_no_smaller(name: str, machine: Machine) -> None:
    """Of the first pass: near the tolerance, where bounds differ, only one side may repair."""
    p = make(RECIPES[name])
    p = replace(p, arguments=replace(p.arguments, repairs=0))
    for state, found in solve(p, machine):
        wanted = reference.decode(p.spec, p.cache, p.query, state, p.arguments, sinks=p.sinks)
        reads, wanted_reads = found.reads.astype(np.int64), wanted.reads.astype(np.int64)
        # A tie of float32: the score of a row within 2^-10 of a threshold.
        assert np.abs(reads - wanted_reads).sum() <= 4 + 0.002 * wanted_reads.sum()
        same = np.repeat((reads == wanted_reads).all(axis=(2, 3)), p.spec.group, axis=1)
        same &= np.isfinite(wanted.bound)
        slack = 1 - 2.0**-10  # sums of float32
        assert (found.bound[same] >= slack * wanted.bound[same]).all()
        log_z, wanted_log_z = found.state.log_z[same], wanted.state.log_z[same]
        np.testing.assert_allclose(log_z, wanted_log_z, atol=2.0**-12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile kernels for the host")
@pytest.mark.parametrize("seed", [2, 3])
def test_rows_that_repeat_do_not_err_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows in turn: rounded alike, their weights would err 3.3 and 1.2 of the estimate."""
    emulate_places(monkeypatch)
    rng = np.random.default_rng(seed)
    shape = Shape(batch=1, kv_heads=1, group=4, tokens=4096, head_dim=64)
    rows = rng.normal(size=(2, 3, 64))
    keys, values = rows[:, np.arange(shape.tokens) % 3][:, None, None]
    given = Activations(keys=keys, values=values, query=0.3 * rng.normal(size=(1, 4, 64)))
    p = stored(Recipe(shape=shape, policy={"tolerance": 2.0**-4}), given)
    exact = p.exact()
    for _, found in solve(p, Emulated(), steps=4):
        error, allowed = errors(p, found, exact)
        assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("name", RECIPES)
def test_blocks_go_where_the_work_was(
    name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads what, the answer lies within its bound; told is what was read."""
    monkeypatch.setattr(steps, "blocks_go_by_work", lambda *_, **__: True)
    p = make(RECIPES[name])
    exact = p.exact()
    told = np.zeros(p.query.shape[:2])
    for before, found in solve(p, machine):
        np.testing.assert_array_equal(before.work, told)
        error, allowed = errors(p, found, exact)
        assert (error <= allowed).all(), (error / allowed).max()
        reads = np.repeat(found.reads.sum(axis=(2, 3)), p.spec.group, axis=1)
        told = found.state.work
        read_again = told != reads
        assert (told[read_again] == before.work[read_again]).all()
        if not p.arguments.repairs:
            assert not told.any()


@pytest.mark.parametrize("name", ["estimate"])
def test_a_wrong_hint_of_work_costs_time_alone(
    name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "blocks_go_by_work", lambda *_, **__: True)
    p = make(RECIPES[name])
    exact, given = p.exact(), on_machine(p, machine)
    state = launch.probe(**given, start_theta=p.start_theta)
    for wrong in itertools.permutations((math.inf, math.nan, -1.0, 2.0**-149, 1e38), 2):
        work = np.full(p.query.shape[:2], wrong[0], np.float32)
        work[:, :: p.spec.group] = wrong[1]
        work[0, 0] = 1.0
        told = replace(state, work=machine.put(work))
        found = downloaded(launch.decode(**given, state=told), machine)
        error, allowed = errors(p, found, exact)
        assert (error <= allowed).all(), (wrong, (error / allowed).max())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["estimate", "deterministic", "everything", "d256-p256"])
def test_a_step_repeats_bit_for_bit(name: str, gpu: Gpu) -> None:
    problem = make(RECIPES[name])
    for (_, one), (_, other) in zip(solve(problem, gpu), solve(problem, gpu), strict=True):
        for field in ("output", "bound", "size", "missed", "reads"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_configuration_changes_only_rounding(change: dict[str, Any], gpu: Gpu) -> None:
    problem = make(LONG)
    config = replace(default_config(problem.spec, device_target(0)), **change)
    assert not restrictions(problem.spec, config, device_target(0))
    given = on_machine(problem, gpu)
    state = launch.probe(**given, start_theta=problem.start_theta)
    usual = downloaded(launch.decode(**given, state=state), gpu)
    found = downloaded(launch.decode(**given, state=state, config=config), gpu)
    np.testing.assert_array_equal(found.reads, usual.reads)
    exact = problem.exact()
    error, allowed = errors(problem, found, exact)
    assert (error <= allowed).all()
    np.testing.assert_allclose(found.state.log_z, usual.state.log_z, rtol=1e-5, atol=1e-5)


# ---- steps --------------------------------------------------------------------------------------


def grown(
    problem: Problem, tokens: int, machine: Machine
) -> tuple[CacheArrays, list[NDArray[Any]]]:
    """A cache on the GPU with the first ``tokens`` rows, and keys and values of all rows."""
    kept = problem.cache
    sizes = {"exact_first": kept.exact_first, "exact_last": kept.exact_last}
    batch, kv_heads, length, _ = problem.keys.shape
    cache = allocate_numpy(
        problem.spec, batch=batch, kv_heads=kv_heads, capacity=length + 2, **sizes
    )
    for name in ("key_mean", "balance", "value_mean", "signs", "dither"):
        getattr(cache, name)[...] = getattr(kept, name)
    rows = [
        problem.keys.astype(np.float32),
        problem.values.astype(np.float32),
    ]
    assert problem.spec.row_dtype == "float32"
    reference.encode(problem.spec, cache, *(x[:, :, :tokens] for x in rows))
    return uploaded(cache, machine), rows


def guarded(arrays: list[Any]) -> Any:
    """A `zeros` callback whose arrays lie between bytes of a pattern; bases go to ``arrays``."""
    import cupy

    def zeros(shape: tuple[int, ...], dtype: str) -> Any:
        held = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        size = int(np.prod(shape)) * held.itemsize
        base = cupy.full(size + 2 * GUARD, PATTERN, np.uint8)
        arrays.append(base)
        inner = base[GUARD : GUARD + size].view(held).reshape(shape)
        inner[...] = 0
        return inner

    return zeros


def a_workspace(spec: DecodeSpec, cache: CacheArrays, zeros: Any) -> tuple[DecodeConfig, Workspace]:
    target = device_target(0)
    config = default_config(spec, target)
    return config, allocate_workspace(spec, config, target, cache, zeros=zeros)


@pytest.mark.gpu
def test_a_step_is_an_append_and_a_decode(gpu: Gpu) -> None:
    p = make(STEP_RECIPE)
    cache, rows = grown(p, 147, gpu)
    arrays: list[Any] = []
    config, workspace = a_workspace(p.spec, cache, guarded(arrays))
    query = gpu.put(p.query)
    state = launch.probe(p.spec, cache, query, p.arguments, start_theta=p.start_theta)
    for array in workspace.outputs.values():
        array.view(np.uint8)[...] = 0xFF  # NaN, and counts that no step can have
    before = downloaded(state, gpu)
    for t in range(147, 150):
        k, v = (gpu.put(np.ascontiguousarray(x[:, :, t : t + 1])) for x in rows)
        found = launch.step(p.spec, config, cache, k, v, query, state, p.arguments, workspace)
        answer = downloaded(found, gpu)
        held = downloaded(cache, gpu)
        wanted = reference.decode(p.spec, held, p.query, before, p.arguments)
        assert np.abs(answer.output - wanted.output).max() <= (answer.bound + wanted.bound).max()
        assert answer.state.step[0] == before.step[0] + 1
        assert np.isfinite(answer.bound).all()
        before = answer.state
    expected, _ = grown(p, 150, gpu)
    for field in fields(CacheArrays):
        wanted, got = getattr(expected, field.name), getattr(cache, field.name)
        if isinstance(wanted, tuple):
            for a, b in zip(wanted, got, strict=True):
                np.testing.assert_array_equal(gpu.get(b), gpu.get(a), field.name)
        elif hasattr(wanted, "get"):
            np.testing.assert_array_equal(gpu.get(got), gpu.get(wanted), field.name)
    for base in arrays:
        edges = gpu.get(base)
        assert (edges[:GUARD] == PATTERN).all()
        assert (edges[-GUARD:] == PATTERN).all()


@pytest.mark.gpu
def test_a_graph_replays_steps(gpu: Gpu) -> None:
    import cupy

    p = make(STEP_RECIPE)
    answers = []
    for captured in (False, True):
        cache, rows = grown(p, 140, gpu)
        config, workspace = a_workspace(p.spec, cache, gpu.zeros)
        query = gpu.put(p.query)
        state = launch.probe(p.spec, cache, query, p.arguments, start_theta=p.start_theta)
        k, v = (gpu.put(np.ascontiguousarray(x[:, :, 140:141])) for x in rows)
        given = (p.spec, config, cache, k, v, query, state, p.arguments, workspace)
        launch.step(*given)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.runtime.deviceSynchronize()
        if captured:
            with stream:
                stream.begin_capture()
                launch.step(*given, stream=stream.ptr)
                graph = stream.end_capture()
        for t in range(141, 145):
            k[...], v[...] = (gpu.put(np.ascontiguousarray(x[:, :, t : t + 1])) for x in rows)
            cupy.cuda.runtime.deviceSynchronize()
            if captured:
                graph.launch(stream)
            else:
                launch.step(*given, stream=stream.ptr)
            stream.synchronize()
        answers.append({name: gpu.get(array) for name, array in workspace.outputs.items()})
        assert gpu.get(cache.lengths).tolist() == [145] * len(p.keys)
    for name, array in answers[0].items():
        np.testing.assert_array_equal(array, answers[1][name], name)


@pytest.mark.gpu
def test_a_full_cache_answers_that_it_cannot(gpu: Gpu) -> None:
    """The device alone knows the lengths: no row is written past the end, no number is given."""
    p = make(STEP_RECIPE)
    cache, rows = grown(p, 150, gpu)
    cache.lengths[0] = 152
    config, workspace = a_workspace(p.spec, cache, gpu.zeros)
    query = gpu.put(p.query)
    state = launch.probe(p.spec, cache, query, p.arguments, start_theta=p.start_theta)
    k, v = (gpu.put(np.ascontiguousarray(x[:, :, :1])) for x in rows)
    step = launch.step(p.spec, config, cache, k, v, query, state, p.arguments, workspace)
    found = downloaded(step, gpu)
    assert np.isnan(found.output[0]).all()
    assert not np.isfinite(found.bound[0]).any()
    assert found.missed[0].all()
    assert np.isfinite(found.output[1:]).all()
    assert np.isfinite(found.bound[1:]).all()


# ---- wrong arguments ----------------------------------------------------------------------------


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is launched, so that no GPU is needed."""
    emulate_places(monkeypatch)
    host = Emulated()
    p = make(STEP_RECIPE)

    cache, query = uploaded(p.cache, host), host.put(p.query)
    heads = p.query.shape[:2]
    hints = {name: np.zeros(heads, np.float32) for name in HEAD_HINTS}
    state = uploaded(HeadState(**hints, step=np.zeros(1, np.uint32)), host)
    config = DecodeConfig()
    workspace = allocate_workspace(
        p.spec, config, replace(SM90, sm_count=1), cache, zeros=host.zeros
    )
    batch, kv_heads = p.keys.shape[:2]
    row = host.zeros((batch, kv_heads, 1, p.spec.head_dim), "float32")
    two = host.zeros((batch, kv_heads, 2, p.spec.head_dim), "float32")

    def step(**changes: Any) -> None:
        given = {
            "spec": p.spec, "config": config, "cache": cache, "keys": row, "values": row,
            "query": query, "state": state, "arguments": p.arguments, "workspace": workspace,
            **changes,
        }  # fmt: skip
        launch.step(**given)

    with pytest.raises(LaunchError, match="a step appends one token, not 2"):
        step(keys=two, values=two)
    with pytest.raises(LaunchError, match=r"sinks given, but DecodeSpec\.sinks=False"):
        step(sinks=host.zeros((heads[1],), "float32"))
    with pytest.raises(LaunchError, match=r"softcap 30\.0 given, but DecodeSpec\.softcap=False"):
        step(arguments=replace(p.arguments, softcap=30.0))
    with pytest.raises(LaunchError, match="query has shape"):
        step(query=host.zeros((1, *heads[1:], p.spec.head_dim), "float32"))
    with pytest.raises(LaunchError, match="query is float64: give float32"):
        step(query=host.put(p.query.astype(np.float64)))
    with pytest.raises(LaunchError, match="theta has shape"):
        step(state=replace(state, theta=host.zeros((1, 1), "float32")))
    with pytest.raises(LaunchError, match="values has shape"):
        step(values=two)
