"""Tuning one problem, with a made-up compiler and a made-up GPU."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from alignedkv.errors import CompileError, TuningError
from alignedkv.kernels.compile import Resources
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.legality import default_config
from alignedkv.kernels.target import SM90
from alignedkv.kernels.tune.isolated import LostProcessError
from alignedkv.kernels.tune.measure import Candidate
from alignedkv.kernels.tune.trials import Status, Trial, fastest
from alignedkv.kernels.tune.tuner import MAX_LOST, Budget, Tuner, tune
from landscapes import SPACE, SPEC, cost_us, timed

TAKEN = Resources(
    registers=96, spill_store_bytes=8, spill_load_bytes=8, stack_bytes=0, shared_bytes=0
)


def build(config: DecodeConfig) -> Mapping[str, Resources]:
    return {"decode": TAKEN}


def test_every_failure_is_a_trial() -> None:
    def broken(config: DecodeConfig) -> Mapping[str, Resources]:
        raise CompileError("a static_assert")

    def dies(candidate: Candidate) -> Trial:
        raise LostProcessError("ended with code -11")

    def hangs(candidate: Candidate) -> Trial:
        raise LostProcessError("no answer", timed_out=True)

    outcomes = [
        Tuner(0.01, *parts).evaluate(SPACE[0])
        for parts in ((broken, timed), (build, dies), (build, hangs))
    ]
    statuses = [Status.COMPILE_FAILED, Status.LAUNCH_FAILED, Status.TIMED_OUT]
    assert [trial.status for trial in outcomes] == statuses
    assert all(trial.reason for trial in outcomes)
    assert outcomes[1].facts == {"registers": 96, "spill_bytes": 8}


def test_a_candidate_is_told_the_best_so_far_and_a_rerun_is_not() -> None:
    asked: list[Candidate] = []

    def ask(candidate: Candidate) -> Trial:
        asked.append(candidate)
        return timed(candidate.config)

    tuner = Tuner(2.0**-7, build, ask)
    trials = [tuner.evaluate(config) for config in SPACE[:4]]
    best = min(map(cost_us, SPACE[:3]))
    assert asked[0].incumbent_us == float("inf")
    assert asked[3].incumbent_us == best
    tuner.remeasure(trials[0], 77)
    assert (asked[-1].repeats, asked[-1].most) == (77, 77)
    assert asked[-1].incumbent_us == float("inf")
    assert {candidate.tolerance for candidate in asked} == {2.0**-7}


def test_the_default_is_tried_in_any_case_and_the_fastest_are_settled() -> None:
    default = default_config(SPEC, SM90)
    repeats: list[int] = []

    def ask(candidate: Candidate) -> Trial:
        repeats.append(candidate.repeats)
        return timed(candidate.config, noise=0.05, seed=len(repeats))

    space = sorted((c for c in SPACE if c != default), key=cost_us)[:30]
    trials = tune(space, default, Tuner(0.01, build, ask), Budget(strategy="grid", trials=20))
    assert len(trials) == len({trial.config for trial in trials}) == 21
    assert default in {trial.config for trial in trials}
    assert max(repeats) >= 40, "such noise calls for another look"
    assert fastest(trials) is not None


def test_a_gpu_that_never_answers_ends_the_search() -> None:
    def dies(candidate: Candidate) -> Trial:
        raise LostProcessError("ended with code -11")

    tuner = Tuner(0.01, build, dies)
    for config in SPACE[: MAX_LOST - 1]:
        assert tuner.evaluate(config).status is Status.LAUNCH_FAILED
    with pytest.raises(TuningError, match="whether the GPU works"):
        tuner.evaluate(SPACE[MAX_LOST])
