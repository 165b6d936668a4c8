"""The Numba CUDA kernels: in the simulator, to PTX without a driver, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignedkv.errors import LaunchError
from alignedkv.kernels import numba_cuda
from alignedkv.kernels.arrays import HEAD_HINTS, DecodeResult, HeadState
from numba_cuda_checks import check_error, check_step, probed
from problems import RECIPES, Problem, make, recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(numba_cuda.SIMULATED, reason="this process simulates")
def test_in_the_simulator() -> None:
    """Numba is told to simulate before it is imported: in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "tests/kernels/simulated_numba_cuda.py",
         "tests/kernels/simulated_numba_cuda_hints.py"],
        cwd=ROOT,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


@pytest.mark.skipif(numba_cuda.SIMULATED, reason="the simulator takes NumPy arrays")
def test_arrays_that_are_not_on_a_gpu_are_refused() -> None:
    p = make(recipe(shape={"tokens": 5}))
    with pytest.raises(LaunchError, match=r"is a ndarray.*NUMBA_ENABLE_CUDASIM"):
        numba_cuda.decode(p.spec, p.cache, p.query, probed(p), p.arguments, splits=1)


@pytest.mark.skipif(numba_cuda.SIMULATED, reason="the simulator compiles nothing")
@pytest.mark.parametrize(
    ("name", "capability", "parts"),
    [
        ("everything", (8, 0), ("prepare", "split", "finish")),
        ("deterministic", (9, 0), ("split",)),
        ("statistical", (9, 0), ("prepare", "split", "finish")),
    ],
)
def test_kernels_compile_to_ptx_without_a_driver(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], parts: tuple[str, ...]
) -> None:
    import numba
    from numba import cuda
    from numba.cuda import dispatcher

    # Device functions ask the current device for what it can do.
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    # NumPy arrays have the types of device arrays.
    monkeypatch.setattr(numba_cuda, "SIMULATED", True)
    p = make(RECIPES[name])
    arguments = numba_cuda.launch_arguments(
        p.spec, p.cache, p.query, probed(p), p.arguments, sinks=p.sinks, splits=2
    )
    kernels = numba_cuda.emit(p.spec, threads=128)
    for part in parts:
        attempt = () if part == "prepare" else (0,)
        types = numba.types.void(*[numba.typeof(x) for x in (*arguments, *attempt)])
        ptx, returned = cuda.compile_ptx(getattr(kernels, part), types, cc=capability)
        assert returned == numba.types.void
        assert f".target sm_{capability[0]}{capability[1]}" in ptx
        assert ptx.count(".visible .entry") == 1


# ---- on a GPU -----------------------------------------------------------------------------------


def on_device(holder: Any) -> Any:
    """A `CacheArrays` or `HeadState` with CuPy arrays for its NumPy arrays."""
    import cupy

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(moved(part) for part in value)
        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    return replace(holder, **{f.name: moved(getattr(holder, f.name)) for f in fields(holder)})


def on_host(found: DecodeResult) -> DecodeResult:
    state = found.state.mapped(lambda array: array.copy_to_host())
    names = ("output", "bound", "size", "missed", "reads")
    return DecodeResult(state=state, **{n: getattr(found, n).copy_to_host() for n in names})


def run_on_device(p: Problem, state: HeadState, **options: Any) -> DecodeResult:
    import cupy

    found = numba_cuda.decode(
        p.spec,
        on_device(p.cache),
        cupy.asarray(p.query),
        on_device(state),
        p.arguments,
        sinks=None if p.sinks is None else cupy.asarray(p.sinks),
        **options,
    )
    return on_host(found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_on_a_gpu_is_the_reference_s(name: str) -> None:
    problem = make(RECIPES[name])
    state = probed(problem)
    check_error(problem, run_on_device(problem, state))
    once = replace(problem, arguments=replace(problem.arguments, repairs=0))
    check_step(once, state, run_on_device(once, state))


@pytest.mark.gpu
def test_the_probe_on_a_gpu_is_the_reference_s() -> None:
    import cupy

    p = make(RECIPES["ragged"])
    wanted = probed(p)
    found = numba_cuda.probe(
        p.spec, on_device(p.cache), cupy.asarray(p.query), p.arguments, start_theta=p.start_theta
    )
    for name in (*HEAD_HINTS, "step"):
        mine = cupy.asnumpy(cupy.asarray(getattr(found, name)))
        np.testing.assert_allclose(mine, getattr(wanted, name), rtol=1e-5)


@pytest.mark.gpu
def test_many_tokens_and_splits_on_a_gpu() -> None:
    problem = make(
        recipe(
            shape={"batch": 1, "tokens": 3000, "head_dim": 128, "group": 4},
            arguments={"repairs": 0},
        )
    )
    state = probed(problem)
    for splits in (1, 7, None):
        check_step(problem, state, run_on_device(problem, state, splits=splits))
