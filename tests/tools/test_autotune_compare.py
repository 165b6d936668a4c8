"""tools/autotune_compare.py: the cache that Kernel Tuner simulates from, and the comparison."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import autotune_compare
from alignedkv.kernels.config import CHOICES
from alignedkv.kernels.tune.t4 import to_t4
from alignedkv.kernels.tune.trials import Status, Trial
from landscapes import SPACE, made_up_sweep, timed


def test_the_cache_has_every_trial_under_its_key() -> None:
    failed = Trial(config=SPACE[0], status=Status.WRONG_ANSWER)
    sweep = made_up_sweep(trials=(failed, *map(timed, SPACE[1:9])))
    cache = autotune_compare.cache_of(sweep)
    assert len(cache["cache"]) == 9
    for trial in sweep.trials:
        key = ",".join(str(value) for value in asdict(trial.config).values())
        entry = cache["cache"][key]
        assert {name: entry[name] for name in CHOICES} == asdict(trial.config)
        if trial.status is Status.OK:
            assert entry["time"] == trial.median_us / 1e3
        else:
            assert entry["__error__"] == "RuntimeFailedConfig"
    assert cache["tune_params_keys"] == list(CHOICES) == list(cache["tune_params"])
    assert all(set(cache["tune_params"][name]) <= set(CHOICES[name]) for name in CHOICES)


def test_what_is_no_t4_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t4.json"
    for content in ("{", "{}"):
        path.write_text(content)
        assert autotune_compare.main([str(path)]) == 2
        assert "t4.json" in capsys.readouterr().err


def test_both_search_the_same_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kernel_tuner")
    pytest.importorskip("optuna")
    path = tmp_path / "t4.json"
    path.write_text(json.dumps(to_t4(made_up_sweep())))
    command = [str(path), "--seeds", "2", "--strategies", "random_sample", "--json"]
    assert autotune_compare.main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["slowdowns"]) == {
        "alignedkv random",
        "alignedkv tpe",
        "kernel_tuner random_sample",
    }
    assert all(found >= 0.999 for row in facts["slowdowns"].values() for found in row)
