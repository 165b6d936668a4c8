"""Thousands of decode steps on a CPU take no memory but what the cache itself grows by."""

from __future__ import annotations

import ctypes
import gc
import sys
import tracemalloc
from dataclasses import dataclass

import pytest
import torch

from alignedkv import runtime
from alignedkv.runtime import AlignedKVCache, make_request
from tiny_models import CACHE, make_tiny, prompt

LIBC = ctypes.CDLL(None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(LIBC, "mallinfo2"), reason="counts memory with mallinfo2 of glibc 2.33 or newer"
    ),
]

PROMPT, SETTLING, STEPS = 64, 250, 2000
#: The smallest Python object, and what malloc takes for the smallest tensor (alignment, header).
SMALLEST_OBJECT, SMALLEST_TENSOR = 16, 64 + 16


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2``, bytes."""

    _names = (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """In use by this process: bytes of malloc, bytes of Python objects, tensors in Python."""

    heap: int
    traced: int
    tensors: int

    @classmethod
    def now(cls) -> Memory:
        # Names that attributes were looked up by stay in the interpreter's cache, some thousands.
        sys._clear_type_cache()
        gc.collect()
        LIBC.mallinfo2.restype = Mallinfo
        told = LIBC.mallinfo2()
        return cls(
            heap=told.uordblks + told.hblkhd,
            traced=tracemalloc.get_traced_memory()[0],
            tensors=sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        )


@pytest.mark.parametrize("max_cache_len", [None, PROMPT + 2 * SETTLING + STEPS])
def test_steps_leave_nothing_behind(max_cache_len: int | None) -> None:
    """A leak of the smallest tensor or object in every step fails."""
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
    assert (held_before < held_after) == (max_cache_len is None)
    assert after.tensors == before.tensors
    assert after.traced - before.traced < STEPS * SMALLEST_OBJECT
    grown = after.heap - before.heap - (held_after - held_before)
    assert grown < STEPS * SMALLEST_TENSOR
