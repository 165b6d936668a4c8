"""A layer of a patched model: prompts by the stock attention, tokens by the decode kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignedkv.errors import ActivationError, UnsupportedModelError
from alignedkv.runtime import masks, ops
from alignedkv.runtime.monitor import Monitor
from alignedkv.runtime.plan import AttentionFacts
from alignedkv.runtime.request import Request
from alignedkv.runtime.stored_layer import StoredLayer

#: So many queries at once (assisted decoding) are cheaper one after the other, reading a third of
#: the bytes each, than all keys and values written out and read again.
MAX_STEPPED_QUERIES = 8

Output = tuple[Tensor, Tensor | None]
StockAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Output]


class PlaneLayer(StoredLayer):
    """Rows, and attention to them; takes what `StoredLayer` takes.

    A patched model's attention function calls `attend`, which sees queries, keys and values
    together.
    """

    def __init__(self, request: Request, *, group: int, monitor: Monitor, position: int) -> None:
        super().__init__(request, group=group, monitor=monitor, position=position)
        self.step_plan: str | None = None

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        facts: AttentionFacts,
        stock: StockAttention,
        *,
        check_mask: bool = True,
        only_stock: bool = False,
    ) -> tuple[Output, bool]:
        """Store new rows and attend to all.

        Parameters
        ----------
        query : tensor [B, H, S, D]
        keys, values : tensor [B, Hkv, S, D]
        mask : tensor [B, 1, S, kv] or None
        facts : AttentionFacts
        stock : callable
            The model's own attention on query, keys, values, mask.
        check_mask : bool
            Whether to compare a decode step's mask with what the kernels do; one layer of a model
            is enough.
        only_stock : bool
            Use the stock attention even for a single query (attention weights are wanted).

        Returns
        -------
        output : tensor [B, S, H, D], and weights where the stock attention gives them
        stepped : bool
            Whether ``tensors.results`` are those of this call.

        Raises
        ------
        ActivationError
            If the kernels cannot follow the mask.
        """
        self._check_heads(query)
        queries = query.shape[2]
        if not self.has_rows:
            return self._prefill(query, keys, values, mask, facts, stock), False
        if self.obstacle is not None:
            raise ActivationError(self.obstacle)
        if queries == 1 and not only_stock:
            return (self._step(query, keys, values, mask, facts, check_mask), None), True
        if queries <= MAX_STEPPED_QUERIES and not only_stock and self._plainly_causal(mask):
            return (self._steps(query, keys, values, facts), None), True
        self._append(keys, values)
        answer = stock(query, *self._with_stored(keys, values), mask)
        self._probe(query[:, :, -1], facts)
        return answer, False

    def _prefill(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        facts: AttentionFacts,
        stock: StockAttention,
    ) -> Output:
        if mask is not None:
            mask = mask[..., : keys.shape[2]]
            starts, plain = masks.left_padding(mask)
            self.tensors.starts.copy_(starts)
            if not torch.compiler.is_compiling() and not plain:
                self.obstacle = masks.REFUSAL
        else:
            self.tensors.starts.zero_()
        answer = stock(query, keys, values, mask)
        self._fit(keys, values, query)
        self._append(keys, values)
        self._probe(query[:, :, -1], facts)
        return answer

    def _step(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        facts: AttentionFacts,
        check_mask: bool,
    ) -> Tensor:
        self._make_room(1)
        if not self.has_hints:
            self._probe(query[:, :, 0], facts)
        tensors = self.tensors
        output: Tensor = ops.step(
            self._plan_of(facts),
            tensors.rows,
            tensors.constants,
            tensors.state,
            tensors.results,
            tensors.scratch,
            keys.detach(),
            values.detach(),
            query[:, :, 0].detach(),
            facts.sinks,
        )[:, None]
        self._advance(1)
        if mask is not None and check_mask:
            good = masks.follows(mask, tensors.starts, tensors.lengths)
            if query.device.type == "cpu" and not torch.compiler.is_compiling():
                if not good.all():
                    raise ActivationError(masks.REFUSAL)
            else:
                output = torch.where(good[:, None, None, None], output, torch.nan)
        return output

    def _steps(self, query: Tensor, keys: Tensor, values: Tensor, facts: AttentionFacts) -> Tensor:
        outputs = []
        for i in range(query.shape[2]):
            if i > 0:
                self.monitor.tally([self])
            now = slice(i, i + 1)
            token = query[:, :, now], keys[:, :, now], values[:, :, now]
            outputs.append(self._step(*token, None, facts, check_mask=False))
        return torch.cat(outputs, dim=1)

    def _probe(self, query: Tensor, facts: AttentionFacts) -> None:
        tensors = self.tensors
        ops.probe(
            self._plan_of(facts),
            tensors.rows,
            tensors.constants,
            tensors.state,
            query.detach(),
            facts.sinks,
        )
        self.has_hints = True

    def _plainly_causal(self, mask: Tensor | None) -> bool:
        if torch.compiler.is_compiling():
            return False
        if mask is None:
            return True
        tokens = int(self.get_seq_length()) + mask.shape[2]
        return masks.causal(mask, self.tensors.starts, tokens)

    def _check_heads(self, query: Tensor) -> None:
        kv_heads = self.tensors.constants[0].shape[1]
        if query.shape[1] != kv_heads * self.group:
            raise UnsupportedModelError(
                f"{query.shape[1]} query heads on {kv_heads} KV heads: the model's configuration "
                f"says {self.group} a KV head"
            )

    def _plan_of(self, facts: AttentionFacts) -> str:
        if self.step_plan is None:
            plan = self._plan(facts)
            self.tensors.renew_scratch(plan.spec)
            self._pin(self.tensors.scratch)
            self.step_plan = plan.text()
        return self.step_plan

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_batch(change)
        self.step_plan = None
