"""The benchmark compares like with like: the NumPy transcription finds the package's plan."""

from __future__ import annotations

import json

import numpy as np
import pytest

import bench_analysis
from alignedkv.policy import PrecisionPolicy


@pytest.mark.parametrize("tolerance", [2.0**-8, 2.0**-4])
def test_numpy_finds_the_same_bits(tolerance):
    policy = PrecisionPolicy(tolerance=tolerance, sample_values=False)
    case = bench_analysis.random_head(600, 64, 2, seed=3)
    ours = bench_analysis.analyse(case, policy)
    plain = bench_analysis.analyse_in_numpy(case, policy)
    # Dither seeds differ, and the package retreats where its certificate disagrees.
    assert np.allclose(ours, plain, atol=0.25)


def test_result_is_json(tmp_path, capsys):
    path = tmp_path / "speed.json"
    arguments = ["--tokens", "64", "128", "--head-dim", "64", "--repeats", "1", "--json", str(path)]
    assert bench_analysis.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["T"] for row in rows] == [64, 128]
    assert all(row["seconds"] > 0 and row["numpy_seconds"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2
