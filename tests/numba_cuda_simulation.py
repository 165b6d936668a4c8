"""Numba's simulator, made safe and quick, and problems small enough for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alignedkv.kernels import numba_cuda
from alignedkv.kernels.arrays import DecodeResult, HeadState
from problems import SMALL, Problem, Recipe
from strategies import Shape

#: Of a file of tests that run in the simulator.
SIMULATED = [
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


def run(problem: Problem, state: HeadState, **options: Any) -> DecodeResult:
    p = problem
    return numba_cuda.decode(p.spec, p.cache, p.query, state, p.arguments, sinks=p.sinks, **options)
