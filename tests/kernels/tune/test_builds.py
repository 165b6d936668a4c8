"""Candidates compiled in other processes; skipped without NVRTC."""

from __future__ import annotations

import pytest

from alignedkv.errors import CompileError
from alignedkv.kernels.compile import compiler_version
from alignedkv.kernels.legality import default_config
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import SM90
from alignedkv.kernels.tune.builds import Builds
from landscapes import SPACE

pytest.importorskip("cupy")

#: The smallest kernels that there are.
SPEC = DecodeSpec(head_dim=64, group=1, stored_planes=2)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        compiler_version()
    except CompileError as error:
        pytest.skip(str(error))


def test_a_build_tells_what_its_kernels_take() -> None:
    default = default_config(SPEC, SM90)
    with Builds(SPEC, SM90.arch, workers=1) as builds:
        builds.announce([default, default])
        taken = builds.result(default)
        assert {"prepare", "decode"} <= set(taken)
        assert all(resources.registers > 0 for resources in taken.values())
        assert builds.result(default) == taken


def test_what_does_not_compile_is_an_error_of_its_own() -> None:
    with (
        Builds(SPEC, "sm_1", workers=1) as builds,
        pytest.raises(CompileError, match="sm_1"),
    ):
        builds.result(SPACE[0])
