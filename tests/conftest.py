"""What every test runs under: marks, Hypothesis settings, a cache folder of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Numba compiles on the first call of a function: a deadline per example would blame that example.
settings.register_profile("alignedkv", settings.default, deadline=None)
settings.load_profile("alignedkv")

# The tests use what is on the machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OPT_IN_MARKS = {
    "slow": "run the tests that take minutes",
    "model": "run the tests on small real models, see README.md",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alignedkv")
    for mark, meaning in OPT_IN_MARKS.items():
        group.addoption(f"--{mark}", action="store_true", help=meaning)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {
        mark: f"runs only with --{mark}" for mark in OPT_IN_MARKS if not config.getoption(mark)
    }
    if any(item.get_closest_marker("gpu") for item in items):
        obstacle = why_no_gpu()
        if obstacle is not None:
            skips["gpu"] = obstacle
    for item in items:
        for mark, reason in skips.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def why_no_gpu() -> str | None:
    """Return what keeps CuPy from a CUDA device here, or None if nothing does."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if count else "no CUDA device: the driver lists none"


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled kernels of this run go to, and come from, a folder of its own."""
    path = tmp_path_factory.mktemp("alignedkv-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNEDKV_CACHE_DIR", str(path))
        yield path
