"""AlignedKVCache beside transformers' caches, call by call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from alignedkv import runtime
from alignedkv.errors import LaunchError, SpecError, UnsupportedModelError
from alignedkv.policy import PRESET_EXACT_FIRST, PrecisionPolicy
from alignedkv.runtime import AlignedKVCache, make_request
from tiny_models import CACHE, make_tiny, prompt, tiny

KV_HEADS, HEAD_DIM, LAYERS, CAPACITY = 2, 64, 2, 48
#: Rows come back from 16-bit words in units of a 7.5 * 2^12th of their largest transformed channel;
#: turning them back adds up to 64 such errors at 1/64 each and the ratio of two balance factors.
READ_BACK = 2.0**-13


def rows(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, KV_HEADS, tokens, HEAD_DIM)
    keys, values = torch.randn(shape, generator=generator)
    return keys, values


def assert_same(ours: tuple[Tensor, Tensor], stock: tuple[Tensor, Tensor], length: int) -> None:
    """Rows that the default policy keeps exact are the same, the others as close as can be."""
    for near, exact in zip(ours, stock, strict=True):
        assert near.shape == exact.shape
        assert near.dtype == exact.dtype
        exact, near = exact[:, :, :length], near[:, :, :length]
        assert torch.equal(near[:, :, :PRESET_EXACT_FIRST], exact[:, :, :PRESET_EXACT_FIRST])
        assert (near - exact).abs().max() <= READ_BACK * exact.abs().max()


class CallByCall(RuleBasedStateMachine):
    """Random calls, each made to both caches; what they return and say must agree."""

    max_cache_len: int | None = None

    def make_stock(self) -> Cache:
        return DynamicCache(config=tiny("Llama").config)

    @initialize(batch=st.integers(1, 3))
    def start(self, batch: int) -> None:
        self.batch = batch
        self.length = 0
        self.stock = self.make_stock()
        self.ours = AlignedKVCache(tiny("Llama").config, max_cache_len=self.max_cache_len)

    @precondition(lambda self: self.length < CAPACITY - 20)
    @rule(tokens=st.integers(1, 20), seed=st.integers(0, 99))
    def update(self, tokens: int, seed: int) -> None:
        self.length += tokens
        for layer in range(LAYERS):
            new = rows(self.batch, tokens, seed + 1000 * layer)
            assert_same(self.ours.update(*new, layer), self.stock.update(*new, layer), self.length)

    # Static layers of older versions of transformers have no crop to compare with.
    @precondition(lambda self: self.length > 0 and hasattr(self.stock.layers[0], "crop"))
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(0, self.length))
        self.length -= tokens
        self.ours.crop(-tokens)
        self.stock.crop(-tokens)

    @precondition(lambda self: self.length > 0)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        beam = torch.tensor(
            data.draw(
                st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch)
            )
        )
        self.ours.reorder_cache(beam)
        self.stock.reorder_cache(beam)

    @rule()
    def reset(self) -> None:
        self.length = 0
        self.ours.reset()
        # A new one is what a reset one should be; older versions of transformers kept the length.
        self.stock = self.make_stock()

    @precondition(lambda self: self.length > 0)
    @rule()
    def copy(self) -> None:
        old = self.ours
        self.ours = copy.deepcopy(old)
        old.reset()

    @precondition(lambda self: self.length > 0)
    @rule()
    def offload_and_fetch(self) -> None:
        for layer in self.ours.layers:
            layer.offload()
            layer.prefetch()

    @invariant()
    def says_the_same(self) -> None:
        assert int(self.ours.get_seq_length()) == int(self.stock.get_seq_length()) == self.length
        assert self.ours.get_mask_sizes(3, 0) == self.stock.get_mask_sizes(3, 0)
        assert self.ours.get_max_length() == self.stock.get_max_length()
        assert self.ours.is_sliding == self.stock.is_sliding
        assert self.ours.is_compileable == (self.max_cache_len is not None)
        assert len(self.ours) == len(self.stock)


class DynamicCallByCall(CallByCall):
    """A dynamic cache can change its batch as well."""

    @precondition(lambda self: self.length > 0 and self.batch < 6)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        self.batch *= repeats
        self.ours.batch_repeat_interleave(repeats)
        self.stock.batch_repeat_interleave(repeats)

    @precondition(lambda self: self.length > 0)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        indices = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4))
        self.batch = len(indices)
        self.ours.batch_select_indices(torch.tensor(indices))
        self.stock.batch_select_indices(torch.tensor(indices))


class StaticCallByCall(CallByCall):
    max_cache_len = CAPACITY

    def make_stock(self) -> Cache:
        return StaticCache(tiny("Llama").config, max_cache_len=CAPACITY)


TestDynamic = DynamicCallByCall.TestCase
TestStatic = StaticCallByCall.TestCase
TestDynamic.settings = TestStatic.settings = settings(
    max_examples=12, stateful_step_count=12, deadline=None
)


def filled(tokens: int = 20, **policy: Any) -> AlignedKVCache:
    request = make_request(PrecisionPolicy(**policy))
    cache = AlignedKVCache(tiny("Llama").config, request)
    for layer in range(LAYERS):
        cache.update(*rows(2, tokens, layer), layer)
    return cache


def test_growth_is_geometric_and_keeps_all_rows() -> None:
    cache = AlignedKVCache(tiny("Llama").config)
    keys, values = rows(1, 2000, 0)
    capacities = set()
    for start in range(0, 2000, 100):
        now = slice(start, start + 100)
        full = cache.update(keys[:, :, now], values[:, :, now], 0)
        capacities.add(cache.layers[0].tensors.capacity)
    assert_same(full, (keys, values), 2000)
    assert len(capacities) <= 7
    assert max(capacities) < 2 * 2000


def test_bytes_are_those_of_the_planes() -> None:
    layer = filled(tokens=1000).layers[0]
    planes = 2 * KV_HEADS * 2 * layer.tensors.capacity * (2 * HEAD_DIM // 2 * 4 + 4) // 2
    assert planes <= layer.tensors.bytes() <= 1.1 * planes + 2**16


def test_fewer_planes_take_less_memory() -> None:
    full, half = (filled(300, stored_planes=n).layers[0].tensors.bytes() for n in (4, 2))
    assert half < 0.6 * full


def test_a_full_static_cache_says_so() -> None:
    cache = AlignedKVCache(tiny("Llama").config, max_cache_len=10)
    cache.update(*rows(1, 8, 0), 0)
    with pytest.raises(LaunchError, match="room for 10"):
        cache.update(*rows(1, 3, 1), 0)


@pytest.mark.parametrize("tokens", [1, 5])
def test_crop_takes_no_final_length(tokens: int) -> None:
    with pytest.raises(SpecError, match="minus the number of tokens"):
        filled().crop(tokens)


def test_crop_and_exact_recent_rows_exclude_each_other() -> None:
    cache = filled(exact_last=4)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(SpecError, match="exact_last"):
        cache.crop(-1)


def test_exact_first_rows_are_croppable() -> None:
    assert filled(exact_first=4).is_croppable


def crop_below_the_exact_rows(cache: Cache) -> None:
    cache.crop(-(int(cache.get_seq_length()) - 2))


def move(cache: Cache) -> None:
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()


def chunks(cache: Cache) -> None:
    for seed, tokens in enumerate((1, 5, 1, 300)):
        for layer in range(LAYERS):
            cache.update(*rows(2, tokens, 50 * seed + layer), layer)


CALLS: dict[str, Callable[[Cache], Any]] = {
    "crop": lambda cache: cache.crop(-15),
    "crop below the exact rows": crop_below_the_exact_rows,
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "offload and fetch": move,
    "grow": chunks,
    "nothing": lambda cache: None,
}


#: A static cache keeps its batch, and older versions of transformers cannot crop it.
OF_STATIC_CACHES = ("reorder", "offload and fetch", "grow", "nothing")


@pytest.mark.parametrize("first", [1, 3, 20])
@pytest.mark.parametrize(
    ("static", "name"),
    [*((False, name) for name in CALLS), *((True, name) for name in OF_STATIC_CACHES)],
)
def test_exact_rows_outlast_every_call(name: str, first: int, static: bool) -> None:
    """Each call made to both caches, behind rows that come in two parts."""
    config = tiny("Llama").config
    size = {"max_cache_len": 400} if static else {}
    stock = StaticCache(config, **size) if static else DynamicCache(config=config)
    both = (AlignedKVCache(config, **size), stock)
    for seed, tokens in enumerate((first, 20)):
        for layer in range(LAYERS):
            new = rows(2, tokens, 10 * seed + layer)
            for cache in both:
                cache.update(*new, layer)
    for cache in both:
        CALLS[name](cache)
    both = (copy.deepcopy(both[0]), stock)
    for layer in range(LAYERS):
        batch = stock.layers[layer].keys.shape[0]
        new = rows(batch, 7, 90 + layer)
        ours, exact = (cache.update(*new, layer) for cache in both)
        assert_same(ours, exact, int(stock.get_seq_length(layer)))
        assert both[0].layers[layer].tensors.exact_rows == (PRESET_EXACT_FIRST, 0)


@pytest.mark.parametrize("max_cache_len", [None, 64])
def test_a_reset_cache_keeps_the_exact_rows_of_the_next_request(max_cache_len: int | None) -> None:
    cache = AlignedKVCache(tiny("Llama").config, max_cache_len=max_cache_len)
    cache.update(*rows(2, 20, 0), 0)
    cache.reset()
    new = rows(2, 3, 1)
    cache.update(*new, 0)
    full = cache.update(*rows(2, 4, 2), 0)
    for near, first, then in zip(full, new, rows(2, 4, 2), strict=True):
        assert torch.equal(near[:, :, :7], torch.cat([first, then], dim=2))


def test_exact_rows_are_those_behind_the_padding() -> None:
    model, inputs = make_tiny("Llama"), prompt(2, 30)
    mask = torch.ones_like(inputs)
    mask[1, :13] = 0
    with torch.no_grad():
        stock = model(inputs, attention_mask=mask)[CACHE]
        with runtime.patched(model):
            ours = model(inputs, attention_mask=mask)[CACHE]
    for layer, exact in zip(ours.layers, stock.layers, strict=True):
        for kept, full in zip(layer.tensors.rows[-2:], (exact.keys, exact.values), strict=True):
            assert torch.equal(kept[0], full[0, :, :4])
            assert torch.equal(kept[1], full[1, :, 13:17])


def test_copies_are_apart() -> None:
    cache = filled()
    twin = copy.deepcopy(cache)
    cache.update(*rows(2, 3, 9), 0)
    assert twin.get_seq_length() == 20
    assert twin.monitor is cache.monitor
    for old, new in zip(
        cache.layers[0].tensors.everything(), twin.layers[0].tensors.everything(), strict=True
    ):
        assert old.data_ptr() != new.data_ptr()


def test_keys_and_values_of_different_sizes_are_refused() -> None:
    cache = AlignedKVCache(tiny("Llama").config)
    keys, values = rows(1, 3, 0)
    with pytest.raises(UnsupportedModelError, match="64 channels and values of 32"):
        cache.update(keys, values[..., :32], 0)


def test_float64_is_refused() -> None:
    cache = AlignedKVCache(tiny("Llama").config)
    keys, values = rows(1, 3, 0)
    with pytest.raises(UnsupportedModelError, match="float64"):
        cache.update(keys.double(), values.double(), 0)


def test_sliding_windows_keep_the_stock_layer() -> None:
    config = tiny("Gemma3").config
    ours, stock = AlignedKVCache(config), DynamicCache(config=config)
    assert type(ours.layers[0]) is type(stock.layers[0])
    assert ours.served == [1]
    assert ours.is_sliding == stock.is_sliding == [True, False]
