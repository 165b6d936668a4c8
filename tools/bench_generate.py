#!/usr/bin/env python
"""End to end: decode steps a second of a whole model, patched beside stock, under CUDA graphs.

    python tools/bench_generate.py --sizes 32768 131072 32768x8 --json generate.json

The model has Llama-3-8B's shapes and random weights; its prompt is random tokens.  Stock is
transformers' model on torch SDPA with a cache of the very length and no mask, so that SDPA takes
its flash kernel: faster than transformers' own static cache, which hands it a mask.  One decode
step is captured as a CUDA graph and replayed; a profile of the same graph says where the time
goes.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
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
#: Kernels whose names hold one of these are attention.
ATTENTION_KERNELS = {
    "alignedkv": ("decode", "prepare"),
    "stock": ("flash", "fmha", "sdpa", "attention", "cudnn"),
}


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


def time_replays(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Milliseconds of each replay."""
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def kernel_times(graph: torch.cuda.CUDAGraph, names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of a replay in attention kernels, in matrix products, in all others."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        graph.replay()
        torch.cuda.synchronize()
    shares = {"attention": 0.0, "products": 0.0, "others": 0.0}
    for event in seen.key_averages():
        name, spent = event.key.lower(), event.self_device_time_total * 1e-3
        if any(part in name for part in names):
            shares["attention"] += spent
        elif "gemm" in name or "gemv" in name or "cutlass" in name or "nvjet" in name:
            shares["products"] += spent
        elif not name.startswith(("cuda", "activity")):
            shares["others"] += spent
    return shares


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


def measure(
    make: Callable[[], torch.cuda.CUDAGraph], names: Sequence[str], batch: int, replays: int
) -> dict[str, Any]:
    """Time and profile of one kind of step."""
    graph = make()
    times = time_replays(graph, replays)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    return {
        "step_ms": median,
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "tokens_per_s": batch / median * 1e3,
        "kernels_ms": kernel_times(graph, names),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every size, stock and patched."""
    from alignedkv import runtime
    from alignedkv.policy import PrecisionPolicy

    torch.manual_seed(0)
    model = random_model(options.layers)
    rows = []
    for tokens, batch in options.sizes:
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device="cuda")
        facts: dict[str, Any] = {"T": tokens, "batch": batch, "layers": options.layers}
        facts |= {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
        facts["stock"] = measure(
            lambda ids=ids: stock_step(model, ids),  # type: ignore[misc]
            ATTENTION_KERNELS["stock"],
            batch,
            options.replays,
        )
        _free()
        model.set_attn_implementation("sdpa")
        for tolerance in options.tolerances:
            policy = PrecisionPolicy(tolerance=tolerance)
            with runtime.patched(model, policy, break_even=0):
                ours = measure(
                    lambda ids=ids: patched_step(model, ids),  # type: ignore[misc]
                    ATTENTION_KERNELS["alignedkv"],
                    batch,
                    options.replays,
                )
                report = runtime.report(model)
            ours["read_fraction"] = float(report["read_fraction"].mean())
            ours["misses"] = int(report["misses"].sum())
            ours["speedup"] = facts["stock"]["step_ms"] / ours["step_ms"]
            facts[f"alignedkv at {tolerance}"] = ours
            print(
                f"{tokens:7d} x {batch}  stock {facts['stock']['step_ms']:.2f} ms, alignedkv at "
                f"{tolerance} {ours['step_ms']:.2f} ms: {ours['speedup']:.2f}x, reads "
                f"{100 * ours['read_fraction']:.1f} %, {ours['misses']} misses; kernels "
                f"{facts['stock']['kernels_ms']} {ours['kernels_ms']}",
                flush=True,
            )
            _free()
        rows.append(facts)
    return rows


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _size(text: str) -> tuple[int, int]:
    tokens, _, batch = text.partition("x")
    return int(tokens), int(batch or 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ((32768, 1), (131072, 1), (32768, 8))
    parser.add_argument("--sizes", type=_size, nargs="+", default=sizes, metavar="TxB")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[2.0**-7, 2.0**-5])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to keep every number")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_generate: torch finds no GPU, and there is nothing to time", file=sys.stderr)
        return 2
    rows = run(options)
    if options.json:
        command = " ".join(["python", *sys.argv])
        options.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
