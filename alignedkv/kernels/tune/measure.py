"""Tries a candidate on a GPU: first whether it is right, then how long a step takes it.

To be run in a process of its own (`isolated`): a wrong kernel may take its CUDA context along.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

import alignedkv
from alignedkv.errors import LaunchError
from alignedkv.kernels.arrays import DecodeResult
from alignedkv.kernels.compile import compiler_version
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.device import device_target
from alignedkv.kernels.storage import bytes_read, to_float32
from alignedkv.kernels.tune.clocks import read_clocks
from alignedkv.kernels.tune.decide import repeat_until_decided
from alignedkv.kernels.tune.oracle import why_outside_bound, why_wrong
from alignedkv.kernels.tune.stage import MakeInputs, Regime, Stage
from alignedkv.kernels.tune.trials import Problem, Status, Trial
from alignedkv.kernels.workspace import Workspace

#: Steps in one graph at least: launching a graph takes a few us itself.
MIN_CALLS: Final = 8
#: Replays before the clock starts, and between two resets of the lengths.
WARM_REPLAYS: Final = 2
CHUNK: Final = 16
#: Tokens that graphs may append before lengths are reset; one more round comes before them.
ROOM: Final = (1 + WARM_REPLAYS + CHUNK) * MIN_CALLS
_DIGITS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A question to a `Session`.

    Attributes
    ----------
    config : DecodeConfig
    tolerance : float
    incumbent_us : float
        Median of the best so far.
    repeats, most : int
        Graph replays at first, and at most.
    """

    config: DecodeConfig
    tolerance: float
    incumbent_us: float = math.inf
    repeats: int = 10
    most: int = 40


def obstacle() -> str | None:
    """Why nothing can be measured here; None if it can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU ({error})"
    return None if count else "no GPU"


def versions() -> dict[str, str]:
    """What a time depends on besides the kernels."""
    import cupy

    driver = cupy.cuda.runtime.driverGetVersion()
    return {
        "alignedkv": alignedkv.__version__,
        "cupy": cupy.__version__,
        "cuda-driver": f"{driver // 1000}.{driver % 1000 // 10}",
        "nvrtc": ".".join(map(str, compiler_version())),
    }


class Session:
    """Tries candidates, one at a time, for one problem on one GPU.

    Parameters
    ----------
    problem : Problem
        Its tolerance is what the arrays are prepared for; every candidate names its own.
    make_inputs : function
        ``make_inputs(tokens, cupy)`` -> `Inputs`.
    device : int
    """

    def __init__(self, problem: Problem, make_inputs: MakeInputs, *, device: int = 0) -> None:
        import cupy

        cupy.cuda.Device(device).use()
        self._cupy, self._problem = cupy, problem
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._bus_id: str = cupy.cuda.runtime.deviceGetPCIBusId(device)
        with self._stream:
            self._stage = Stage(
                problem,
                make_inputs,
                device_target(device),
                xp=cupy,
                stream=self._stream,
                room=ROOM,
            )
        self._stream.synchronize()

    def __call__(self, candidate: Candidate) -> Trial:
        """Check a candidate, then time it.

        Raises
        ------
        Exception
            Whatever CUDA raises once the context is lost: the session is over then.
        """
        cuda = self._cupy.cuda
        refusals = (
            LaunchError,
            cuda.runtime.CUDARuntimeError,
            cuda.driver.CUDADriverError,
            cuda.memory.OutOfMemoryError,
        )
        try:
            with self._stream:
                return self._try(candidate)
        except refusals as error:
            cuda.runtime.deviceSynchronize()  # raises if the context is lost
            return Trial(config=candidate.config, status=Status.LAUNCH_FAILED, reason=str(error))

    def _try(self, candidate: Candidate) -> Trial:
        stage, spec, config = self._stage, self._problem.spec, candidate.config
        regime = stage.regime(candidate.tolerance)
        reason = why_wrong(spec, regime.case, stage.check(config, regime))
        workspace = stage.workspace(config)
        stage.reset(regime)
        found = stage.download(stage.step(0, config, regime, workspace))
        facts = self._facts(found, workspace)
        reason = reason or why_outside_bound(spec, found.output, found.bound, stage.exact)
        if reason:
            return Trial(config=config, status=Status.WRONG_ANSWER, reason=reason, facts=facts)
        times, last = self._time(candidate, regime, workspace)
        facts |= {**read_clocks(self._bus_id), "copies": stage.copies}
        if not np.isfinite(to_float32(stage.download(last).output, spec.query_dtype)).all():
            reason = "the output turned NaN or infinite while the clock ran"
            return Trial(config=config, status=Status.WRONG_ANSWER, reason=reason, facts=facts)
        return Trial(config=config, status=Status.OK, times_us=times, facts=facts)

    def _time(
        self, candidate: Candidate, regime: Regime, workspace: Workspace
    ) -> tuple[tuple[float, ...], DecodeResult]:
        """Time per step in us of every graph replay, over cold caches, and the last answer."""
        stage, stream = self._stage, self._stream
        order = list(range(stage.copies)) * -(-MIN_CALLS // stage.copies)
        stage.reset(regime)
        # Once outside of the graph: nothing can be loaded while one is captured.
        last = stage.step(0, candidate.config, regime, workspace)
        stream.synchronize()
        stream.begin_capture()
        try:
            for number in order:
                last = stage.step(number, candidate.config, regime, workspace)
        finally:
            graph = stream.end_capture()
        for _ in range(WARM_REPLAYS):
            graph.launch(stream)

        def sample(count: int) -> list[float]:
            times: list[float] = []
            while len(times) < count:
                times += self._replay(graph, min(CHUNK, count - len(times)))
            return [time / len(order) for time in times]

        times = repeat_until_decided(
            sample,
            incumbent_us=candidate.incumbent_us,
            first=candidate.repeats,
            most=candidate.most,
        )
        return times, last

    def _replay(self, graph: Any, count: int) -> list[float]:
        """Times of replays in us, all queued at once: the GPU never waits for the host."""
        self._stage.reset_lengths()
        events = [self._cupy.cuda.Event() for _ in range(count + 1)]
        events[0].record(self._stream)
        for event in events[1:]:
            graph.launch(self._stream)
            event.record(self._stream)
        events[-1].synchronize()
        elapsed_ms = self._cupy.cuda.get_elapsed_time
        return [1e3 * elapsed_ms(begin, end) for begin, end in itertools.pairwise(events)]

    def _facts(self, found: DecodeResult, workspace: Workspace) -> dict[str, Any]:
        """What is told beside the time; bound and error relative to the output's largest number."""
        problem, spec = self._problem, self._problem.spec
        exact = self._stage.exact
        size = np.abs(exact).max(axis=-1)
        error = np.abs(to_float32(found.output, spec.query_dtype) - exact).max(axis=-1) / size
        # Bytes of K and V with two for each number.
        sixteen_bit = 4 * problem.batch * problem.kv_heads * problem.tokens * spec.head_dim
        facts = {
            "bound": (found.bound / size).max(),
            "error": error.max(),
            "error_rms": np.sqrt(np.mean(error**2)),
            "missed": found.missed.mean(),
            "read_fraction": bytes_read(spec, found.reads).sum() / sixteen_bit,
        }
        rounded: dict[str, Any] = {n: float(f"{float(v):.{_DIGITS}g}") for n, v in facts.items()}
        return rounded | {"blocks": workspace.blocks}
