"""The kernels of a spec, emitted once and compiled by Numba on their first launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import cuda

from alignedkv.errors import SpecError
from alignedkv.kernels import arithmetic
from alignedkv.kernels.numba_cuda.finish import finish_kernel
from alignedkv.kernels.numba_cuda.prepare import prepare_kernel
from alignedkv.kernels.numba_cuda.split import split_kernel
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The three kernels of a decode step, in the order in which they run."""

    prepare: Any
    split: Any
    finish: Any


def emit(spec: DecodeSpec, *, threads: int) -> Kernels:
    """Python functions that Numba can compile, with the spec's constants closed over.

    Parameters
    ----------
    spec : DecodeSpec
    threads : int
        Threads of a block, a power of two: the tokens of a tile.

    Raises
    ------
    SpecError
        If the bound is statistical: its class sums take more shared memory than a block has.
    """
    if spec.bound is BoundKind.STATISTICAL:
        raise SpecError(
            "the Numba CUDA kernels have no statistical bound: take 'estimate' or "
            "'deterministic', or one of the implementations that have it, reference and cpu"
        )
    model = arithmetic.numba_cuda(tile=threads)
    return Kernels(
        prepare=prepare_kernel(spec, threads, model),
        split=split_kernel(spec, threads, model),
        finish=finish_kernel(spec, threads, model),
    )


@cache
def compiled(spec: DecodeSpec, *, threads: int) -> Kernels:
    """`emit`, ready to be launched; the same kernels for the same spec."""
    plain = emit(spec, threads=threads)
    return Kernels(
        prepare=cuda.jit(plain.prepare),
        split=cuda.jit(plain.split),
        finish=cuda.jit(plain.finish),
    )
