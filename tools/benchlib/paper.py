"""The AlignedKV paper's decode step under the same clock: its rule, and all planes read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alignedkv.kernels import paper
from alignedkv.kernels.device import external_stream
from benchlib.problem import DecodeInputs, OutputError, copies_for_cold_cache, output_error
from benchlib.timing import Timing, time_graph

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES", "PaperResult", "measure_paper"]

RULES = {
    "all planes": paper.READ_ALL,
    "rule, as published": paper.PUBLISHED,
    "rule, mended": paper.PaperRule(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperResult:
    """Time, bits and error of one rule of the paper's kernel."""

    rule: str
    timing: Timing
    bits_per_element: float
    error: OutputError


def measure_paper(
    inputs: DecodeInputs, reference: Tensor, *, replays: int = 25
) -> list[PaperResult]:
    """Time the paper's kernels with each of `RULES` on cold caches.

    Parameters
    ----------
    inputs : DecodeInputs
        float16, 128 channels, tokens a multiple of 128, on the GPU.
    reference : torch.Tensor
        Float64 attention ``[B, H, D]``; its rounding to float32 is what the rule expects of the
        output, the best case for the rule: the paper estimates it from 32 tokens.
    """
    import torch

    shape = inputs.shape
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device="cuda")
    scaling = 1 / math.sqrt(shape.head_dim)
    expected = reference.float().contiguous()

    def stored() -> paper.PaperCache:
        stream = torch.cuda.current_stream().cuda_stream
        rows = (inputs.k.contiguous(), inputs.v.contiguous())
        return paper.store(*rows, lengths, group=shape.group, stream=stream)

    caches = [stored() for _ in range(copies_for_cold_cache(shape, 16))]

    def call(cache: paper.PaperCache, rule: paper.PaperRule) -> Callable[[], None]:
        def run() -> None:
            here = on_stream(cache, torch.cuda.current_stream().cuda_stream)
            paper.decode(here, inputs.q, expected, scaling=scaling, rule=rule)

        return run

    results = []
    for name, rule in RULES.items():
        timing = time_graph([call(cache, rule) for cache in caches], replays=replays)
        arrays = caches[0].arrays
        reads, seen = arrays["reads"].get(), lengths.cpu().numpy()
        output = torch.as_tensor(arrays["output"], device="cuda")
        results.append(
            PaperResult(
                rule=name,
                timing=timing,
                bits_per_element=paper.bits_per_element(reads, seen),
                error=output_error(output, reference),
            )
        )
    return results


def on_stream(cache: paper.PaperCache, stream: int) -> paper.PaperCache:
    """The same cache, its kernels launched on another stream."""
    return replace(cache, place=replace(cache.place, stream=external_stream(stream)))
