"""Sessions: with the reference in place of the kernels and a made-up GPU, and on a real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignedkv.errors import LaunchError, TuningError
from alignedkv.kernels import reference
from alignedkv.kernels.arrays import DecodeResult
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.legality import default_config
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import SM90
from alignedkv.kernels.tune import measure, stage
from alignedkv.kernels.tune.data import Inputs, synthesise
from alignedkv.kernels.tune.measure import Candidate, Session
from alignedkv.kernels.tune.trials import Problem, Status

SPEC = DecodeSpec(head_dim=64, group=2)
PROBLEM = Problem(spec=SPEC, batch=1, kv_heads=1, tokens=200, tolerance=2.0**-6, data="mixed")
DEFAULT = default_config(SPEC, SM90)
#: Configurations that stand for kernels with a defect.
NAN = DecodeConfig(warps=4, waves=2)
SHIFTED = DecodeConfig(warps=4, waves=3)
OPTIMIST = DecodeConfig(warps=4, waves=4)
REFUSED = DecodeConfig(warps=6)


def inputs(tokens: int, xp: Any) -> Inputs:
    return synthesise(
        "mixed", tokens=tokens, batch=1, kv_heads=1, group=2, head_dim=64, seed=3, xp=np
    )


@dataclass
class Gpu:
    """Stands for CuPy: arrays are NumPy's, a graph is a list of calls, time is what they cost."""

    now_ms: float = 0.0
    recorded: list[Callable[[], object]] | None = None
    step_us: Callable[[DecodeConfig], float] = lambda config: 10.0 * config.warps
    lengths: list[int] = field(default_factory=list)

    def module(self) -> SimpleNamespace:
        runtime = SimpleNamespace(
            CUDARuntimeError=MemoryError,
            deviceGetPCIBusId=lambda device: "0000:00:00.0",
            deviceSynchronize=lambda: None,
            memGetInfo=lambda: (1 << 34, 1 << 35),
        )
        cuda = SimpleNamespace(
            runtime=runtime,
            driver=SimpleNamespace(CUDADriverError=BlockingIOError),
            memory=SimpleNamespace(OutOfMemoryError=BufferError),
            Device=lambda number: SimpleNamespace(use=lambda: None),
            Stream=lambda non_blocking: FakeStream(self),
            Event=lambda: FakeEvent(self),
            get_elapsed_time=lambda begin, end: end.at - begin.at,
        )
        names = ("asarray", "empty", "zeros", "float32")
        return SimpleNamespace(
            cuda=cuda,
            asnumpy=lambda array: np.array(array),
            get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
            **{name: getattr(np, name) for name in names},
        )

    def spend(self, config: DecodeConfig) -> None:
        self.now_ms += 1e-3 * self.step_us(config)


@dataclass
class FakeStream:
    gpu: Gpu
    ptr: int = 0

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        self.gpu.recorded = []

    def end_capture(self) -> SimpleNamespace:
        calls, self.gpu.recorded = self.gpu.recorded or [], None
        return SimpleNamespace(launch=lambda stream: [call() for call in calls])


@dataclass
class FakeEvent:
    gpu: Gpu
    at: float = math.nan

    def record(self, stream: FakeStream) -> None:
        self.at = self.gpu.now_ms

    def synchronize(self) -> None:
        pass


def kernels(gpu: Gpu) -> SimpleNamespace:
    """`launch` by the reference, with the defects of some configurations."""

    def decode(spec: Any, cache: Any, query: Any, state: Any, arguments: Any, **on: Any) -> Any:
        config = on["config"]
        if config == REFUSED:
            raise LaunchError("too much shared memory")
        found = reference.decode(spec, cache, query, state, arguments)
        if config == SHIFTED:
            found = replace(found, output=found.output + np.uint16(16))
        if config == OPTIMIST:
            found = replace(found, bound=found.bound * np.float32(0.9))
        return found

    def step(
        spec: Any,
        config: Any,
        cache: Any,
        keys: Any,
        values: Any,
        query: Any,
        state: Any,
        arguments: Any,
        workspace: Any,
        *,
        stream: int,
    ) -> DecodeResult:
        def run() -> None:
            # What a graph computes is looked at only once, so it need not be right.
            gpu.spend(config)
            gpu.lengths.append(int(cache.lengths[0]))
            cache.lengths[...] += 1
            if config == NAN:
                workspace.outputs["output"][...] = 0x7FC0

        if gpu.recorded is not None:
            gpu.recorded.append(run)
            return DecodeResult(**workspace.outputs, state=state)
        gpu.spend(config)
        reference.encode(spec, cache, keys, values)
        found = decode(spec, cache, query, state, arguments, config=config)
        for name, array in workspace.outputs.items():
            array[...] = getattr(found, name)
        state.assign(found.state)
        return DecodeResult(**workspace.outputs, state=state)

    def probe(spec: Any, cache: Any, query: Any, arguments: Any, **on: Any) -> Any:
        return reference.probe(spec, cache, query, arguments, start_theta=on["start_theta"])

    def fit(spec: Any, cache: Any, keys: Any, values: Any, size: Any, **on: Any) -> None:
        reference.fit_transforms(spec, cache, keys, values, size)

    def encode(spec: Any, cache: Any, keys: Any, values: Any, **on: Any) -> None:
        reference.encode(spec, cache, keys, values)

    return SimpleNamespace(decode=decode, step=step, probe=probe, fit_transforms=fit, encode=encode)


