"""Repeats and successive halving, with made-up clocks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.kernels.tune.decide import (
    APART,
    PRECISION,
    contenders,
    repeat_until_decided,
    settle,
    standard_error,
)
from alignedkv.kernels.tune.trials import Status, Trial
from landscapes import SPACE


def clock(mean: float, deviation: float, seed: int = 0) -> Callable[[int], Sequence[float]]:
    draw = random.Random(seed)
    return lambda count: [max(draw.gauss(mean, deviation), 0.01) for _ in range(count)]


def trial(index: int, times: Sequence[float]) -> Trial:
    return Trial(config=SPACE[index], status=Status.OK, times_us=tuple(times))


def test_the_standard_error_is_that_of_the_median() -> None:
    """Checked against the scatter of the medians themselves."""
    sample = clock(100.0, 2.0)
    medians, errors = [], []
    for _ in range(400):
        times = sorted(sample(41))
        medians.append(times[20])
        errors.append(standard_error(times))
    mean = sum(medians) / len(medians)
    scatter = math.sqrt(sum((m - mean) ** 2 for m in medians) / len(medians))
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.15)


def test_too_few_times_say_nothing() -> None:
    assert standard_error([1.0, 1.0, 1.0]) == math.inf
    assert standard_error([1.0] * 4) == 0.0


def test_an_outlier_does_not_count() -> None:
    assert standard_error([10.0] * 20 + [1e6]) == 0.0


def test_a_quiet_clock_needs_no_more_than_the_first_repeats() -> None:
    assert len(repeat_until_decided(clock(20.0, 0.001), first=10, most=80)) == 10


def test_a_noisy_contender_is_repeated_and_a_noisy_loser_is_not() -> None:
    assert len(repeat_until_decided(clock(20.0, 2.0), incumbent_us=20.0, most=80)) == 80
    assert len(repeat_until_decided(clock(40.0, 2.0), incumbent_us=20.0, most=80)) == 10


@given(
    first=st.integers(1, 30),
    most=st.integers(1, 120),
    deviation=st.floats(0.0, 5.0),
    incumbent=st.one_of(st.just(math.inf), st.floats(1.0, 40.0)),
)
def test_repeats_stay_within_their_limits_and_end_for_a_reason(
    first: int, most: int, deviation: float, incumbent: float
) -> None:
    times = repeat_until_decided(
        clock(20.0, deviation), incumbent_us=incumbent, first=first, most=most
    )
    assert min(first, most) <= len(times) <= max(first, most)
    if len(times) < most:
        middle = sorted(times)[len(times) // 2]
        error = standard_error(times)
        assert error <= 1.1 * PRECISION * middle or middle - (APART - 1.0) * error > incumbent


def test_contenders_are_those_that_cannot_be_told_apart() -> None:
    trials = [
        trial(0, [10.0, 10.2, 9.8, 10.1, 9.9]),
        trial(1, [10.1, 10.3, 9.9, 10.2, 10.0]),
        trial(2, [15.0, 15.2, 14.8, 15.1, 14.9]),
        Trial(config=SPACE[3], status=Status.WRONG_ANSWER, reason="bound"),
    ]
    assert contenders(trials, most=9) == trials[:2]
    assert contenders(trials, most=1) == trials[:1]
    assert contenders(trials[3:], most=9) == []


def test_halving_finds_the_fastest_of_noisy_candidates() -> None:
    truth = [20.0 + 0.15 * i for i in range(12)]
    asked: list[tuple[int, int]] = []

    def measure(index: int, count: int, seed: int) -> Trial:
        return trial(index, clock(truth[index], 0.6, seed)(count))

    def remeasure(old: Trial, repeats: int) -> Trial:
        index = SPACE.index(old.config)
        asked.append((index, repeats))
        return measure(index, repeats, 1000 * len(asked))

    wins = 0
    for seed in range(20):
        asked.clear()
        first = [measure(i, 10, 100 * seed + i) for i in range(len(truth))]
        settled = settle(first, remeasure, rounds=4)
        assert len(settled) == len(first)
        wins += min(settled, key=lambda t: t.median_us).config in SPACE[:2]
        counts = [sum(r == 40 << number for _, r in asked) for number in range(4)]
        assert all(late <= -(-early // 2) for early, late in itertools.pairwise(counts))
    assert wins >= 19


def test_a_clear_winner_is_not_measured_again() -> None:
    def never(old: Trial, repeats: int) -> Trial:
        raise AssertionError

    trials = [trial(0, [10.0] * 10), trial(1, [20.0] * 10)]
    assert settle(trials, never) == trials
    assert settle([], never) == []


def test_a_candidate_that_fails_when_measured_again_leaves_the_race() -> None:
    def fails(old: Trial, repeats: int) -> Trial:
        if old.config == SPACE[0]:
            return Trial(config=old.config, status=Status.TIMED_OUT, reason="no answer")
        return old

    settled = settle([trial(0, [10.0] * 10), trial(1, [10.0] * 10)], fails)
    assert [t.status for t in settled] == [Status.TIMED_OUT, Status.OK]
