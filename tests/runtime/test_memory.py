"""Thousands of decode steps on a CPU take no memory but what the cache itself grows by."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from alignedkv import runtime
from alignedkv.runtime import AlignedKVCache, make_request
from alignedkv.runtime.layers import GROWTH
from tiny_models import CACHE, make_tiny, prompt

pytestmark = pytest.mark.slow

PROMPT, SETTLING, STEPS = 64, 250, 2000
#: The smallest Python object, and what torch's allocator rounds the smallest tensor up to, bytes.
SMALLEST_OBJECT, SMALLEST_TENSOR = 16, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of this process: resident bytes, bytes of Python objects, tensors that Python knows."""

    resident: int
    traced: int
    tensors: int

    @classmethod
    def now(cls) -> Memory:
        # Names that attributes were looked up by stay in the interpreter's cache, some thousands.
        sys._clear_type_cache()
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
        del objects
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            resident=pages * resource.getpagesize(),
            traced=tracemalloc.get_traced_memory()[0],
            tensors=tensors,
        )


@pytest.mark.parametrize("max_cache_len", [None, PROMPT + 2 * SETTLING + STEPS])
def test_steps_leave_nothing_behind(max_cache_len: int | None) -> None:
    """A leak of the smallest tensor or object in every step fails.

    A cache that grows may leave the holes of all its former sizes, each GROWTH times smaller than
    the next, to the allocator.
    """
    model, request, token = make_tiny("Llama"), make_request("output"), torch.tensor([[5]])
    with runtime.patched(model, request.policy), torch.no_grad():
        cache = AlignedKVCache(model.config, request, max_cache_len=max_cache_len)
        model(prompt(1, PROMPT), **{CACHE: cache})

        def steps(count: int) -> None:
            for _ in range(count):
                model(token, **{CACHE: cache})

        def held() -> int:
            return sum(layer.tensors.bytes() for layer in cache.layers)

        steps(SETTLING)
        tracemalloc.start()
        try:
            steps(SETTLING)
            before, held_before = Memory.now(), held()
            steps(STEPS)
            after, held_after = Memory.now(), held()
        finally:
            tracemalloc.stop()

    assert int(cache.get_seq_length()) == PROMPT + 2 * SETTLING + STEPS
    if max_cache_len is None:
        assert held_before < held_after
        holes = held_after / (GROWTH - 1)
    else:
        assert held_before == held_after
        holes = 0
    assert after.tensors == before.tensors
    assert after.traced - before.traced < STEPS * SMALLEST_OBJECT
    grown = after.resident - before.resident - (held_after - held_before)
    assert grown < holes + STEPS * SMALLEST_TENSOR
