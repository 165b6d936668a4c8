"""AlignedKVCache: a transformers cache whose full-attention layers keep planes.

Sliding-window layers stay transformers' own: they keep and read a window of tokens only, so a
decode step has little to save there, while planes would have to keep every token ever seen.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from alignedkv.errors import BoundMissedError
from alignedkv.runtime.layer import Output, PlaneLayer, StockAttention
from alignedkv.runtime.layers import DynamicPlaneLayer, StaticPlaneLayer
from alignedkv.runtime.monitor import Monitor
from alignedkv.runtime.plan import AttentionFacts
from alignedkv.runtime.request import OnMiss, Request


def served_layers(config: PreTrainedConfig) -> list[int]:
    """Layers of a model that keep planes: those whose stock layer keeps all tokens."""
    stock = DynamicCache(config=config)
    return [index for index, layer in enumerate(stock.layers) if type(layer) is DynamicLayer]


class AlignedKVCache(Cache):
    """Cache for one request to a patched model.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model.
    request : Request, optional
        Policy and the rest of what was asked (default: that of `patch`).
    monitor : Monitor, optional
        Where steps are counted (default: one of its own).
    max_cache_len : int, optional
        Make it static: room for so many tokens at fixed addresses. None: it grows.
    offloading : bool
        Keep layers on the host and fetch each ahead of its turn.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        request: Request | None = None,
        *,
        monitor: Monitor | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
    ) -> None:
        stock: Cache
        if max_cache_len is None:
            stock = DynamicCache(config=config)
        else:
            stock = StaticCache(config, max_cache_len=max_cache_len)
        self.request = Request() if request is None else request
        self.served = served_layers(config)
        self.monitor = Monitor(self.served) if monitor is None else monitor
        decoder = config.get_text_config(decoder=True)
        heads = decoder.num_attention_heads
        group = heads // (getattr(decoder, "num_key_value_heads", None) or heads)
        layers: list[Any] = list(stock.layers)
        for position, index in enumerate(self.served):
            facts: dict[str, Any] = {
                "group": group,
                "monitor": self.monitor,
                "position": position,
            }
            if max_cache_len is None:
                layers[index] = DynamicPlaneLayer(self.request, **facts)
            else:
                layers[index] = StaticPlaneLayer(self.request, max_cache_len=max_cache_len, **facts)
        super().__init__(layers=layers, offloading=offloading)

    def __deepcopy__(self, memo: dict[int, Any]) -> AlignedKVCache:
        """A cache of its own with the same rows, for reusing a prefix."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            kept = name in ("request", "monitor", "prefetch_stream")
            setattr(twin, name, value if kept else copy.deepcopy(value, memo))
        return twin

    @property
    def is_compileable(self) -> bool:
        """Whether decode steps may run under torch.compile.

        Not with on_miss="raise": the check waits for the device.
        """
        return bool(super().is_compileable) and self.request.on_miss is not OnMiss.RAISE

    def serves(self, layer_idx: int) -> bool:
        """Whether a layer keeps planes."""
        return isinstance(self.layers[layer_idx], PlaneLayer)

    def plane_layer(self, layer_idx: int) -> PlaneLayer:
        """A layer that keeps planes."""
        return cast(PlaneLayer, self.layers[layer_idx])

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        facts: AttentionFacts,
        stock: StockAttention,
        *,
        only_stock: bool = False,
    ) -> Output:
        """Store a layer's new rows and attend; see `PlaneLayer.attend`.

        Raises
        ------
        BoundMissedError
            With on_miss="raise", after the last layer, if a head's bound exceeds the tolerance.
        """
        layer = self.plane_layer(layer_idx)
        output, stepped = layer.attend(
            query,
            keys,
            values,
            mask,
            facts,
            stock,
            check_mask=layer_idx == self.served[0],
            only_stock=only_stock,
        )
        if stepped and layer_idx == self.served[-1]:
            layers = [self.plane_layer(index) for index in self.served]
            self.monitor.tally(layers)
            if self.request.on_miss is OnMiss.RAISE:
                self._raise_if_missed(layers)
        layer.awaited = False
        if self.offloading:
            self.offload(layer_idx, self.only_non_sliding)
        return output

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Move a layer to the host, unless `attend` still has to come."""
        if not (self.serves(layer_idx) and self.plane_layer(layer_idx).awaited):
            super().offload(layer_idx, only_non_sliding)

    def _raise_if_missed(self, layers: list[PlaneLayer]) -> None:
        for index, layer in zip(self.served, layers, strict=True):
            bound, size, missed, _ = layer.tensors.results
            if missed.any():
                worst = float((bound / size)[missed.bool()].max())
                raise BoundMissedError(
                    f"layer {index}: {int(missed.sum())} of {missed.numel()} head outputs have an "
                    f"error bound above the tolerance {self.request.policy.tolerance:.3g}, the "
                    f"largest {worst:.3g}; allow more, or use on_miss='repair'"
                )
