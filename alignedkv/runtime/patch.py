"""patch, unpatch and patched: a model whose `generate` reads planes, and the way back.

What a patch adds to a model is two kinds of forward pre-hook, one method of the instance that makes
the cache of a `generate` call, the name of its attention implementation, and a `Patch` that lists
them.  All of it is undone by `unpatch`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel, StaticCache

from alignedkv.errors import SpecError
from alignedkv.policy import PrecisionPolicy
from alignedkv.runtime import attention
from alignedkv.runtime.cache import AlignedKVCache, served_layers
from alignedkv.runtime.forecast import break_even_tokens
from alignedkv.runtime.monitor import Monitor
from alignedkv.runtime.request import OnMiss, Request, make_request
from alignedkv.runtime.support import check_model

if TYPE_CHECKING:
    import pandas as pd

#: Attribute of a patched model that holds its `Patch`.
ATTRIBUTE = "_alignedkv_patch"
#: Method of a model that makes the cache of a `generate` call.
PREPARE_CACHE = "_prepare_cache_for_generation"

#: Patched models by the stock attention they keep; with the last one goes the registration.
_in_use: Counter[str] = Counter()


@dataclass(slots=True, kw_only=True)
class Patch:
    """What `patch` changed.

    Attributes
    ----------
    request : Request
    monitor : Monitor
    break_even : int
        Requests for fewer tokens than this, of all sequences, keep the stock cache.
    stock : str
        Attention implementation of the unpatched model.
    handles : list of RemovableHandle
        Of the hooks.
    """

    request: Request
    monitor: Monitor
    break_even: int
    stock: str
    handles: list[RemovableHandle]


def patch(
    model: PreTrainedModel,
    policy: PrecisionPolicy | str | None = None,
    *,
    on_miss: OnMiss | str = OnMiss.REPAIR,
    break_even: int | None = None,
    seed: int = 0,
) -> None:
    """Make a model keep its KV cache as bit planes and read only what its outputs need.

    ``generate`` works as before, in all its modes; so does calling the model with ``use_cache``.
    Prompts run through the model's own attention, unchanged and exact.

    Parameters
    ----------
    model : PreTrainedModel
    policy : PrecisionPolicy or str, optional
        How accurate an attention output has to be. ``"model"`` (default): within 2^-5 of its
        largest component, where the model's predictions are closer to exact ones than bf16
        attention leaves them. ``"output"``: within 2^-7, as accurate as bf16 FlashAttention. Both
        keep the first rows of a sequence exact. Or a policy of your own, such as
        ``PrecisionPolicy(tolerance=2**-6, bound="deterministic")``.
    on_miss : OnMiss or str
        What happens to a head whose bound exceeds the tolerance: ``"repair"`` (default), ``"flag"``
        or ``"raise"``; see `OnMiss`.
    break_even : int, optional
        ``generate`` calls for fewer tokens than this, of all sequences together and prompts
        included, keep the stock cache. Default: where `forecast` puts the break-even of this
        device; 0: none does.
    seed : int
        Of everything random in the stored planes.

    Raises
    ------
    UnsupportedModelError
        If the model, its device or its dtype is not supported, or it is patched already. Nothing
        has been changed then.
    SpecError
        If the policy cannot be honoured.
    """
    request = make_request(policy, on_miss=on_miss, seed=seed)
    served = check_model(model, request)
    if break_even is None:
        break_even = break_even_tokens(served)
    if break_even < 0:
        raise SpecError(f"break_even {break_even}: give a number of tokens, 0 for always")
    stock = model.config._attn_implementation
    if not _in_use[stock]:
        attention.register(stock)
    _in_use[stock] += 1
    handles = [
        layer.module.register_forward_pre_hook(attention.hand_over, with_kwargs=True)
        for layer in served
    ]
    handles.append(model.register_forward_pre_hook(_fill_in_cache, with_kwargs=True))
    setattr(model, PREPARE_CACHE, MethodType(_prepare_cache, model))
    record = Patch(
        request=request,
        monitor=Monitor(served_layers(model.config)),
        break_even=break_even,
        stock=stock,
        handles=handles,
    )
    setattr(model, ATTRIBUTE, record)
    model.set_attn_implementation(attention.implementation_name(stock))


def unpatch(model: PreTrainedModel) -> None:
    """Undo `patch`, leaving no trace.

    Raises
    ------
    SpecError
        If the model is not patched.
    """
    record = patch_of(model)
    model.set_attn_implementation(record.stock)
    for handle in record.handles:
        handle.remove()
    delattr(model, PREPARE_CACHE)
    delattr(model, ATTRIBUTE)
    _in_use[record.stock] -= 1
    if not _in_use[record.stock]:
        del _in_use[record.stock]
        attention.unregister(record.stock)


@contextmanager
def patched(
    model: PreTrainedModel, policy: PrecisionPolicy | str | None = None, **options: Any
) -> Iterator[PreTrainedModel]:
    """`patch` for the time of a ``with`` block; takes what `patch` takes."""
    patch(model, policy, **options)
    try:
        yield model
    finally:
        unpatch(model)


def report(model: PreTrainedModel) -> pd.DataFrame:
    """What a patched model has read and how sure it was, since `patch`.

    Steps count on the device; only this call waits for it.

    Returns
    -------
    DataFrame
        A row for each layer that keeps planes:

        - ``layer``: its index;
        - ``read_fraction``: bytes that decode steps read, of those of 16-bit keys and values;
        - ``bound_median``, ``bound_max``: error bounds of head outputs, relative to the largest
          component (the median to 1/16 of a bit); NaN before the first decode step;
        - ``misses``: head outputs whose bound exceeded the tolerance, after repairs;
        - ``stored_bytes``: memory that the caches alive take.

    Raises
    ------
    SpecError
        If the model is not patched.
    """
    return patch_of(model).monitor.report()


def patch_of(model: PreTrainedModel) -> Patch:
    """What `patch` changed of a model.

    Raises
    ------
    SpecError
        If the model is not patched.
    """
    record = getattr(model, ATTRIBUTE, None)
    if not isinstance(record, Patch):
        raise SpecError(
            f"{type(model).__name__} is not patched: call alignedkv.runtime.patch first"
        )
    return record


def _prepare_cache(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Let `generate` decide which cache it wants, then make it one of planes."""
    original = getattr(type(model), PREPARE_CACHE)
    bound = inspect.signature(original).bind(model, *args, **kwargs).arguments
    model_kwargs = bound["model_kwargs"]
    before = {name: model_kwargs.get(name) for name in attention.CACHE_KEYWORDS}
    answer = original(model, *args, **kwargs)
    for name in attention.CACHE_KEYWORDS:
        made = model_kwargs.get(name)
        if made is not None and made is not before[name]:
            tokens = bound["batch_size"] * bound["max_cache_length"]
            model_kwargs[name] = _planes_for(model, made, tokens)
            if bound["generation_config"].is_assistant:
                model_kwargs[name].activate_past_recording()
    return answer


def _planes_for(model: PreTrainedModel, made: Any, tokens: int) -> Any:
    """A cache of planes of the same kind as a stock one, or that one where planes do not serve."""
    record = patch_of(model)
    if tokens < record.break_even or type(made) not in (DynamicCache, StaticCache):
        return made
    static = type(made) is StaticCache
    return AlignedKVCache(
        model.config,
        record.request,
        monitor=record.monitor,
        max_cache_len=made.get_max_length() if static else None,
        offloading=made.offloading,
    )


def _fill_in_cache(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the model: a cache of planes where it would make a stock one itself."""
    use_cache = kwargs.get("use_cache")
    wanted = (
        model.config.get_text_config(decoder=True).use_cache if use_cache is None else use_cache
    )
    if not wanted or model.training:
        return args, kwargs
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]
    name = next(name for name in attention.CACHE_KEYWORDS if name in parameters)
    by_position = parameters.index(name) < len(args)
    given = any(kwargs.get(keyword) is not None for keyword in attention.CACHE_KEYWORDS)
    if by_position or given:
        return args, kwargs
    record = patch_of(model)
    cache = AlignedKVCache(model.config, record.request, monitor=record.monitor)
    return args, {**kwargs, name: cache}