@contextmanager
def session_on(gpu: Gpu) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "cupy", gpu.module())
        patch.setattr(stage, "launch", kernels(gpu))
        target = replace(SM90, l2_bytes=60_000)
        patch.setattr(measure, "device_target", lambda device: target)
        yield Session(PROBLEM, inputs)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture(scope="module")
def session(gpu: Gpu) -> Iterator[Session]:
    with session_on(gpu) as made:
        yield made


def candidate(config: DecodeConfig, **changes: Any) -> Candidate:
    return Candidate(config=config, tolerance=PROBLEM.tolerance, **changes)


def test_a_right_candidate_is_timed(session: Session, gpu: Gpu) -> None:
    gpu.lengths.clear()
    trial = session(candidate(DEFAULT))
    assert (trial.status, trial.reason) == (Status.OK, "")
    assert trial.times_us == pytest.approx([10.0 * DEFAULT.warps] * 10)
    assert 0.0 < trial.facts["error"] < trial.facts["bound"] < 1.0
    assert 0.1 < trial.facts["read_fraction"] <= 1.1
    assert trial.facts["missed"] == 0.0
    # Every replay begins about where the problem says, and never runs out of room.
    assert min(gpu.lengths) == PROBLEM.tokens
    assert max(gpu.lengths) < PROBLEM.tokens + measure.ROOM


def test_caches_take_turns_so_that_all_are_cold(session: Session) -> None:
    trial = session(candidate(DEFAULT))
    stored = PROBLEM.tokens * (4 + 2 * 128)
    read = trial.facts["read_fraction"] * stored
    assert trial.facts["copies"] == math.ceil(4 * 60_000 / read) or trial.facts["copies"] > 1
    assert trial.facts["copies"] * read >= 0.9 * 4 * 60_000


@pytest.mark.parametrize(
    ("config", "status", "reason"),
    [
        (NAN, Status.WRONG_ANSWER, "NaN or infinite while the clock ran"),
        (SHIFTED, Status.WRONG_ANSWER, "from the exact one, its bound is"),
        (OPTIMIST, Status.WRONG_ANSWER, "under the reference's"),
        (REFUSED, Status.LAUNCH_FAILED, "too much shared memory"),
    ],
)
def test_a_defect_is_found_and_leaves_no_time(
    session: Session, config: DecodeConfig, status: Status, reason: str
) -> None:
    trial = session(candidate(config))
    assert trial.status is status
    assert reason in trial.reason
    assert trial.times_us == ()
    assert session(candidate(DEFAULT)).status is Status.OK


def test_repeats_are_those_asked_for(session: Session) -> None:
    assert len(session(candidate(DEFAULT, repeats=37, most=37)).times_us) == 37


def test_another_tolerance_reads_more_and_has_a_smaller_bound(session: Session) -> None:
    coarse = session(candidate(DEFAULT))
    fine = session(replace(candidate(DEFAULT), tolerance=2.0**-9))
    assert fine.status is Status.OK
    assert fine.facts["bound"] < coarse.facts["bound"]
    assert fine.facts["read_fraction"] > coarse.facts["read_fraction"]


def test_a_lost_context_ends_the_session(gpu: Gpu) -> None:
    with session_on(gpu) as made, pytest.MonkeyPatch.context() as patch:

        def lost() -> None:
            raise MemoryError("an illegal memory access was encountered")

        patch.setattr(made._cupy.cuda.runtime, "deviceSynchronize", lost)
        with pytest.raises(MemoryError, match="illegal memory access"):
            made(candidate(REFUSED))


def test_specs_without_inputs_are_refused() -> None:
    sinks = replace(PROBLEM, spec=replace(SPEC, sinks=True))
    with pytest.raises(TuningError, match="not tuned"):
        stage.Stage(sinks, inputs, SM90, xp=np, stream=None, room=9)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1000, 8192])
def test_the_default_is_right_and_timed_on_a_gpu(tokens: int) -> None:
    spec = DecodeSpec(head_dim=128, group=4)
    problem = replace(PROBLEM, spec=spec, tokens=tokens, batch=2, kv_heads=2)
    make = partial(synthesise, "mixed", batch=2, kv_heads=2, group=4, head_dim=128)
    made = Session(problem, lambda count, xp: make(tokens=count, xp=xp))
    trial = made(candidate(default_config(spec, SM90)))
    assert (trial.status, trial.reason) == (Status.OK, "")
    assert 2.0 < trial.median_us < 1000.0
