from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.errors import CodegenError
from alignedkv.kernels.config import (
    CHOICES,
    WARP,
    DecodeConfig,
    check_legal,
    configurations,
    default_config,
    restrictions,
    shared_bytes,
    splits_per_head,
)
from alignedkv.kernels.spec import HEAD_DIMS, LAYOUTS, MAX_GROUP, MAX_TOKENS, DecodeSpec
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


def test_every_default_is_a_choice() -> None:
    for tunable in fields(DecodeConfig):
        assert tunable.default in CHOICES[tunable.name]
        assert len(CHOICES[tunable.name]) > 1


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


def test_settings_come_as_texts() -> None:
    config = DecodeConfig.from_settings({"warps": "4", "strided_tiles": "False"})
    assert config == DecodeConfig(warps=4, strided_tiles=False)
    with pytest.raises(CodegenError, match=r"warp_count.*give one of warps"):
        DecodeConfig.from_settings({"warp_count": "4"})
    with pytest.raises(CodegenError, match="warps=7: give one of 4, 6, 8, 12, 16"):
        DecodeConfig.from_settings({"warps": "7"})


@given(
    config=st.sampled_from(list(configurations(SPEC, SM90))),
    heads=st.integers(1, 4096),
    capacity=st.integers(1, MAX_TOKENS),
)
def test_splits_fill_the_gpu_and_no_more(config: DecodeConfig, heads: int, capacity: int) -> None:
    splits = splits_per_head(config, SM90, heads=heads, capacity=capacity)
    assert splits >= 1
    if splits > 1:
        assert splits * heads <= config.waves * config.blocks_per_sm * SM90.sm_count
        assert (splits - 1) * config.warps * WARP < capacity
