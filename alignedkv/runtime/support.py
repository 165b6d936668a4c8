"""What a model must be for `patch`: all checks, none of which changes anything."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from alignedkv.errors import UnsupportedModelError
from alignedkv.kernels.spec import HEAD_DIMS, MAX_GROUP, DecodeSpec
from alignedkv.runtime.attention import STOCK_IMPLEMENTATIONS, implementation_name, is_attention
from alignedkv.runtime.backend import backend_for
from alignedkv.runtime.cache import served_layers
from alignedkv.runtime.dtypes import DTYPE_NAMES
from alignedkv.runtime.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLayer:
    """A layer that will keep planes.

    Attributes
    ----------
    module : nn.Module
        Its attention.
    spec : DecodeSpec
    kv_heads : int
        Of all ranks together, where heads are split over several.
    device : torch.device
    """

    module: nn.Module
    spec: DecodeSpec
    kv_heads: int
    device: torch.device


def check_model(model: PreTrainedModel, request: Request) -> list[ServedLayer]:
    """The layers of a model that will keep planes.

    Raises
    ------
    UnsupportedModelError
        Naming the part of the model that stands in the way.
    SpecError
        If the policy cannot be honoured for heads like the model's.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model: give a PreTrainedModel"
        )
    name = type(model).__name__
    stock = model.config._attn_implementation
    if stock.startswith(implementation_name("")):
        raise UnsupportedModelError(f"{name} is patched already: unpatch it first")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model: give a decoder-only one")
    if stock not in STOCK_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} runs attention {stock!r}: its prompts would keep it, which is tried with "
            f"{' and '.join(STOCK_IMPLEMENTATIONS)}; call set_attn_implementation first"
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention interface"
        )
    served = set(served_layers(model.config))
    modules = [
        module for module in model.modules() if is_attention(module) and module.layer_idx in served
    ]
    if not modules:
        raise UnsupportedModelError(
            f"{name} has no full-attention layer: sliding windows keep their stock cache, so there "
            "is nothing to read less of"
        )
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [_served_layer(name, module, stock, kv_heads, request) for module in modules]


def _served_layer(
    name: str, module: nn.Module, stock: str, kv_heads: int, request: Request
) -> ServedLayer:
    where = f"{name}, layer {module.layer_idx}"
    group: Any = module.num_key_value_groups
    forward = inspect.signature(module.forward)
    if not any(p.kind is p.VAR_KEYWORD for p in forward.parameters.values()):
        raise UnsupportedModelError(
            f"{where}: {type(module).__name__}.forward takes no keyword arguments to pass on to "
            "its attention function"
        )
    head_dim = getattr(module, "head_dim", None)
    if head_dim not in HEAD_DIMS:
        raise UnsupportedModelError(
            f"{where}: heads of {head_dim} channels; the kernels take "
            f"{', '.join(map(str, HEAD_DIMS))}"
        )
    if not 1 <= group <= MAX_GROUP:
        raise UnsupportedModelError(
            f"{where}: {group} query heads on a KV head; the kernels take 1 to {MAX_GROUP}"
        )
    parameter = next(module.parameters())
    backend_for(parameter.device)
    dtype = _compute_dtype(parameter)
    if dtype not in DTYPE_NAMES:
        allowed = ", ".join(DTYPE_NAMES.values())
        raise UnsupportedModelError(f"{where}: weights are {dtype}; the kernels take {allowed}")
    spec = DecodeSpec.from_policy(
        request.policy,
        head_dim=head_dim,
        group=group,
        query_dtype=DTYPE_NAMES[dtype],
        row_dtype=DTYPE_NAMES[dtype],
        softcap=bool(getattr(module, "attn_logit_softcapping", None)),
        sinks=hasattr(module, "sinks"),
    )
    if stock == "sdpa" and (spec.softcap or spec.sinks):
        what = "a softcap of its scores" if spec.softcap else "attention sinks"
        raise UnsupportedModelError(
            f"{where} has {what}, which attention 'sdpa' leaves out or refuses: call "
            "set_attn_implementation('eager') first"
        )
    return ServedLayer(module=module, spec=spec, kv_heads=kv_heads, device=parameter.device)


def _compute_dtype(parameter: nn.Parameter) -> torch.dtype:
    """dtype of a layer's activations: that of its weights, unless those are integers."""
    return parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
