"""The competitors, all of them, and one function that measures them on the same numbers."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchlib.competitor import Competitor, Element
from benchlib.flashinfer_decode import (
    FlashInferPaged,
    FlashInferSingle,
    FlashInferXqa,
    PageSize,
)
from benchlib.problem import DecodeInputs, OutputError, copies_for_cold_cache, output_error
from benchlib.timing import Timing, time_graph
from benchlib.torch_sdpa import TorchSdpa

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LEADERS", "PeerResult", "all_peers", "fastest", "measure_peer", "named_peers"]

LEADERS = (
    "sdpa-cudnn-fp16",
    "sdpa-cudnn-bf16",
    "sdpa-flash-fp16",
    "sdpa-flash-bf16",
    "flashinfer-paged64-tc-fp16",
    "flashinfer-xqa-fp16",
    "flashinfer-paged64-tc-fp8",
    "flashinfer-single-tc-fp8",
    "flashinfer-xqa-fp8",
)
"""Whoever was the fastest of its kind at some length on an H100, and the two whose error is quoted:
bf16 FlashAttention is ``sdpa-flash-bf16``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """What one competitor did: a time and an error, or the reason for neither.

    Parameters
    ----------
    name : str
        The competitor.
    bits : int
        Bits per stored element of K and V.
    timing : Timing or None
        Microseconds of a call.
    error : OutputError or None
        Error of its output against float64 attention on the unrounded inputs.
    reason : str or None
        Why there is no time.
    """

    name: str
    bits: int
    timing: Timing | None = None
    error: OutputError | None = None
    reason: str | None = None


def all_peers() -> tuple[Competitor, ...]:
    """Every competitor, best known first within a family."""
    wide: tuple[Element, ...] = ("fp16", "bf16")
    every: tuple[Element, ...] = ("fp16", "bf16", "fp8")
    single: tuple[Element, ...] = ("fp16", "fp8")
    page_sizes: tuple[PageSize, ...] = (64, 16)
    cores = (True, False)
    return (
        *(TorchSdpa(backend="cudnn", element=e) for e in wide),
        *(
            TorchSdpa(backend="flash", element=e, packed=packed)
            for packed, e in itertools.product((False, True), wide)
        ),
        *(FlashInferXqa(element=e) for e in every),
        *(
            FlashInferPaged(element=e, page=page, tensor_cores=tensor)
            for e, page, tensor in itertools.product(every, page_sizes, cores)
        ),
        *(
            FlashInferSingle(element=e, tensor_cores=tensor)
            for e, tensor in itertools.product(single, cores)
        ),
    )


def named_peers(names: Iterable[str]) -> tuple[Competitor, ...]:
    """The competitors of these names, in the order given.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    known = {peer.name: peer for peer in all_peers()}
    names = tuple(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no peer is called {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in names)


def measure_peer(
    peer: Competitor,
    inputs: DecodeInputs,
    reference: Tensor,
    *,
    replays: int = 25,
    energy_s: float = 0.0,
) -> PeerResult:
    """Time one competitor on cold caches and measure its error on the same inputs.

    Parameters
    ----------
    peer : Competitor
        Who.
    inputs : DecodeInputs
        The step, on the GPU.
    reference : torch.Tensor
        `problem.reference_output` of `inputs`.
    replays : int
        Graph replays to take the median over.
    energy_s : float
        As for `time_graph`.

    Returns
    -------
    PeerResult
        Whatever goes wrong inside a competitor becomes its `reason`: a benchmark of twenty kernels
        must not end at the first that a driver or a missing compiler stops.
    """
    import torch

    if (reason := peer.obstacle(inputs.shape)) is not None:
        return PeerResult(name=peer.name, bits=peer.bits, reason=reason)
    try:
        timing, error = _time_and_check(peer, inputs, reference, replays, energy_s)
    except Exception as problem:  # noqa: BLE001 - reported as the reason, see Returns
        first_line = next(iter(str(problem).splitlines()), "")
        reason = f"{type(problem).__name__}: {first_line}"
        return PeerResult(name=peer.name, bits=peer.bits, reason=reason)
    finally:
        # The next competitor needs the memory of this one's copies.
        gc.collect()
        torch.cuda.empty_cache()
    return PeerResult(name=peer.name, bits=peer.bits, timing=timing, error=error)


def _time_and_check(
    peer: Competitor, inputs: DecodeInputs, reference: Tensor, replays: int, energy_s: float
) -> tuple[Timing, OutputError]:
    """Time and error of one competitor; its copies live no longer than this call."""
    rotation = peer.build(inputs, copies_for_cold_cache(inputs.shape, peer.bits))
    error = output_error(rotation.output(), reference)
    return time_graph(rotation.calls, replays=replays, energy_s=energy_s), error


def fastest(results: Iterable[PeerResult], bits: int) -> PeerResult | None:
    """The result with the lowest median among those of `bits`; None if none was timed."""
    timed = [r for r in results if r.bits == bits and r.timing is not None]
    return min(timed, key=lambda r: r.timing.median_us if r.timing else 0.0, default=None)
