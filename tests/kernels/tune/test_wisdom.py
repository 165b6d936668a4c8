"""Wisdom: kept, found again, never trusted blindly."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.errors import TuningError
from alignedkv.kernels.codegen import source_digest
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.legality import default_config, restrictions
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import SM80, SM90
from alignedkv.kernels.tune import wisdom
from alignedkv.kernels.tune.trials import Status, Trial
from alignedkv.kernels.tune.wisdom import (
    Winner,
    bucket,
    find,
    merge,
    ranking,
    read,
    winner_of,
    wisdom_path,
)
from alignedkv.policy import PrecisionPolicy, model_policy, output_policy
from landscapes import PROBLEM, SPACE, SPEC, made_up_sweep, timed

DEFAULT = default_config(SPEC, SM90)
OTHER = next(config for config in SPACE if config != DEFAULT)


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNEDKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(wisdom, "SHIPPED", tmp_path / "shipped")


def winner(**changes: object) -> Winner:
    facts = {
        "spec": SPEC,
        "config": OTHER,
        "tokens_bucket": 15,
        "heads_bucket": 3,
        "source": source_digest(),
        "median_us": 20.0,
        "default_us": 21.0,
        "card": SM90.name,
        "data": "mixed",
    }
    return Winner(**(facts | changes))  # type: ignore[arg-type]


def test_who_never_tunes_gets_the_default() -> None:
    advice = find(SPEC, SM90, tokens=32768, heads=8)
    assert advice.config == DEFAULT
    assert advice.reason == "untuned"


def test_what_is_kept_is_found_at_once() -> None:
    find(SPEC, SM90, tokens=32768, heads=8)
    merge(wisdom_path(SM90), [winner()])
    assert find(SPEC, SM90, tokens=32768, heads=8).config == OTHER
    assert read(wisdom_path(SM90)) == [winner()]


def test_a_winner_serves_other_dtypes_of_rows_and_outputs() -> None:
    merge(wisdom_path(SM90), [winner()])
    other = replace(SPEC, query_dtype="float32", row_dtype="float16")
    assert find(other, SM90, tokens=32768, heads=8).config == OTHER


def test_exact_rows_borrow_the_winner_of_the_spec_without_them() -> None:
    exact = replace(SPEC, exact_rows=True)
    own, other = SPACE[3], SPACE[7]
    merge(wisdom_path(SM90), [winner(config=other)])
    advice = find(exact, SM90, tokens=32768, heads=8)
    assert advice.config == other
    assert advice.reason.endswith("0 buckets away, tuned without exact rows")
    merge(wisdom_path(SM90), [winner(spec=exact, config=own, tokens_bucket=20)])
    assert find(exact, SM90, tokens=32768, heads=8).config == own
    assert find(SPEC, SM90, tokens=32768, heads=8).config == other


def test_the_nearest_bucket_counts() -> None:
    near, far = SPACE[3], SPACE[7]
    merge(wisdom_path(SM90), [winner(config=near), winner(config=far, tokens_bucket=20)])
    assert find(SPEC, SM90, tokens=1 << 14, heads=64).config == near
    assert find(SPEC, SM90, tokens=1 << 19, heads=8).config == far
    assert "1 buckets away" in find(SPEC, SM90, tokens=1 << 19, heads=8).reason


@given(st.integers(1, 1 << 24))
def test_a_bucket_is_within_half_a_doubling(count: int) -> None:
    assert abs(math.log2(count) - bucket(count)) <= 0.5


def test_a_users_winner_goes_before_a_shipped_one() -> None:
    merge(wisdom.SHIPPED / "sm_90.json", [winner(config=SPACE[5])])
    assert find(SPEC, SM90, tokens=32768, heads=8).config == SPACE[5]
    merge(wisdom_path(SM90), [winner(config=SPACE[6], tokens_bucket=10)])
    assert find(SPEC, SM90, tokens=32768, heads=8).config == SPACE[6]


def test_other_specs_and_architectures_are_not_served() -> None:
    merge(wisdom_path(SM90), [winner()])
    for spec, target in ((DecodeSpec(head_dim=64, group=4), SM90), (SPEC, SM80)):
        assert find(spec, target, tokens=32768, heads=8).config == default_config(spec, target)


def test_stale_winners_are_passed_over_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    illegal = DecodeConfig(warps=16, blocks_per_sm=4)
    assert restrictions(SPEC, illegal, SM90)
    merge(
        wisdom_path(SM90),
        [winner(source="0" * 64), winner(config=illegal, tokens_bucket=14)],
    )
    with caplog.at_level(logging.INFO, logger=wisdom.__name__):
        advice = find(SPEC, SM90, tokens=32768, heads=8)
    assert advice.config == DEFAULT
    assert advice.reason == "untuned; 2 stale winners passed over"
    assert "timed with kernels 000000000000" in caplog.text
    assert "registers" in caplog.text


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"version": 99}', '{"version": 1, "winners": [{}]}']
)
def test_a_damaged_file_costs_nothing_but_itself(
    damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = wisdom_path(SM90)
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    merge(wisdom.SHIPPED / "sm_90.json", [winner()])
    assert find(SPEC, SM90, tokens=32768, heads=8).config == OTHER
    assert "move it away" in caplog.text
    with pytest.raises(TuningError, match="move it away"):
        merge(path, [winner()])
    assert path.read_text() == damage


def test_a_winner_of_another_version_of_tunables_is_damage_with_a_reason() -> None:
    path = wisdom_path(SM90)
    merge(path, [winner()])
    content = json.loads(path.read_text())
    content["winners"][0]["config"]["gears"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(TuningError, match="gears"):
        read(path)
    assert find(SPEC, SM90, tokens=32768, heads=8).config == DEFAULT


def test_a_later_winner_replaces_an_earlier_one_of_the_same_decision_only() -> None:
    path = wisdom_path(SM90)
    merge(path, [winner(), winner(tokens_bucket=12)])
    merge(path, [winner(config=SPACE[9], source="1" * 64)])
    assert {(w.tokens_bucket, w.config) for w in read(path)} == {(15, SPACE[9]), (12, OTHER)}


def test_two_writers_lose_nothing() -> None:
    path = wisdom_path(SM90)

    def write(first: int) -> None:
        for number in range(first, first + 6):
            merge(path, [winner(tokens_bucket=number)])

    writers = [threading.Thread(target=write, args=(first,)) for first in (0, 6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {w.tokens_bucket for w in read(path)} == set(range(12))


def test_the_winner_of_a_sweep() -> None:
    sweep = made_up_sweep()
    best = winner_of([sweep])
    assert best.config == sweep.ranked()[0].config
    assert (best.tokens_bucket, best.heads_bucket) == (15, 3)
    assert best.default_us is not None
    assert best.median_us < best.default_us


def test_the_winner_over_several_data_is_right_and_fast_on_all() -> None:
    a, b, c = SPACE[:3]

    def sweep(data: str, times: dict[DecodeConfig, float | None]) -> object:
        trials = tuple(
            Trial(config=config, status=Status.WRONG_ANSWER)
            if time is None
            else replace(timed(config), times_us=(time,))
            for config, time in times.items()
        )
        return made_up_sweep(problem=replace(PROBLEM, data=data), trials=trials)

    flat = sweep("flat", {a: 10.0, b: 12.0, c: 5.0})
    peaky = sweep("peaky", {a: 30.0, b: 20.0, c: None})
    assert ranking([flat, peaky])[0] == (b, pytest.approx(math.sqrt(240.0)))  # type: ignore[list-item]
    kept = winner_of([flat, peaky])  # type: ignore[list-item]
    assert (kept.config, kept.data) == (b, "flat, peaky")
    with pytest.raises(TuningError, match="nothing to keep"):
        winner_of([sweep("flat", {a: 1.0}), sweep("mixed", {b: 1.0})])  # type: ignore[list-item]


def test_finding_wisdom_needs_no_search_library_and_no_gpu() -> None:
    script = (
        "import sys\n"
        "from alignedkv.kernels.tune.wisdom import find\n"
        "from alignedkv.kernels.spec import DecodeSpec\n"
        "from alignedkv.kernels.target import SM90\n"
        "find(DecodeSpec(head_dim=128, group=4), SM90, tokens=4096, heads=8)\n"
        "assert not {'optuna', 'cupy', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("preset", [model_policy, output_policy])
def test_shipped_winners_serve_the_presets(
    preset: Callable[[], PrecisionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(wisdom.__file__).parent
    monkeypatch.setattr(wisdom, "SHIPPED", folder)
    shipped = read(folder / f"{SM90.arch}.json")
    assert shipped
    for best in shipped:
        shape = {"head_dim": best.spec.head_dim, "group": best.spec.group}
        spec = DecodeSpec.from_policy(preset(), **shape)
        sizes = {"tokens": 1 << best.tokens_bucket, "heads": 1 << best.heads_bucket}
        advice = find(spec, SM90, **sizes, source=best.source)
        assert advice.config == best.config
        assert "0 buckets away" in advice.reason


def test_shipped_winners_can_be_read_and_are_legal() -> None:
    for path in Path(wisdom.__file__).parent.glob("sm_*.json"):
        for shipped in read(path):
            assert shipped.card
            assert not restrictions(shipped.spec, shipped.config, SM90)
