"""The kernels of a spec, emitted once and compiled by Numba on their first launch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels import arithmetic
from alignedkv.kernels.numba_cuda.finish import finish_kernel
from alignedkv.kernels.numba_cuda.prepare import prepare_kernel
from alignedkv.kernels.numba_cuda.split import split_kernel
from alignedkv.kernels.spec import DecodeSpec


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
    """
    _load_numba_cuda()
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


def _load_numba_cuda() -> None:
    """Import what numba-cuda itself imports late, while it can.

    Up to 0.30 it registers `numpy.row_stack`, the old name of `numpy.vstack`, with its compiler at
    the first compilation; NumPy 2.5 no longer has the name, so it is lent for the import.
    """
    lent = "row_stack"
    if hasattr(np, lent):
        return
    setattr(np, lent, np.vstack)
    try:
        importlib.import_module("numba.cuda.np.arrayobj")
    except ModuleNotFoundError:  # the simulator, and the numba.cuda that comes with Numba
        pass
    finally:
        delattr(np, lent)
