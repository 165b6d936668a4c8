"""One decode step of a whole model as a CUDA graph: stock at its fastest, or patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 5e5,
    "max_position_embeddings": 262144,
}
#: Tokens of the prompt that run through a feed-forward layer at once.
PREFILL_CHUNK = 8192
#: Room behind the prompt; every replay of the patched step appends a token.
ROOM = 256
#: torch SDPA without a mask, as the stock attention of the model.
NO_MASK = "sdpa_without_mask"


class FullLayer(DynamicLayer):
    """A stock layer of fixed length: the newest token overwrites the last row, nothing grows."""

    def fix(self) -> None:
        """Make room for one more token and keep that length."""
        self.keys, self.values = (
            torch.cat([rows, rows[:, :, -1:]], dim=2).contiguous()
            for rows in (self.keys, self.values)
        )
        self.fixed = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock update while the prompt runs, an overwrite afterwards."""
        if not getattr(self, "fixed", False):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the newest."""
        length = int(super().get_seq_length())
        return length - 1 if getattr(self, "fixed", False) else length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask, and the token of its first."""
        return self.get_seq_length() + query_length, 0


def random_model(layers: int) -> Any:
    """Llama-3-8B's shapes with random bfloat16 weights, made on the GPU."""
    config = LlamaConfig(**(LLAMA_3_8B | {"num_hidden_layers": layers}))
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def cache_keyword(model: Any) -> str:
    """The name that this version of transformers gives a cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def short_activations(model: Any) -> Iterator[None]:
    """Feed-forward layers work on `PREFILL_CHUNK` tokens at a time: a long prompt then fits."""

    def in_chunks(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.cat([forward(part) for part in rows.split(PREFILL_CHUNK)]).view_as(x)

    blocks = [layer.mlp for layer in model.model.layers]
    for block in blocks:
        block.forward = partial(in_chunks, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """Run the prompt through the model."""
    with short_activations(model):
        model(ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})


@torch.no_grad()
def step_graph(model: Any, cache: Any, ids: torch.Tensor, position: int) -> torch.cuda.CUDAGraph:
    """One decode step on static inputs as a CUDA graph."""
    token = ids[:, -1:].clone()
    positions = torch.full_like(token, position)

    def run() -> Any:
        keyword = {cache_keyword(model): cache}
        return model(token, position_ids=positions, use_cache=True, **keyword).logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            logits = run()
    torch.cuda.current_stream().wait_stream(side)
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's logits are not finite: nothing worth timing")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def stock_step(model: Any, ids: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A stock decode step behind the prompt."""
    # Under a graph capture transformers always makes a mask, and with one SDPA repeats K and V for
    # every query head: without it stock takes the flash kernel on the grouped heads.
    AttentionInterface.register(NO_MASK, sdpa_attention_forward)
    AttentionMaskInterface.register(NO_MASK, lambda *_args, **_kwargs: None)
    model.set_attn_implementation(NO_MASK)
    cache = DynamicCache(config=model.config)
    cache.layers = [FullLayer() for _ in range(model.config.num_hidden_layers)]
    prefill(model, ids, cache)
    for layer in cache.layers:
        layer.fix()
    return step_graph(model, cache, ids, ids.shape[1])


def patched_step(model: Any, ids: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A patched decode step behind the prompt; the model must be patched."""
    from alignedkv.runtime import AlignedKVCache
    from alignedkv.runtime.patch import patch_of

    record = patch_of(model)
    cache = AlignedKVCache(
        model.config,
        record.request,
        monitor=record.monitor,
        max_cache_len=ids.shape[1] + ROOM,
    )
    prefill(model, ids, cache)
    return step_graph(model, cache, ids, ids.shape[1])
