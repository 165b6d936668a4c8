"""How a patched model's attention reaches the planes, through transformers' public registries.

An attention module calls ``cache.update`` and then the attention function that its configuration
names; the function never sees the cache.  A forward pre-hook closes the gap: it gives the module a
stand-in for its cache, whose update returns the new rows alone, and passes the stand-in on among
the keyword arguments that every module hands to its attention function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from alignedkv.errors import UnsupportedModelError
from alignedkv.runtime.cache import AlignedKVCache
from alignedkv.runtime.layer import Output
from alignedkv.runtime.plan import AttentionFacts

#: Attention implementations that a patched model keeps for its prompts.
STOCK_IMPLEMENTATIONS = ("sdpa", "eager")
#: Names under which a module may receive its cache, newest first.
CACHE_KEYWORDS = ("cache", "past_key_values")
#: Keyword under which the hand-over reaches the attention function.
HANDOVER = "alignedkv"

#: What `AttentionInterface.register` and its counterpart for masks write to; they cannot take back.
_FUNCTIONS: dict[str, Any] = AttentionInterface._global_mapping
_MASKS: dict[str, Any] = AttentionMaskInterface._global_mapping


def implementation_name(stock: str) -> str:
    """Name of our attention on top of a stock one."""
    return f"alignedkv_{stock}"


class Handover:
    """What an attention module of a patched model sees as its cache.

    Parameters
    ----------
    cache : AlignedKVCache
    layer_idx : int
    """

    def __init__(self, cache: AlignedKVCache, layer_idx: int) -> None:
        self.cache = cache
        self.layer_idx = layer_idx

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new rows as they are: the attention function stores them."""
        return self.cache.update(key_states, value_states, layer_idx, handed_over=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is one of those that update a cache and call the attention interface."""
    return hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")


def hand_over(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention module; leaves other caches and layers alone."""
    index: Any = module.layer_idx
    for name in CACHE_KEYWORDS:
        cache = kwargs.get(name)
        if isinstance(cache, AlignedKVCache) and cache.serves(index):
            handover = Handover(cache, index)
            kwargs = {**kwargs, name: handover, HANDOVER: handover}
    return args, kwargs


def attention_on(stock_name: str) -> Callable[..., Output]:
    """Our attention function, which leaves to the stock one what is not for the planes."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Output:
        handover: Handover | None = kwargs.pop(HANDOVER, None)
        stock_attention = _stock_function(stock_name, module)

        def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Output:
            answer: Output = stock_attention(
                module, query, key, value, mask, scaling=scaling, **kwargs
            )
            return answer

        if handover is None:
            return stock(query, key, value, attention_mask)
        if kwargs.get("sliding_window") is not None or kwargs.get("position_bias") is not None:
            raise UnsupportedModelError(
                f"layer {handover.layer_idx} has a sliding window or a position bias although its "
                "configuration calls it full attention: unpatch the model"
            )
        sinks = kwargs.get("s_aux")
        facts = AttentionFacts(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap") or 0.0,
            sinks=None if sinks is None else sinks.detach().float(),
        )
        return handover.cache.attend(
            handover.layer_idx,
            query,
            key,
            value,
            attention_mask,
            facts,
            stock,
            only_stock=bool(kwargs.get("output_attentions")),
        )

    return attend


def _stock_function(name: str, module: nn.Module) -> Any:
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return _FUNCTIONS[name]


def register(stock_name: str) -> None:
    """Offer our attention on top of ``stock_name`` to transformers, with its kind of mask."""
    name = implementation_name(stock_name)
    _FUNCTIONS[name] = attention_on(stock_name)
    _MASKS[name] = _MASKS[stock_name]


def unregister(stock_name: str) -> None:
    """Undo `register`."""
    name = implementation_name(stock_name)
    _FUNCTIONS.pop(name, None)
    _MASKS.pop(name, None)
