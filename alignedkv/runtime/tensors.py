"""The tensors of one layer's cache, and what the Cache contract does to them.

Rows, constants, state and results are the lists that the operators of `ops` take.  Along the batch
axis all of them but signs, dither and the step counter are indexed; along the token axis only
planes and scales are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignedkv.kernels import storage
from alignedkv.kernels.arrays import HeadState
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.runtime import ops
from alignedkv.runtime.backend import backend_for
from alignedkv.runtime.dtypes import TORCH_DTYPES
from alignedkv.runtime.request import Request

#: Where the shared tensors stand in their lists; see `ops`.
_SIGNS, _DITHER = 3, 4
_STEP = HeadState.__slots__.index("step")


@dataclass(slots=True, kw_only=True)
class LayerTensors:
    """What a layer keeps on its device; see `ops` for the order within each list."""

    spec: DecodeSpec
    exact_rows: tuple[int, int]
    rows: list[Tensor]
    constants: list[Tensor]
    state: list[Tensor]
    results: list[Tensor]
    scratch: list[Tensor]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 [B]."""
        return self.rows[2 * self.spec.stored_planes + 1]

    @property
    def starts(self) -> Tensor:
        """First token of each sequence that is no padding, int32 [B]."""
        return self.constants[5]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.rows[2 * self.spec.stored_planes].shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.rows[0].device

    def everything(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return [*self.rows, *self.constants, *self.state, *self.results, *self.scratch]

    def bytes(self) -> int:
        """Memory taken on the device or, offloaded, on the host."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.everything())

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens by moving planes and scales to larger tensors."""
        for i in range(2 * self.spec.stored_planes + 1):
            old = self.rows[i]
            new = old.new_zeros((*old.shape[:2], capacity, *old.shape[3:]))
            new[:, :, : old.shape[2]] = old
            self.rows[i] = new

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor with a batch axis, [B, ...], by what ``change`` makes of it.

        The new one is written over the old one where the shape allows: addresses stay.
        """
        shared = {"constants": (_SIGNS, _DITHER), "state": (_STEP,)}
        for name in ("rows", "constants", "state", "results"):
            tensors = getattr(self, name)
            for i, tensor in enumerate(tensors):
                if i not in shared.get(name, ()):
                    changed = change(tensor)
                    if changed.shape == tensor.shape:
                        tensor.copy_(changed)
                    else:
                        tensors[i] = changed

    def move(self, device: torch.device) -> None:
        """Move everything to another device without waiting for it."""
        for name in ("rows", "constants", "state", "results", "scratch"):
            moved = [tensor.to(device, non_blocking=True) for tensor in getattr(self, name)]
            setattr(self, name, moved)

    def renew_scratch(self, spec: DecodeSpec) -> None:
        """Allocate what steps of ``spec`` need besides, for the sizes of now."""
        cache = ops.unpack_rows(self.spec.stored_planes, self.rows, self.constants, self.exact_rows)
        self.scratch = backend_for(self.device).scratch(spec, cache)

    def clear(self) -> None:
        """Forget all tokens, keeping the tensors and what was drawn for them."""
        key_mean, balance, value_mean = self.constants[:3]
        for tensor in (self.lengths, self.starts, key_mean, value_mean, *self.state, *self.results):
            tensor.zero_()
        balance.fill_(1)


def allocate(
    spec: DecodeSpec,
    request: Request,
    *,
    batch: int,
    kv_heads: int,
    capacity: int,
    device: torch.device,
) -> LayerTensors:
    """An empty cache for one layer on ``device``."""

    def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.zeros(shape, dtype=TORCH_DTYPES[dtype], device=device)

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    cache = storage.allocate(
        spec,
        batch=batch,
        kv_heads=kv_heads,
        capacity=capacity,
        zeros=zeros,
        put=put,
        exact_first=request.policy.exact_first,
        exact_last=request.policy.exact_last,
        seed=request.seed,
    )
    heads = (batch, kv_heads * spec.group)
    return LayerTensors(
        spec=spec,
        exact_rows=(cache.exact_first, cache.exact_last),
        rows=ops.pack_rows(cache),
        constants=ops.pack_constants(cache),
        state=[
            zeros((1,), "uint32") if name == "step" else zeros(heads, "float32")
            for name in HeadState.__slots__
        ],
        results=[
            zeros(heads, "float32"),
            zeros(heads, "float32"),
            zeros(heads, "uint8"),
            zeros((batch, kv_heads, 2, spec.stored_planes), "uint32"),
        ],
        scratch=[],
    )
