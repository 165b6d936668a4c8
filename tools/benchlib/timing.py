"""The clock: CUDA-graph replays over a rotation of calls, and the byte ceiling of the card.

Every kernel, ours and theirs, is timed by `time_graph`, so that no comparison hangs on two ways of
measuring.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from alignedkv.kernels.device import external_stream
from benchlib.energy import EnergyCounter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Timing", "read_bandwidth", "time_graph"]

_MIN_CALLS = 32
"""Calls in one graph: the launch of a graph costs a few microseconds, spread over so many."""

_WARM_REPLAYS = 3

_READ_BYTES = 2 << 30

_READ_BLOCKS_PER_SM = 4

_READ_SOURCE = r"""
// Sums `count` 16-byte words.  The sum is written only if it takes one value, so the loads stay and
// nothing else moves: what is timed is reading.
extern "C" __global__ void __launch_bounds__(256, 4) read_all(
    const uint4* __restrict__ words,   // [count]
    unsigned long long count,
    unsigned* __restrict__ sink        // [1]
) {
    constexpr int kInFlight = 8;       // independent loads before the first use
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    unsigned sum = 0;
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + (kInFlight - 1) * stride < count; i += kInFlight * stride) {
        uint4 w[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) w[j] = words[i + j * stride];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) sum += w[j].x ^ w[j].y ^ w[j].z ^ w[j].w;
    }
    for (; i < count; i += stride) sum += words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    if (sum == 0x9e3779b9u) *sink = sum;
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time of one call, in microseconds, over the replays of one graph.

    Parameters
    ----------
    median_us, p10_us, p90_us : float
        Median, 10th and 90th percentile over the replays of the mean time of a call in a replay.
    replays : int
        Replays measured.
    calls : int
        Calls in each replay.
    millijoules : float, optional
        Energy of a call, the idle GPU's share included.
    """

    median_us: float
    p10_us: float
    p90_us: float
    replays: int
    calls: int
    millijoules: float | None = None

    @classmethod
    def from_replays(cls, replay_us: Sequence[float], calls: int) -> Timing:
        """Summarise replays of `calls` calls each that took `replay_us` microseconds.

        Raises
        ------
        ValueError
            If there are fewer than two replays, or a time is not positive and finite.
        """
        if len(replay_us) < 2:
            raise ValueError(f"{len(replay_us)} replays say nothing of the spread; take 2 or more")
        if any(not (math.isfinite(t) and t > 0) for t in replay_us):
            raise ValueError(f"times must be positive and finite, got {list(replay_us)}")
        per_call = [t / calls for t in replay_us]
        deciles = statistics.quantiles(per_call, n=10, method="inclusive")
        return cls(
            median_us=statistics.median(per_call),
            p10_us=deciles[0],
            p90_us=deciles[-1],
            replays=len(per_call),
            calls=calls,
        )


def time_graph(
    calls: Sequence[Callable[[], Tensor | None]], *, replays: int = 25, energy_s: float = 0.0
) -> Timing:
    """Time a rotation of calls by replaying it as one CUDA graph.

    Parameters
    ----------
    calls : sequence of callables
        Each launches one step on torch's current stream and returns its output, or None.  They
        differ only in the buffers they read; together these should hold `problem.COLD_BYTES`.
    replays : int
        Replays to measure.
    energy_s : float
        Seconds of further replays whose energy is measured; 0 for none.

    Returns
    -------
    Timing
        Microseconds per call, launch included.

    Raises
    ------
    ValueError
        If there is no call, fewer than two replays, or a call returns NaN or infinity: a broken
        kernel is often a fast one.

    Notes
    -----
    Calls follow each other in one stream, so a kernel launched with programmatic dependent launch
    overlaps its start with the end of the call before, for us and for the others alike.  All
    replays are queued at once with an event between each two: the GPU never waits for the host.
    """
    import torch

    if not calls:
        raise ValueError("there is no call to time")
    if replays < 2:
        raise ValueError(f"{replays} replays say nothing of the spread; take 2 or more")
    for index, call in enumerate(calls):
        output = call()
        if output is not None and not bool(output.isfinite().all()):
            raise ValueError(f"call {index} returned NaN or infinity; it is broken, not fast")

    # Capture needs a warm side stream: libraries allocate and choose kernels on their first call.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    rotations = math.ceil(_MIN_CALLS / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rotations):
            for call in calls:
                call()

    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for _ in range(_WARM_REPLAYS):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    # Event.elapsed_time is in milliseconds.
    replay_us = [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]
    timing = Timing.from_replays(replay_us, rotations * len(calls))
    if not energy_s:
        return timing
    count = math.ceil(energy_s * 1e6 / (timing.median_us * timing.calls))
    counter = EnergyCounter()
    before = counter.joules()
    for _ in range(count):
        graph.replay()
    torch.cuda.synchronize()
    joules = counter.joules() - before
    return replace(timing, millijoules=joules * 1e3 / (count * timing.calls))


def read_bandwidth(*, replays: int = 10) -> float:
    """Bytes per second that this card reads from its memory when it does nothing else.

    Returns
    -------
    float
        Bytes per second, the median over `replays` graphs, each reading 2 GiB of random words many
        times.  Bytes moved over this rate is the time that no kernel can beat.
    """
    import cupy
    import torch

    words = torch.randint(
        -(2**31), 2**31 - 1, (_READ_BYTES // 4,), dtype=torch.int32, device="cuda"
    )
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = cupy.RawKernel(_READ_SOURCE, "read_all")
    processors = torch.cuda.get_device_properties(words.device).multi_processor_count
    blocks = _READ_BLOCKS_PER_SM * processors
    arguments: tuple[Any, ...] = (
        cupy.uint64(words.data_ptr()),
        cupy.uint64(_READ_BYTES // 16),
        cupy.uint64(sink.data_ptr()),
    )

    def read() -> None:
        with external_stream(torch.cuda.current_stream().cuda_stream):
            kernel((blocks,), (256,), arguments)

    return _READ_BYTES / time_graph([read], replays=replays).median_us * 1e6
