"""A cache layer's rows: planes instead of keys and values, behind transformers' layer interface.

Whoever calls `update` gets what any cache returns, all keys and values, read back from the planes.
What a patched model does instead is `layer`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from alignedkv.errors import SpecError, UnsupportedModelError
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.runtime import ops
from alignedkv.runtime.dtypes import DTYPE_NAMES
from alignedkv.runtime.monitor import Monitor
from alignedkv.runtime.plan import AttentionFacts, StepPlan, make_plan
from alignedkv.runtime.request import Request
from alignedkv.runtime.tensors import LayerTensors, allocate

#: A shorter prompt says nothing about the rows to come: the transform is then the Hadamard alone.
MIN_FIT_TOKENS = 16
#: The newest queries of a prompt whose sizes the balance looks at: those nearest to what follows.
FIT_QUERIES = 256


class StoredLayer(CacheLayerMixin):
    """Rows of one layer.

    Parameters
    ----------
    request : Request
    group : int
        Query heads per KV head.
    monitor : Monitor
    position : int
        Place of this layer among the plane layers of its model.
    """

    is_sliding = False
    supports_early_init = True

    def __init__(self, request: Request, *, group: int, monitor: Monitor, position: int) -> None:
        super().__init__()
        self.request = request
        #: With exact recent rows, those that a crop brings back would no longer be exact.
        self.is_croppable = request.policy.exact_last == 0
        self.group = group
        self.monitor = monitor
        self.position = position
        self.has_rows = False
        self.has_hints = False
        #: Rows were handed over and `attend` has still to come.
        self.awaited = False
        #: Why decode steps are impossible, if they are.
        self.obstacle: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A layer of its own that reports to the same monitor."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, value if value is self.monitor else copy.deepcopy(value, memo))
        if twin.is_initialized:
            twin.monitor.meet(twin)
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for rows like these [B, Hkv, any, D]."""
        batch, kv_heads, tokens, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise UnsupportedModelError(
                f"keys of {head_dim} channels and values of {value_states.shape[-1]}: the planes "
                "take one size for both"
            )
        if key_states.dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(
                f"keys are {key_states.dtype}: give float16, bfloat16 or float32"
            )
        dtype = DTYPE_NAMES[key_states.dtype]
        spec = DecodeSpec.from_policy(
            self.request.policy,
            head_dim=head_dim,
            group=self.group,
            query_dtype=dtype,
            row_dtype=dtype,
        )
        self.device, self.dtype, self.batch_size = key_states.device, key_states.dtype, batch
        self.tensors: LayerTensors = allocate(
            spec,
            self.request,
            batch=batch,
            kv_heads=kv_heads,
            capacity=self._first_capacity(tokens),
            device=self.device,
        )
        self.storage_plan = self._plan(AttentionFacts(scaling=1.0)).text()
        self._pin(self.tensors.everything())
        self.is_initialized = True
        self.monitor.meet(self)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        handed_over: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Store new rows [B, Hkv, S, D] and return all of them.

        Parameters
        ----------
        handed_over : bool
            `attend` follows with the same rows: nothing is stored yet, and they come back as given.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.awaited = handed_over
        if handed_over:
            return key_states, value_states
        if not self.has_rows:
            self._fit(key_states, value_states, None)
            self._append(key_states, value_states)
            full = self._padded(key_states), self._padded(value_states)
        else:
            self._append(key_states, value_states)
            full = self._with_stored(key_states, value_states)
        self.has_hints = False
        return full

    def _fit(self, keys: Tensor, values: Tensor, query: Tensor | None) -> None:
        batch, kv_heads, tokens, head_dim = keys.shape
        if tokens < MIN_FIT_TOKENS:
            return
        size = None
        if query is not None:
            newest = query[:, :, -FIT_QUERIES:].detach().float().abs().mean(dim=2)
            size = newest.view(batch, kv_heads, self.group, head_dim).mean(dim=2)
        tensors = self.tensors
        rows = keys.detach(), values.detach()
        ops.fit(self.storage_plan, tensors.rows, tensors.constants, *rows, size)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self._make_room(keys.shape[2])
        tensors = self.tensors
        rows = keys.detach(), values.detach()
        ops.encode(self.storage_plan, tensors.rows, tensors.constants, *rows)
        self._advance(keys.shape[2])

    def _plan(self, facts: AttentionFacts) -> StepPlan:
        return make_plan(
            self.request,
            self.tensors.spec,
            facts,
            capacity=self.tensors.capacity,
            position=self.position,
        )

    def _tokens_to_remove(self, given: int, length: int) -> int:
        if given > 0:
            raise SpecError(f"crop({given}): give minus the number of tokens to take away")
        if given and not self.is_croppable:
            raise SpecError(
                "crop with a policy that keeps recent rows exact (exact_last > 0): the rows that "
                "become recent again are no longer exact; use exact_last=0"
            )
        return min(-given, length)

    def _stored(self, tokens: int) -> tuple[Tensor, Tensor]:
        tensors = self.tensors
        read: tuple[Tensor, Tensor] = ops.read(
            self.storage_plan, tensors.rows, tensors.constants, tokens, self.dtype
        )
        return read

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next request."""
        if self.is_initialized:
            self.tensors.clear()
        self.has_rows = self.has_hints = False
        self.obstacle = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give sequence i the rows and hints of sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, copies next to each other."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that ``indices`` (numbers or a bool mask) names."""
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move everything to the host."""
        if self.is_initialized:
            self.tensors.move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized and self.tensors.device != self.device:
            self.tensors.move(self.device)

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.tensors.map_batch(change)
            self.batch_size = self.tensors.lengths.shape[0]

    @abstractmethod
    def _first_capacity(self, tokens: int) -> int:
        """Tokens to allocate when the first update brings ``tokens``."""

    @abstractmethod
    def _make_room(self, tokens: int) -> None:
        """See to it that ``tokens`` more fit."""

    @abstractmethod
    def _pin(self, tensors: list[Tensor]) -> None:
        """Promise torch that the addresses of these stay, if they do."""

    @abstractmethod
    def _advance(self, tokens: int) -> None:
        """Count tokens that were stored."""

    @abstractmethod
    def _padded(self, rows: Tensor) -> Tensor:
        """First rows as `update` returns them."""

    @abstractmethod
    def _with_stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All rows read back but the newest, which are these, given."""
