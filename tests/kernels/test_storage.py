"""Where rows lie, what they weigh, and what a cache refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alignedkv.errors import LaunchError, SpecError
from alignedkv.kernels.spec import MAX_TOKENS, DecodeSpec
from alignedkv.kernels.storage import (
    allocate,
    allocate_numpy,
    bytes_per_token,
    bytes_read,
    bytes_stored,
    capacity_of,
    exact_rows_read,
    exact_slots,
    from_float64,
    row_addresses,
    to_float32,
)
from alignedkv.planes import PlaneLayout

SPEC = DecodeSpec(head_dim=64, group=2)
PAGED = DecodeSpec(head_dim=64, group=2, page_tokens=16)
SIZES = {"batch": 3, "kv_heads": 2, "capacity": 37}


def test_arrays_are_as_they_are_declared() -> None:
    spec = DecodeSpec(
        head_dim=80, group=2, layout=PlaneLayout((4, 2, 2, 8)), stored_planes=3, exact_rows=True
    )
    cache = allocate_numpy(spec, **SIZES, exact_first=2, exact_last=3, seed=5)
    assert [p.shape for p in cache.key_planes] == [(3, 2, 37, w) for w in (48, 24, 24)]
    assert all(p.dtype == np.uint8 for p in (*cache.key_planes, *cache.value_planes))
    assert (cache.scales.shape, cache.scales.dtype) == ((3, 2, 37), np.uint32)
    assert cache.key_mean.shape == cache.value_mean.shape == (3, 2, 80)
    assert (cache.balance == 1).all()
    assert (cache.dither.shape, cache.dither.dtype) == ((2, 64, 96), np.int16)
    assert (cache.dither[0] != cache.dither[1]).any()
    assert (cache.signs.shape, set(cache.signs)) == ((96,), {-1.0, 1.0})
    assert (cache.exact_keys.shape, cache.exact_keys.dtype) == ((3, 2, 5, 80), np.uint16)
    assert cache.lengths.tolist() == cache.starts.tolist() == [0, 0, 0]


def test_seeds_make_caches_differ() -> None:
    tables = [allocate_numpy(SPEC, **SIZES, seed=seed).dither for seed in (0, 0, 1)]
    assert (tables[0] == tables[1]).all()
    assert not np.isin(tables[0][0, 0], tables[2][0, 0]).all()


def test_allocation_asks_its_caller_for_every_array() -> None:
    """Nothing is made but by ``zeros`` and ``put``: so torch and CuPy need not be known."""

    class Foreign:
        def __init__(self, shape: Any, dtype: Any) -> None:
            self.shape, self.dtype = tuple(shape), str(dtype)

    cache = allocate(PAGED, **SIZES, zeros=Foreign, put=lambda a: Foreign(a.shape, a.dtype))
    arrays = [*cache.key_planes, *cache.value_planes, cache.scales, cache.key_mean, cache.balance]
    arrays += [cache.value_mean, cache.signs, cache.dither, cache.lengths, cache.block_table]
    assert all(isinstance(array, Foreign) for array in arrays)
    assert cache.scales.shape == (9, 2, 16)


def test_rows_of_a_contiguous_cache_are_in_order() -> None:
    cache = allocate_numpy(SPEC, **SIZES)
    addresses = np.arange(cache.scales.size).reshape(cache.scales.shape)
    for b in range(3):
        for h in range(2):
            found = row_addresses(SPEC, cache, b, h, np.arange(37))
            assert (found == addresses[b, h]).all()


def test_rows_of_a_paged_cache_follow_the_table() -> None:
    cache = allocate_numpy(PAGED, **SIZES, pages=11)
    assert (cache.block_table.shape, capacity_of(PAGED, cache)) == ((3, 3), 48)
    assert not cache.block_table.any()
    cache.block_table[:] = np.random.default_rng(0).permutation(11)[:9].reshape(3, 3)
    addresses = np.arange(cache.scales.size).reshape(cache.scales.shape)
    seen = set()
    for b in range(3):
        for h in range(2):
            for t in range(48):
                page = cache.block_table[b, t // 16]
                found = int(row_addresses(PAGED, cache, b, h, np.array([t]))[0])
                assert found == addresses[page, h, t % 16]
                seen.add(found)
    assert len(seen) == 3 * 2 * 48


def test_addresses_go_beyond_32_bits() -> None:
    cache = allocate_numpy(SPEC, **SIZES)
    object.__setattr__(cache, "scales", np.broadcast_to(np.uint32(0), (4096, 2, MAX_TOKENS)))
    found = row_addresses(SPEC, cache, 4095, 1, np.array([MAX_TOKENS - 1]))
    assert found[0] == 4096 * 2 * MAX_TOKENS - 1


def test_exact_slots_hold_the_ends() -> None:
    spec = DecodeSpec(head_dim=64, group=2, exact_rows=True)
    cache = allocate_numpy(spec, **SIZES, exact_first=2, exact_last=3)
    slots = exact_slots(cache, np.arange(12), start=1, length=12)
    assert slots.tolist() == [-1, 0, 1, -1, -1, -1, -1, -1, -1, 2, 3, 4]
    # Where both ends meet, the first rows' slots are used, and no slot twice.
    short = exact_slots(cache, np.arange(4), start=0, length=4)
    assert short.tolist() == [0, 1, 4, 2]


def test_bytes_are_those_of_the_arrays() -> None:
    for layout, stored in (((4, 4, 4, 4), 4), ((4, 2, 2, 8), 3), ((4, 4, 8), 2)):
        spec = DecodeSpec(head_dim=96, group=1, layout=PlaneLayout(layout), stored_planes=stored)
        cache = allocate_numpy(spec, **SIZES)
        arrays = (*cache.key_planes, *cache.value_planes, cache.scales)
        assert bytes_stored(spec, **SIZES) == sum(array.nbytes for array in arrays)
        everything = np.full((2, stored), 37)
        assert bytes_read(spec, everything) == 37 * bytes_per_token(spec)
    reads = np.array([[10, 2, 0], [5, 0, 0]])
    spec = DecodeSpec(head_dim=64, group=1, layout=PlaneLayout((4, 4, 8)), stored_planes=3)
    assert bytes_read(spec, reads) == 10 * (32 + 4) + 2 * 32 + 5 * 32


def test_exact_rows_count() -> None:
    spec = DecodeSpec(head_dim=64, group=2, exact_rows=True, row_dtype="float32")
    cache = allocate_numpy(spec, **SIZES, exact_first=2, exact_last=3)
    arrays = (*cache.key_planes, *cache.value_planes, cache.scales)
    rows = (cache.exact_keys, cache.exact_values)
    assert bytes_stored(spec, **SIZES, exact_rows=5) == sum(x.nbytes for x in (*arrays, *rows))
    reads = np.array([[10, 2, 0, 0], [5, 0, 0, 0]])
    planes = bytes_read(replace(spec, exact_rows=False), reads)
    assert bytes_read(spec, reads, exact=np.array(7)) == planes + 7 * 2 * 64 * 4


@pytest.mark.parametrize(
    ("first_reads", "attended", "kept", "wanted"),
    [(38, 40, 2, 2), (3 * 38, 40, 2, 6), (36, 40, 4, 4), (0, 3, 3, 3), (0, 0, 0, 0)],
)
def test_first_planes_tell_the_passes_over_exact_rows(
    first_reads: int, attended: int, kept: int, wanted: int
) -> None:
    spec = DecodeSpec(head_dim=64, group=2, exact_rows=True)
    numbers = [np.array([x]) for x in (first_reads, attended, kept)]
    assert exact_rows_read(spec, *numbers).tolist() == [wanted]


def test_bytes_without_exact_rows_are_refused() -> None:
    spec = DecodeSpec(head_dim=64, group=2, exact_rows=True)
    reads = np.zeros((2, 4), np.int64)
    with pytest.raises(SpecError, match="exactly where it is set"):
        bytes_read(spec, reads)
    with pytest.raises(SpecError, match="exactly where it is set"):
        bytes_read(SPEC, reads, exact=np.array(1))
    with pytest.raises(SpecError, match="exact_rows=True"):
        bytes_stored(spec, **SIZES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_are_rounded_once_and_read_exactly(dtype: str) -> None:
    x = np.array([1.0, 1 / 3, -2.5e-3, 0.0, 1.0 + 2.0**-8 + 2.0**-30])
    back = to_float32(from_float64(x, dtype), dtype)
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    assert (np.abs(back - x) <= u * np.abs(x)).all()
    if dtype == "bfloat16":  # above the middle: by way of float32 it would be a tie, rounded down
        assert back[4] == 1.0 + 2.0**-7
    again = to_float32(from_float64(back.astype(np.float64), dtype), dtype)
    assert (again == back).all()


@pytest.mark.parametrize(
    ("spec", "sizes", "message"),
    [
        (SPEC, {"batch": 0}, "at least one"),
        (SPEC, {"kv_heads": 0}, "at least one"),
        (SPEC, {"capacity": 0}, "1 to 1048576"),
        (SPEC, {"capacity": MAX_TOKENS + 1}, "1 to 1048576"),
        (SPEC, {"batch": 4096, "capacity": MAX_TOKENS}, r"at most 2\^32"),
        (SPEC, {"exact_first": 1}, "exact_rows=False"),
        (DecodeSpec(head_dim=64, group=2, exact_rows=True), {}, "exact_rows=True"),
    ],
)
def test_impossible_caches_are_refused(
    spec: DecodeSpec, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        allocate_numpy(spec, **{**SIZES, **sizes})


def test_a_paged_cache_needs_its_table() -> None:
    cache = allocate_numpy(SPEC, **SIZES)
    with pytest.raises(LaunchError, match="no block table"):
        capacity_of(PAGED, cache)
