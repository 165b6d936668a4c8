from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.errors import CodegenError
from alignedkv.kernels.config import (
    CHOICES,
    TILE,
    DecodeConfig,
    blocks_go_by_work,
    blocks_of_step,
    products,
)
from alignedkv.kernels.spec import MAX_TOKENS
from alignedkv.kernels.target import SM90


def test_every_default_is_a_choice() -> None:
    for tunable in fields(DecodeConfig):
        assert tunable.default in CHOICES[tunable.name]
        assert len(CHOICES[tunable.name]) > 1


@pytest.mark.parametrize("text", ["False", "false", "0"])
def test_settings_come_as_texts(text: str) -> None:
    config = DecodeConfig.from_settings({"warps": "4", "strided_tiles": text})
    assert config == DecodeConfig(warps=4, strided_tiles=False)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(CodegenError, match=r"warp_count.*give one of warps"):
        DecodeConfig.from_settings({"warp_count": "4"})
    with pytest.raises(CodegenError, match="warps=7: give one of 4, 6, 8, 12, 16"):
        DecodeConfig.from_settings({"warps": "7"})


@given(
    config=st.sampled_from(list(products())),
    heads=st.integers(1, 4096),
    capacity=st.integers(1, MAX_TOKENS),
)
def test_blocks_fill_the_gpu_and_no_more(config: DecodeConfig, heads: int, capacity: int) -> None:
    blocks = blocks_of_step(config, SM90, heads=heads, capacity=capacity)
    assert blocks >= heads
    if blocks > heads:
        assert blocks <= config.waves * config.blocks_per_sm * SM90.sm_count
        assert (blocks / heads - 1) * config.warps * TILE < capacity
    else:
        assert not blocks_go_by_work(config, blocks, heads=heads, capacity=capacity)


def test_short_contexts_share_blocks_evenly() -> None:
    config = DecodeConfig()
    assert not blocks_go_by_work(config, 132, heads=8, capacity=16384)
    assert blocks_go_by_work(config, 132, heads=8, capacity=32768)
    assert blocks_go_by_work(config, 132, heads=64, capacity=8192)
