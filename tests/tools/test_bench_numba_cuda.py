"""The benchmark of the Numba CUDA kernels beside the CUDA C++ ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_numba_cuda

torch = pytest.importorskip("torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_numba_cuda.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.gpu
def test_both_read_the_same_and_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "numba-cuda.json"
    sizes = ["--tokens", "1024", "--heads", "8", "--kv-heads", "2", "--head-dim", "64"]
    assert bench_numba_cuda.main([*sizes, "--replays", "3", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["numba_us"] > 0
    assert row["cuda_us"] > 0
    # The other's hints move on from step to step.
    assert row["numba_read_fraction"] == pytest.approx(row["cuda_read_fraction"], rel=0.1)
    assert row["numba_error_max"] < row["tolerance"]
