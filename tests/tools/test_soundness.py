"""The command: what it writes, and that it notices a broken claim."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import soundness


def test_report_has_all_three_bounds(tmp_path):
    path = tmp_path / "soundness.json"
    assert soundness.main(["--cases", "600", "--draws", "3", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["deterministic"]["cases"] >= 600
    assert {row["plan"] for row in report["statistical"]} == {"fixed", "settled"}
    broken = [row for row in report["estimate_counterexample"] if row["failure_rate"] > 0.9]
    assert {row["plan"] for row in broken} == {"first_plane"}


def test_a_broken_bound_is_noticed(monkeypatch):
    real = soundness.certify

    def too_small(*arguments, **options):
        certificate = real(*arguments, **options)
        return replace(certificate, bound=certificate.bound / 4)

    monkeypatch.setattr(soundness, "certify", too_small)
    found = soundness.deterministic_failures(seed=0, cases=5000)
    assert sum(found["failures"].values()) > 0


@pytest.mark.parametrize(
    ("rate", "claimed", "refuted"), [(0.0, 1e-9, False), (0.02, 0.01, False), (0.2, 0.01, True)]
)
def test_refutation(rate, claimed, refuted):
    assert soundness.is_refuted(rate, claimed, draws=200) == refuted


def test_nonsense_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        soundness.main(["--cases", "0"])
    assert caught.value.code == 2
