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
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from alignedkv.policy import PRESET_EXACT_FIRST
from bench_generate_steps import patched_step, random_model, stock_step

#: Kernels whose names hold one of these are attention.
ATTENTION_KERNELS = {
    "alignedkv": ("decode", "prepare"),
    "stock": ("flash", "fmha", "sdpa", "attention", "cudnn"),
}


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


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every size, stock and patched; each is told as soon as it is known."""
    from alignedkv import runtime
    from alignedkv.policy import PrecisionPolicy

    torch.manual_seed(0)
    model = random_model(options.layers)
    for tokens, batch in options.sizes:
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device="cuda")
        facts: dict[str, Any] = {"T": tokens, "batch": batch, "layers": options.layers}
        facts["exact_first"] = options.exact_first
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
            policy = PrecisionPolicy(tolerance=tolerance, exact_first=options.exact_first)
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
        yield facts


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
    parser.add_argument(
        "--exact-first", type=int, default=PRESET_EXACT_FIRST, help="first rows kept exact"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to keep every number")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_generate: torch finds no GPU, and there is nothing to time", file=sys.stderr)
        return 2
    command, rows = " ".join(["python", *sys.argv]), []
    for facts in run(options):
        rows.append(facts)
        if options.json:
            content = {"command": command, "rows": rows}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
