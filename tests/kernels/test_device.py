"""Streams of other libraries as CuPy's."""

from __future__ import annotations

import pytest

from alignedkv.kernels.device import external_stream

cupy = pytest.importorskip("cupy")


@pytest.mark.filterwarnings("error")
def test_a_stream_keeps_its_number_and_0_is_the_default() -> None:
    assert external_stream(0) is cupy.cuda.Stream.null
    assert external_stream(1234).ptr == 1234


@pytest.mark.gpu
def test_work_on_a_foreign_stream_is_ordered_with_its_own() -> None:
    foreign = cupy.cuda.Stream(non_blocking=True)
    with foreign:
        numbers = cupy.arange(1 << 20)
    with external_stream(foreign.ptr):
        total = numbers.sum()
    foreign.synchronize()
    assert int(total) == (1 << 20) * ((1 << 20) - 1) // 2
