"""The machines on which tests of kernels run."""

from __future__ import annotations

import importlib
import shutil
from types import ModuleType

import pytest

from emulator.machines import Emulated, Gpu, Machine, emulate_places


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Where the kernels of a test run: on host threads, and on a GPU if there is one."""
    if request.param == "gpu":
        return Gpu()
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile kernels for the host")
    emulate_places(monkeypatch)
    return Emulated()


@pytest.fixture(params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> ModuleType:
    """A module with the functions of `reference`, which take and return NumPy arrays."""
    return importlib.import_module(f"alignedkv.kernels.{request.param}")
