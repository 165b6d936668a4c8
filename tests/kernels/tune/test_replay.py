"""Search policies compared on a recorded sweep, here a made-up one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from alignedkv.errors import TuningError
from alignedkv.kernels.tune.replay import replay
from alignedkv.kernels.tune.trials import Status, Sweep, Trial
from landscapes import SPACE, made_up_sweep

pytest.importorskip("optuna")

SWEEP = made_up_sweep()
#: Exhaustive sweeps of real GPUs.
RECORDED = sorted((Path(__file__).parents[3] / "benchmarks" / "results").glob("sweep-*.json"))


def median_slowdown(sweep: Sweep, *, strategy: str, trials: int, seeds: Sequence[int]) -> float:
    """Median over seeds of the time found over the fastest recorded."""
    return statistics.median(
        replay(sweep, strategy=strategy, trials=trials, seed=seed).slowdown for seed in seeds
    )


def test_an_exhaustive_replay_finds_the_first() -> None:
    found = replay(SWEEP, strategy="grid")
    assert (found.rank, found.slowdown) == (1, 1.0)
    assert found.evaluations == found.space == len(SPACE)
    assert found.best == SWEEP.ranked()[0]


def test_rank_and_slowdown_are_those_of_the_recorded_times() -> None:
    found = replay(SWEEP, strategy="random", trials=5, seed=1)
    ranked = SWEEP.ranked()
    assert found.evaluations == 6  # the default was not among the five
    assert ranked[found.rank - 1] == found.best
    assert found.slowdown == found.best.median_us / ranked[0].median_us > 1.0


def test_no_search_ends_behind_the_default() -> None:
    best = SWEEP.ranked()[0]
    found = replay(replace(SWEEP, default=best.config), strategy="random", trials=1, seed=3)
    assert (found.best, found.evaluations) == (best, 2)


def test_tpe_beats_random_with_a_tenth_of_the_evaluations() -> None:
    trials = len(SPACE) // 10
    tpe, chance = (
        median_slowdown(SWEEP, strategy=strategy, trials=trials, seeds=range(5))
        for strategy in ("tpe", "random")
    )
    assert tpe <= 1.03
    assert tpe <= chance


@pytest.mark.parametrize("seeds", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_tpe_gets_within_3_percent_of_the_best_recorded(path: Path, seeds: int) -> None:
    sweep = Sweep.load(path)
    assert len(sweep.trials) >= 48
    # Ten of them are drawn at random before the search begins to learn.  The default helps.
    assert median_slowdown(sweep, strategy="tpe", trials=20, seeds=range(seeds)) <= 1.03


def test_a_sweep_without_an_answer_cannot_be_replayed() -> None:
    wrong = tuple(Trial(config=c, status=Status.WRONG_ANSWER) for c in SPACE[:3])
    with pytest.raises(TuningError, match="no trial with a right answer"):
        replay(replace(SWEEP, trials=wrong), strategy="grid")
    with pytest.raises(TuningError, match="allow more trials"):
        replay(replace(SWEEP, trials=(*wrong, SWEEP.trials[9])), strategy="grid", trials=3)
