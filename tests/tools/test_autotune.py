"""tools/autotune.py from the command line: without a GPU, and with a made-up one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

import autotune
import autotune_sweep
from alignedkv.kernels.compile import Resources
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.target import SM90
from alignedkv.kernels.tune.measure import Candidate
from alignedkv.kernels.tune.trials import Status, Sweep, Trial
from alignedkv.kernels.tune.wisdom import find, read, winner_of, wisdom_path
from conftest import why_no_gpu
from landscapes import PROBLEM, SPACE, SPEC, cost_us, made_up_sweep, timed

pytest.importorskip("optuna")
TOOL = Path(autotune.__file__)
TAKEN = {"decode": Resources(
    registers=99, spill_store_bytes=0, spill_load_bytes=0, stack_bytes=0, shared_bytes=0
)}  # fmt: skip


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.json"
    made_up_sweep().save(path)
    return path


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Candidate]:
    """Builds and sessions without a compiler and a GPU; what was asked."""
    asked: list[Candidate] = []

    class Builds:
        def __init__(self, *facts: object, **more: object) -> None:
            self.announced: set[DecodeConfig] = set()

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def announce(self, configs: Sequence[DecodeConfig]) -> None:
            self.announced.update(configs)

        def result(self, config: DecodeConfig) -> dict[str, Resources]:
            return TAKEN

    class Isolated(Builds):
        def __class_getitem__(cls, kinds: object) -> type[Isolated]:
            return cls

        def start(self) -> None:
            pass

        def ask(self, candidate: Candidate) -> Trial:
            asked.append(candidate)
            facts = {"bound": candidate.tolerance, "error": candidate.tolerance / 3}
            return replace(timed(candidate.config), facts=facts)

    monkeypatch.setenv("ALIGNEDKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "obstacle", lambda: None)
    # As on a machine without matplotlib; the report's tests make pages.
    monkeypatch.setitem(sys.modules, "autotune_page", None)
    monkeypatch.setattr(autotune_sweep, "Builds", Builds)
    monkeypatch.setattr(autotune_sweep, "Isolated", Isolated)
    monkeypatch.setattr(autotune_sweep, "device_target", lambda device: SM90)
    monkeypatch.setattr(autotune_sweep, "versions", lambda: {"alignedkv": "0"})
    return asked


@pytest.mark.skipif(why_no_gpu() is None, reason="this machine has a GPU")
def test_without_a_gpu_one_line_offers_the_replay() -> None:
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(
        [sys.executable, str(TOOL)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "--replay" in done.stderr


def test_a_replay_prints_the_best_and_its_rank(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--replay", str(sweep_file), "--search", "tpe", "--trials", "20", "--seed", "1"]
    assert autotune.main(command) == 0
    # 20 and the default, unless it is one of them.
    assert re.search(r"tpe, seed 1, 2[01] of \d+ evaluations: .*rank \d+", capsys.readouterr().out)
    assert autotune.main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["evaluations"] in (20, 21)
    ranked = Sweep.load(sweep_file).ranked()
    assert ranked[facts["rank"] - 1].median_us == facts["best_us"]
    assert DecodeConfig(**facts["best"]) == ranked[facts["rank"] - 1].config


@pytest.mark.parametrize("damage", [None, "", "{]", '{"version": 7}'])
@pytest.mark.parametrize("mode", ["--replay", "--report"])
def test_a_damaged_sweep_is_one_line(
    damage: str | None, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    if damage is not None:
        path.write_text(damage)
    assert autotune.main([mode, str(path)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("autotune: ")
    assert "sweep.json" in said.err


def test_explain_says_why_configurations_are_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    assert autotune.main(["--explain"]) == 0
    said = capsys.readouterr().out
    assert f"{len(SPACE)} of " in said
    assert "shared memory" in said
    assert autotune.main(["--explain", "--json", "--head-dim", "256", "--group", "16"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["legal"] < facts["total"]
    assert sum(facts["pruned"].values()) >= facts["total"] - facts["legal"]


def test_the_report_is_one_file_that_needs_nothing_else(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    facts = {"bound": 0.002, "error": 0.001, "read_fraction": 0.25}
    few = tuple(replace(timed(config), facts=facts) for config in SPACE[:5])
    finer = tmp_path / "finer.json"
    made_up_sweep(problem=replace(PROBLEM, tolerance=2.0**-9), trials=few).save(finer)
    out = tmp_path / "page"
    assert autotune.main(["--report", str(sweep_file), str(finer), "--out", str(out)]) == 0
    assert "rank" in capsys.readouterr().out
    text = (out / "index.html").read_text()
    assert [path.name for path in out.iterdir()] == ["index.html"]
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 2 * 3 + 2
    links = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_sweep_without_a_right_answer_has_a_page_that_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.json"
    made_up_sweep(trials=()).save(path)
    assert autotune.main(["--report", str(path), "--out", str(tmp_path)]) == 0
    assert "had a right answer" in (tmp_path / "index.html").read_text()


def test_failures_are_told_with_an_example(
    made_up_gpu: list[Candidate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ask(self: object, candidate: Candidate) -> Trial:
        reason = "output 1 is 0.5 from the exact one\nand more"
        return Trial(config=candidate.config, status=Status.WRONG_ANSWER, reason=reason)

    monkeypatch.setattr(autotune_sweep.Isolated, "ask", ask)
    command = ["--search", "grid", "--trials", "3", "--out", str(tmp_path)]
    assert autotune.main(command) == 1
    said = capsys.readouterr()
    assert "4 wrong answer" in said.out
    assert re.search(r"such as warps=.*: output 1 is 0\.5 from the exact one$", said.out, re.M)
    assert "nothing is kept" in said.err
    assert not wisdom_path(SM90).exists()


def test_t4_from_the_command_line(sweep_file: Path, tmp_path: Path) -> None:
    t4, again = tmp_path / "t4.json", tmp_path / "again.json"
    assert autotune.main(["--export-t4", str(sweep_file), str(t4)]) == 0
    assert json.loads(t4.read_text())["schema_version"] == "1.0.0"
    assert autotune.main(["--import-t4", str(t4), str(again)]) == 0
    assert again.read_text() == sweep_file.read_text()
    t4.write_text("{")
    assert autotune.main(["--import-t4", str(t4), str(again)]) == 2


def test_winners_travel_between_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    autotune.merge(theirs, [winner_of([made_up_sweep()])])
    assert autotune.main(["--import-wisdom", str(theirs), "--wisdom", str(ours)]) == 0
    assert read(ours) == read(theirs)
    assert "T~2^15" in capsys.readouterr().out
    back = tmp_path / "back.json"
    assert autotune.main(["--export-wisdom", str(back), "--wisdom", str(ours)]) == 0
    assert back.read_text() == theirs.read_text()
    theirs.write_text("{")
    assert autotune.main(["--import-wisdom", str(theirs), "--wisdom", str(ours)]) == 2
    assert "move it away" in capsys.readouterr().err
    assert autotune.main(["--import-wisdom", str(tmp_path / "none"), "--wisdom", str(ours)]) == 2


def test_a_sweep_leaves_files_and_winners(
    made_up_gpu: list[Candidate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--search", "grid", "--tokens", "4096", "32768", "--out", str(out)]
    assert autotune.main(command) == 0
    files = sorted(out.glob("D128-*.json"))
    assert [Sweep.load(path).problem.tokens for path in files] == [32768, 4096]
    sweep = Sweep.load(files[0])
    assert {trial.config for trial in sweep.trials} == set(SPACE)
    assert all(trial.facts["registers"] == 99 for trial in sweep.trials)
    assert len({c.config for c in made_up_gpu}) == len(SPACE)
    best = min(SPACE, key=cost_us)
    assert len(read(wisdom_path(SM90))) == 2
    assert find(SPEC, SM90, tokens=32768, heads=8).config == best
    said = capsys.readouterr()
    assert "times as fast as the default" in said.out
    assert "winner kept in" in said.out
    assert "no page" in said.err


def test_further_data_and_tolerances_are_tried_on_a_shortlist(
    made_up_gpu: list[Candidate], tmp_path: Path
) -> None:
    command = ["--search", "random", "--trials", "30", "--out", str(tmp_path), "--no-wisdom"]
    command += ["--data", "mixed", "peaky", "--tolerance", "2^-7", "0.01", "--shortlist", "5"]
    assert autotune.main(command) == 0
    sweeps = {
        (s.problem.data, s.problem.tolerance): s
        for s in map(Sweep.load, tmp_path.glob("D128-*.json"))
    }
    assert set(sweeps) == {(d, t) for d in ("mixed", "peaky") for t in (2.0**-7, 0.01)}
    first = sweeps["mixed", 2.0**-7]
    assert len(first.trials) in (30, 31)
    listed = {trial.config for trial in first.ranked()[:5]} | {first.default}
    for key, sweep in sweeps.items():
        if key != ("mixed", 2.0**-7):
            assert {trial.config for trial in sweep.trials} == listed
    assert not wisdom_path(SM90).exists()


def test_a_journal_resumes_and_is_of_one_problem(
    made_up_gpu: list[Candidate], tmp_path: Path
) -> None:
    command = ["--search", "grid", "--trials", "4", "--no-wisdom", "--out", str(tmp_path)]
    command += ["--journal", str(tmp_path / "journal"), "--set", "waves=1", "strided_tiles=True"]
    for _ in range(2):
        assert autotune.main(command) == 0
    first_time = [c.config for c in made_up_gpu if c.repeats == 10]
    assert len(set(first_time) - {made_up_sweep().default}) == 8
    assert all(config.waves == 1 and config.strided_tiles for config in set(first_time[:4]))
    assert autotune.main([*command, "--tokens", "4096"]) == 0
    assert len([c for c in made_up_gpu if c.repeats == 10]) > len(first_time)


def test_captured_heads_are_tiled_and_their_shape_is_checked(tmp_path: Path) -> None:
    spec = replace(SPEC, head_dim=64, group=3)
    problem = replace(PROBLEM, spec=spec, data="captured", batch=2, kv_heads=2)
    inputs = autotune_sweep.make_inputs(problem, None, 1500, np)
    assert inputs.keys.shape == (2, 2, 1500, 64)
    assert np.isfinite(inputs.query).all()
    with pytest.raises(autotune.TuningError, match="--group 3 --head-dim 64"):
        autotune_sweep.make_inputs(replace(problem, spec=SPEC), None, 10, np)


@pytest.mark.parametrize(
    "command", [["--set", "warps"], ["--set", "gears=2"], ["--set", "warps=5"]]
)
def test_tunables_that_are_none(
    command: list[str], made_up_gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = autotune.main(command)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert command[1].partition("=")[0] in capsys.readouterr().err
