"""The Numba CUDA kernels under the clock of the CUDA C++ ones: the same caches, the same hints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchlib.ours import OurStep
from benchlib.problem import OutputError, output_error
from benchlib.timing import Timing, time_graph

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NumbaResult", "measure_numba_cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NumbaResult:
    """What the Numba CUDA step did: see `ours.OurResult`."""

    attend: Timing
    read_fraction: float
    error: OutputError
    misses: int


def measure_numba_cuda(ours: OurStep, reference: Tensor, *, replays: int = 25) -> NumbaResult:
    """Check one step against float64 attention ``[B, H, D]``, then time it on the caches of `ours`.

    Hints are those on which `ours` has settled, every time: steps read the same planes as its do.
    """
    import torch
    from numba import config, cuda

    from alignedkv.kernels import numba_cuda

    # Numba warns of grids below 128 blocks; `prepare` and `finish` take a block a query head.
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

    def call(prepared: numba_cuda.Prepared) -> Callable[[], Tensor]:
        output = torch.as_tensor(prepared[-1].output, device="cuda").view(ours.inputs.q.shape)

        def run() -> Tensor:
            stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
            numba_cuda.launch(ours.spec, prepared, stream=stream)
            return output

        return run

    steps = [
        numba_cuda.launch_arguments(ours.spec, cache, ours.inputs.q, ours.state, ours.arguments)
        for cache in ours.caches
    ]
    calls = [call(prepared) for prepared in steps]
    error = output_error(calls[0](), reference)
    answer = steps[0][-1]
    read = ours.bytes_read(answer.reads.copy_to_host())
    return NumbaResult(
        attend=time_graph(calls, replays=replays),
        read_fraction=read / ours.inputs.shape.kv_bytes(16),
        error=error,
        misses=int(answer.missed.copy_to_host().sum()),
    )
