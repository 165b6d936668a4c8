"""How blocks share heads: `share.cuh`, on host threads."""

from __future__ import annotations

import ctypes
import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.spec import DecodeSpec
from emulator.machines import host_library

HARNESS = """
extern "C" void run_shares(const float* work, int heads, int blocks, int* to) {
  launch([=] {
    const int block = blockIdx.x;
    const Share share = work ? Share::of(heads, block, blocks, [&](int head) { return work[head]; })
                             : Share::even(heads, block, blocks);
    to[3 * block] = share.head, to[3 * block + 1] = share.split, to[3 * block + 2] = share.splits;
  }, {static_cast<unsigned>(blocks), 1, 1}, {32, 1, 1});
}
"""
#: Loads that the kernel tries.
LOADS = 32


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile kernels for the host")
    spec = DecodeSpec(head_dim=64, group=1)
    return host_library(spec, DecodeConfig(warps=4), "decode.cu", HARNESS)


def shares(library: ctypes.CDLL, work: NDArray[np.float32] | None, heads: int, blocks: int) -> Any:
    """Head, split and splits of each block [blocks, 3]."""
    found = np.full((blocks, 3), -1, np.int32)
    given_work = None if work is None else work.ctypes.data_as(ctypes.c_void_p)
    library.run_shares(given_work, heads, blocks, found.ctypes.data_as(ctypes.c_void_p))
    return found


def check_shares(found: NDArray[np.int32], has_work: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Each head with work has blocks that lie side by side and agree; returns how many."""
    splits = np.zeros(len(has_work), np.int64)
    used = found[:, 2] > 0
    for head in np.flatnonzero(has_work):
        mine = np.flatnonzero(used & (found[:, 0] == head))
        splits[head] = len(mine)
        assert len(mine) > 0
        assert (found[mine, 2] == len(mine)).all()
        np.testing.assert_array_equal(found[mine, 1], np.arange(len(mine)))
        np.testing.assert_array_equal(mine, mine[0] + np.arange(len(mine)))
    assert splits.sum() == used.sum()
    return splits


def least_load(work: NDArray[np.float64], blocks: int) -> float:
    """The smallest largest load of a block, from all loads that matter."""
    loads = np.unique(np.concatenate([work / n for n in range(1, blocks + 1)]))
    enough = [np.ceil(work / load * (1 - 1e-12)).sum() <= blocks for load in loads]
    return float(loads[np.argmax(enough)])


@settings(deadline=None, max_examples=60)
@given(
    work=st.lists(
        st.one_of(st.just(0.0), st.floats(1.0, 2.0**24, width=32), st.floats(2.0**-149, 2.0**40)),
        min_size=1,
        max_size=70,
    ),
    spare=st.integers(0, 150),
)
def test_the_largest_load_is_nearly_the_least(
    library: ctypes.CDLL, work: list[float], spare: int
) -> None:
    given_work = np.array(work, np.float32)
    has_work, blocks = given_work > 0, len(work) + spare
    splits = check_shares(shares(library, given_work, len(work), blocks), has_work)
    if not has_work.any() or given_work[has_work].min() < 1:
        return  # no rows: only that each head has a block
    wanted = given_work[has_work].astype(np.float64)
    room = blocks - has_work.sum()
    least, most = wanted.sum() / blocks, wanted.max()
    if room > 0:
        most = min(most, wanted.sum() / room)
    allowed = least_load(wanted, blocks) + max(most - least, 0.0) / (LOADS - 1)
    assert (wanted / splits[has_work]).max() <= allowed * (1 + 1e-5)


@given(heads=st.integers(1, 40), spare=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_even_shares(library: ctypes.CDLL, heads: int, spare: int) -> None:
    found = shares(library, None, heads, heads + spare)
    splits = check_shares(found, np.ones(heads, bool))
    assert (splits == (heads + spare) // heads).all()
