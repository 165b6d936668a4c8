from __future__ import annotations

from dataclasses import replace

import pytest

from alignedkv.errors import CodegenError
from alignedkv.kernels.config import WARP, DecodeConfig
from alignedkv.kernels.footprint import shared_bytes
from alignedkv.kernels.legality import check_legal, configurations, default_config, restrictions
from alignedkv.kernels.spec import HEAD_DIMS, LAYOUTS, MAX_GROUP, DecodeSpec
from alignedkv.kernels.target import SM80, SM90, TARGETS, DeviceTarget
from alignedkv.planes import PlaneLayout

SPEC = DecodeSpec(head_dim=128, group=4)


def specs() -> list[DecodeSpec]:
    layouts = [PlaneLayout.parse(text) for text in LAYOUTS]
    return [
        DecodeSpec(head_dim=d, group=g, layout=layout, stored_planes=n)
        for d in HEAD_DIMS
        for g in (1, 4, MAX_GROUP)
        for layout in layouts
        for n in range(2, len(layout) + 1)
    ]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)
def test_every_spec_has_a_legal_default(target: DeviceTarget) -> None:
    for spec in specs():
        assert restrictions(spec, default_config(spec, target), target) == []


def test_the_space_is_large_and_legal() -> None:
    space = list(configurations(SPEC, SM90))
    assert len(space) >= 200
    assert len(set(space)) == len(space)
    assert default_config(SPEC, SM90) in space
    for config in space:
        shared = config.blocks_per_sm * (shared_bytes(SPEC, config) + SM90.reserved_shared_bytes)
        assert shared <= SM90.shared_bytes_per_sm
        assert config.blocks_per_sm * config.warps * WARP <= SM90.threads_per_sm


def test_reasons_name_what_is_too_much() -> None:
    poor = replace(SM80, shared_bytes_per_block=1 << 10, shared_bytes_per_sm=1 << 10)
    reasons = restrictions(SPEC, DecodeConfig(), poor)
    assert any("a block takes" in reason for reason in reasons)
    assert any("the blocks of an SM take" in reason for reason in reasons)
    assert "64 registers" not in str(restrictions(SPEC, DecodeConfig(), SM80))
    crowded = DecodeConfig(warps=16, blocks_per_sm=4)
    assert any("registers" in reason for reason in restrictions(SPEC, crowded, SM90))
    unknown = DecodeConfig(warps=7)
    assert restrictions(SPEC, unknown, SM90) == ["warps 7: allowed are 4, 6, 8, 12, 16"]


def test_check_legal_lists_every_reason() -> None:
    poor = replace(SM80, shared_bytes_per_block=1 << 10, shared_bytes_per_sm=1 << 10)
    with pytest.raises(CodegenError, match=r"(?s)a block takes.*the blocks of an SM take"):
        check_legal(SPEC, DecodeConfig(), poor)
    with pytest.raises(CodegenError, match="a block takes"):
        default_config(SPEC, poor)
