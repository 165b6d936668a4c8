"""Tiny random models of every family that the runtime is tried with."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
#: One sliding-window layer of 16 tokens and one of full attention.
WINDOWS: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

#: Prefix of the classes, and what differs from SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {
        **WINDOWS,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 2.0,
        "attn_implementation": "eager",
    },
    "Gemma3": {**WINDOWS, "query_pre_attn_scalar": 64},
    "Phi3": {"hidden_size": 256, "sliding_window": None},
    "Olmo2": {"hidden_size": 256},
    "GptOss": {**WINDOWS, **EXPERTS, "num_local_experts": 4},
    "Granite": {"hidden_size": 256, "attention_multiplier": 0.1},
    "Mixtral": {**EXPERTS, "num_local_experts": 4, "sliding_window": None},
    "Qwen3Moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64},
}
#: Classes whose name is not prefix + "Config" and prefix + "ForCausalLM".
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def make_tiny(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A new random model; attention sharper than at initialisation, so that tokens differ."""
    config_class = getattr(transformers, CONFIG_NAMES.get(family, f"{family}Config"))
    config = config_class(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@cache
def tiny(family: str) -> PreTrainedModel:
    """The same as `make_tiny`, shared: leave it as you found it."""
    return make_tiny(family)


def prompt(batch: int, tokens: int, *, seed: int = 1) -> torch.Tensor:
    """Random token numbers [B, S], none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SIZES["vocab_size"], (batch, tokens), generator=generator)


#: Keyword and output name of a cache in this version of transformers.
CACHE = (
    "cache"
    if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
