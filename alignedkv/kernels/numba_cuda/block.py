"""Reductions over the threads of a block, through shared memory: the simulator has no shuffles."""

from __future__ import annotations

from typing import Any

from numba import cuda

from alignedkv.kernels.numba_cuda.rows import device


def reduce_function(rows: int, threads: int, combine: Any) -> Any:
    """``reduce(scratch)``: row k of [rows, threads] to its entry 0, by ``combine(k, one, other)``.

    Every thread has written its column before; entries 0 may be read by all after, and the scratch
    be written again after one more barrier.
    """

    @device
    def reduce(scratch):
        lane = cuda.threadIdx.x
        distance = threads // 2
        cuda.syncthreads()
        while distance > 0:
            if lane < distance:
                for k in range(rows):
                    other = scratch[k, lane + distance]
                    scratch[k, lane] = combine(k, scratch[k, lane], other)
            distance //= 2
            cuda.syncthreads()

    return reduce


@device
def larger(k, one, other):
    """The larger number; a NaN never wins."""
    return other if other > one else one


@device
def larger_or_nan(k, one, other):
    """The larger number; a NaN always wins."""
    return other if other > one or other != other else one


@device
def added(k, one, other):
    """The sum."""
    return one + other
