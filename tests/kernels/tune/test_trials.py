"""Trials and sweep files; T4 there and back; the Pareto front."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.errors import TuningError
from alignedkv.kernels.config import CHOICES, DecodeConfig
from alignedkv.kernels.tune.front import front
from alignedkv.kernels.tune.t4 import INVALIDITY, T4_VERSION, from_t4, to_t4
from alignedkv.kernels.tune.trials import Status, Sweep, Trial, config_from, fastest
from landscapes import SPACE, made_up_sweep, timed

FAILED = [
    Trial(config=config, status=status, reason=f"because {status}", facts={"bound": 0.5})
    for config, status in zip(SPACE, [s for s in Status if s is not Status.OK], strict=False)
]
SWEEP = made_up_sweep(trials=(*FAILED, *(timed(config, noise=0.01) for config in SPACE[10:20])))


@pytest.mark.parametrize("times", [(), (math.nan,), (1.0, math.inf), (0.0,), (-1.0, 2.0)])
def test_times_that_cannot_be_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(TuningError, match="positive finite"):
        Trial(config=SPACE[0], status=Status.OK, times_us=times)


def test_a_failed_trial_never_wins() -> None:
    assert all(t.median_us == math.inf and t.spread_us == 0.0 for t in FAILED)
    assert fastest(FAILED) is None
    assert fastest(SWEEP.trials) == SWEEP.ranked()[0]


def test_ranked_leaves_out_what_failed() -> None:
    ranked = SWEEP.ranked()
    assert len(ranked) == 10
    assert [t.median_us for t in ranked] == sorted(t.median_us for t in ranked)


def test_the_gain_is_over_the_default() -> None:
    whole = made_up_sweep()
    default = whole.trial_of(whole.default)
    assert default is not None
    assert whole.gain == default.median_us / whole.ranked()[0].median_us > 1.0
    assert SWEEP.gain is None
    wrong = Trial(config=whole.default, status=Status.WRONG_ANSWER)
    assert replace(whole, trials=(wrong, *SWEEP.trials)).gain is None


def test_a_saved_sweep_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sweep.json"
    SWEEP.save(path)
    again = Sweep.load(path)
    assert replace(again, trials=()) == replace(SWEEP, trials=())
    for old, new in zip(SWEEP.trials, again.trials, strict=True):
        assert replace(new, times_us=old.times_us) == old
        assert new.times_us == pytest.approx(old.times_us, abs=5e-4)
    assert [p.name for p in path.parent.iterdir()] == ["sweep.json"]
    assert len(path.read_text().splitlines()) < 60 + len(SWEEP.trials)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1}', "null", '{"version": 99}'])
def test_a_damaged_sweep_gives_a_clear_message(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(damage)
    with pytest.raises(TuningError, match=r"sweep\.json .*record it again"):
        Sweep.load(path)
    with pytest.raises(TuningError, match="give a sweep file"):
        Sweep.load(tmp_path / "none.json")


def test_tunables_of_another_time() -> None:
    assert config_from({"warps": 4}) == DecodeConfig(warps=4)
    with pytest.raises(TuningError, match=r"\['gears'\]"):
        config_from(asdict(SPACE[0]) | {"gears": 5})


def test_t4_there_and_back() -> None:
    content = json.loads(json.dumps(to_t4(SWEEP)))
    again = from_t4(content)
    assert replace(again, trials=()) == replace(SWEEP, trials=())
    for old, new in zip(SWEEP.trials, again.trials, strict=True):
        assert replace(new, times_us=old.times_us) == old
        assert new.times_us == pytest.approx(old.times_us, abs=1e-6)


def test_t4_has_what_its_schema_requires() -> None:
    """results-schema.json 1.0.0: required members, the list of invalidities, value types."""
    content = to_t4(SWEEP)
    assert content["schema_version"] == T4_VERSION
    allowed = {"timeout", "compile", "runtime", "correctness", "constraints", "correct"}
    assert set(INVALIDITY.values()) <= allowed
    assert set(INVALIDITY) == set(Status)
    for result, trial in zip(content["results"], SWEEP.trials, strict=True):
        assert {"configuration", "times", "invalidity", "correctness"} <= set(result)
        assert set(result["configuration"]) == set(CHOICES)
        assert result["correctness"] == (trial.status is Status.OK)
        for measured in result["measurements"]:
            assert isinstance(measured["value"], float | int | str)
            assert not isinstance(measured["value"], bool)
        times = {m["name"]: m["value"] for m in result["measurements"]}
        assert ("time" in times) == (trial.status is Status.OK)
        if trial.status is Status.OK:
            assert times["time"] == trial.median_us / 1e3


@pytest.mark.parametrize("content", [{}, [], {"results": []}, {"metadata": 3, "results": []}])
def test_what_is_no_t4_is_refused(content: object) -> None:
    with pytest.raises(TuningError, match="no T4 results"):
        from_t4(content)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), max_size=25))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int, int]]) -> None:
    kept = front(points, lambda point: point)

    def dominates(p: tuple[int, ...], q: tuple[int, ...]) -> bool:
        return p != q and all(a <= b for a, b in zip(p, q, strict=True))

    expected = {q for q in points if not any(dominates(p, q) for p in points)}
    assert set(kept) == expected
    assert kept == sorted(expected)


def test_a_nan_is_on_no_front() -> None:
    assert front([(1.0, math.nan), (2.0, 1.0)], lambda point: point) == [(2.0, 1.0)]
