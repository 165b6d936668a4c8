"""Dynamic and static plane layers: how they count their tokens and where room comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from alignedkv.runtime.layer import PlaneLayer
from alignedkv.runtime.monitor import Monitor
from alignedkv.runtime.request import Request

#: A dynamic layer grows by this factor, in multiples of CAPACITY_STEP tokens.
GROWTH = 1.5
CAPACITY_STEP = 256


class DynamicPlaneLayer(PlaneLayer):
    """Grows geometrically; its length is a Python number, so nobody waits for the device."""

    is_compileable = False

    def __init__(self, request: Request, *, group: int, monitor: Monitor, position: int) -> None:
        super().__init__(request, group=group, monitor=monitor, position=position)
        self.length = 0

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the next mask, and the token of the first."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit but that of the kernels."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next request."""
        super().reset()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take ``-tokens_to_remove`` of the newest tokens away."""
        tokens_to_remove = self._tokens_to_remove(tokens_to_remove, self.length)
        if tokens_to_remove:
            self.length -= tokens_to_remove
            self.tensors.lengths.sub_(tokens_to_remove)
            self.has_rows = self.length > 0

    def _first_capacity(self, tokens: int) -> int:
        return _rounded(GROWTH * tokens)

    def _make_room(self, tokens: int) -> None:
        needed, capacity = self.length + tokens, self.tensors.capacity
        if needed > capacity:
            self.tensors.reserve(_rounded(max(needed, GROWTH * capacity)))
            self.step_plan = None

    def _pin(self, tensors: list[Tensor]) -> None:
        """Nothing to promise: growth moves them."""

    def _advance(self, tokens: int) -> None:
        self.length += tokens
        self.has_rows = True

    def _padded(self, rows: Tensor) -> Tensor:
        return rows

    def _with_stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored = self._stored(self.length - keys.shape[2])
        return torch.cat([stored[0], keys], dim=2), torch.cat([stored[1], values], dim=2)


class StaticPlaneLayer(PlaneLayer):
    """Fixed addresses and a length on the device, for torch.compile and CUDA graphs.

    Parameters
    ----------
    max_cache_len : int
        Tokens to allocate.
    """

    is_compileable = True
    cumulative_length: Tensor  # type: ignore[assignment]

    def __init__(
        self,
        request: Request,
        *,
        group: int,
        monitor: Monitor,
        position: int,
        max_cache_len: int,
    ) -> None:
        super().__init__(request, group=group, monitor=monitor, position=position)
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for rows like these [B, Hkv, any, D]."""
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._pin([self.cumulative_length])

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Tokens stored: a tensor on the device once there is one, as in transformers' own."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of every mask, and the token of the first."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens; addresses stay."""
        super().reset()
        self.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Take ``-tokens_to_remove`` of the newest tokens away; addresses stay."""
        length = int(self.cumulative_length)
        tokens_to_remove = self._tokens_to_remove(tokens_to_remove, length)
        if tokens_to_remove:
            self.cumulative_length.sub_(tokens_to_remove)
            self.tensors.lengths.sub_(tokens_to_remove)
            self.has_rows = length > tokens_to_remove

    def _first_capacity(self, tokens: int) -> int:
        return self.max_cache_len

    def _make_room(self, tokens: int) -> None:
        """Nothing to do: the backend refuses what does not fit."""

    def _pin(self, tensors: list[Tensor]) -> None:
        if not torch.compiler.is_compiling():
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)

    def _advance(self, tokens: int) -> None:
        self.cumulative_length.add_(tokens)
        self.has_rows = True

    def _padded(self, rows: Tensor) -> Tensor:
        full = rows.new_zeros((*rows.shape[:2], self.max_cache_len, rows.shape[3]))
        full[:, :, : rows.shape[2]] = rows
        return full

    def _with_stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        first = self.cumulative_length - keys.shape[2]
        tokens = torch.arange(keys.shape[2], device=keys.device) + first
        stored_keys, stored_values = self._stored(self.max_cache_len)
        return stored_keys.index_copy(2, tokens, keys), stored_values.index_copy(2, tokens, values)


def _rounded(tokens: float) -> int:
    return -int(-tokens // CAPACITY_STEP) * CAPACITY_STEP
