"""Bounds, bytes and misses of a running model: counted on the device, fetched when asked for.

A decode step leaves its bounds, misses and reads in the layers' result tensors.  After the last
layer of a forward pass they are added to totals with a dozen small operations for all layers
together.
Nothing waits for the device until `report`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from alignedkv.kernels import storage
from alignedkv.kernels.spec import DecodeSpec

if TYPE_CHECKING:
    import pandas as pd

    from alignedkv.runtime.stored_layer import StoredLayer

#: Relative bounds are counted in bins of 1/8 bit from 2^-24 to 2^8.
BINS_PER_BIT = 8
LOWEST_EXPONENT, HIGHEST_EXPONENT = -24, 8
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_BIT
#: What read_fraction is a fraction of: two bytes a number.
STOCK_BYTES = 2


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums over all steps, on one device, for P plane layers.

    Attributes
    ----------
    reads : int64 tensor [P, 2, N]
        Rows of keys and values of which plane n was read.
    exact : int64 tensor [P]
        Rows kept exact that were read, as `storage.exact_rows_read` counts them.
    tokens : int64 tensor [P]
        Tokens of all sequences, times KV heads: what a stock step would have read in full.
    misses : int64 tensor [P]
        Outputs of a head whose bound exceeded the tolerance.
    largest : float32 tensor [P]
        The largest bound, relative to its output's largest component.
    histogram : int64 tensor [P, BINS]
        Outputs of a head by relative bound.
    """

    reads: Tensor
    exact: Tensor
    tokens: Tensor
    misses: Tensor
    largest: Tensor
    histogram: Tensor

    @classmethod
    def zeros(cls, layers: int, planes: int, device: torch.device) -> Totals:
        """Totals of no step."""

        def count(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        totals = cls(
            reads=count(layers, 2, planes),
            exact=count(layers),
            tokens=count(layers),
            misses=count(layers),
            largest=torch.zeros(layers, device=device),
            histogram=count(layers, BINS),
        )
        for tensor in totals.tensors():
            torch._dynamo.mark_static_address(tensor)
        return totals

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of their declaration."""
        return self.reads, self.exact, self.tokens, self.misses, self.largest, self.histogram


class Monitor:
    """What `report` knows of a patched model.

    Parameters
    ----------
    layers : sequence of int
        The model's layers that keep planes.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._totals: dict[torch.device, Totals] = {}
        self._specs: dict[int, DecodeSpec] = {}
        self._live: WeakSet[StoredLayer] = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        """Copies of a cache report to the same monitor."""
        return self

    def meet(self, layer: StoredLayer) -> None:
        """Prepare for an initialised layer."""
        self._live.add(layer)
        spec = layer.tensors.spec
        self._specs[layer.position] = spec
        if layer.device not in self._totals:
            self._totals[layer.device] = Totals.zeros(
                len(self.layers), spec.stored_planes, layer.device
            )

    def tally(self, layers: Sequence[StoredLayer]) -> None:
        """Add the results of a decode step of ``layers``, which follow one another."""
        for run in _alike(layers):
            totals = self._totals[run[0].device]
            place = slice(run[0].position, run[-1].position + 1)
            tensors = [layer.tensors for layer in run]
            bound, size, missed, reads = (
                torch.stack([each.results[i] for each in tensors]) for i in range(4)
            )
            kv_heads = reads.shape[2]
            tokens = torch.stack([each.lengths - each.starts for each in tensors])
            if tensors[0].spec.exact_rows:
                kept = tokens.clip(max=sum(tensors[0].exact_rows))
                totals.exact[place] += storage.exact_rows_read(
                    tensors[0].spec, reads[..., 0, 0], tokens[..., None], kept[..., None]
                ).sum(dim=(1, 2))
            totals.reads[place] += reads.sum(dim=(1, 2))
            totals.tokens[place] += kv_heads * tokens.sum(dim=1)
            totals.misses[place] += missed.sum(dim=(1, 2))
            ratio = (bound / size).flatten(1).nan_to_num(nan=torch.inf)
            totals.largest[place] = totals.largest[place].maximum(ratio.amax(dim=1))
            bits = (ratio.log2() - LOWEST_EXPONENT) * BINS_PER_BIT
            bins = bits.clamp(0, BINS - 1).long()
            totals.histogram[place].scatter_add_(1, bins, torch.ones_like(bins))

    def report(self) -> pd.DataFrame:
        """See `alignedkv.runtime.report`; waits for the device."""
        import pandas as pd

        count = len(self.layers)
        reads, exact, tokens, misses, largest, histogram = _summed(self._totals.values(), count)
        stored = np.zeros(count, np.int64)
        for layer in self._live:
            stored[layer.position] += layer.tensors.bytes()
        fraction = np.full(count, np.nan)
        for position, spec in self._specs.items():
            stock = tokens[position] * 2 * STOCK_BYTES * spec.head_dim
            if stock:
                kept = exact[position] if spec.exact_rows else None
                fraction[position] = storage.bytes_read(spec, reads[position], exact=kept) / stock
        return pd.DataFrame(
            {
                "layer": self.layers,
                "read_fraction": fraction,
                "bound_median": _medians(histogram),
                "bound_max": np.where(tokens > 0, largest, np.nan),
                "misses": misses,
                "stored_bytes": stored,
            }
        )


def _alike(layers: Sequence[StoredLayer]) -> Iterator[list[StoredLayer]]:
    """Runs of layers whose results can be stacked."""

    def kind(layer: StoredLayer) -> tuple[object, ...]:
        return layer.device, layer.tensors.results[0].shape, layer.tensors.results[3].shape

    for _, run in groupby(layers, key=kind):
        yield list(run)


def _summed(totals: Any, layers: int) -> tuple[np.ndarray, ...]:
    parts = [[tensor.cpu().numpy() for tensor in each.tensors()] for each in totals]
    if not parts:
        parts = [[t.numpy() for t in Totals.zeros(layers, 1, torch.device("cpu")).tensors()]]
    *counts, largest, histogram = zip(*parts, strict=True)
    return *map(sum, counts), np.maximum.reduce(largest), sum(histogram)


def _medians(histogram: np.ndarray) -> np.ndarray:
    """Median of each row, to the middle of its bin; NaN where nothing was counted [P]."""
    total = histogram.sum(axis=1)
    bins = (histogram.cumsum(axis=1) * 2 >= total[:, None]).argmax(axis=1)
    medians = 2.0 ** (LOWEST_EXPONENT + (bins + 0.5) / BINS_PER_BIT)
    return np.where(total > 0, medians, np.nan)
