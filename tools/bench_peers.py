#!/usr/bin/env python3
"""Time every decode attention kernel that is installed here, and measure its error.

    python tools/bench_peers.py --tokens 8192 32768 131072 --json peers.json

Each competitor runs on the same random inputs, from cold caches, as a CUDA graph.  Competitors that
are not installed are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from benchlib.peers import LEADERS, PeerResult, all_peers, fastest, measure_peer, named_peers
from benchlib.problem import DecodeShape, random_inputs, reference_output
from benchlib.timing import read_bandwidth


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768], help="cached tokens")
    parser.add_argument("--batch", type=int, default=1, help="requests")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    parser.add_argument("--spread", type=float, default=2.2, help="standard deviation of scores")
    parser.add_argument("--replays", type=int, default=25, help="graph replays per kernel")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="only these; 'leaders' means the usual winners"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    return parser.parse_args(argv)


def as_power(error: float) -> str:
    """An error as a power of two, nine characters wide."""
    return f"2^{math.log2(error):<7.1f}" if error else "0        "


def describe(result: PeerResult, shape: DecodeShape, bandwidth: float) -> str:
    """One line of the table."""
    if result.timing is None or result.error is None:
        return f"{result.name:30}  skipped: {result.reason}"
    floor_us = shape.kv_bytes(result.bits) / bandwidth * 1e6
    timing, error = result.timing, result.error
    return (
        f"{result.name:30} {timing.median_us:8.1f} {timing.p10_us:8.1f} {timing.p90_us:8.1f}"
        f" {100 * floor_us / timing.median_us:8.0f} %"
        f"   {as_power(error.rms)} {as_power(error.max)}"
    )


def main(argv: list[str]) -> int:
    """Run the command."""
    arguments = parse_arguments(argv)
    import torch

    if not torch.cuda.is_available():
        print("torch finds no CUDA device, and there is nothing to time without one")
        return 1
    names = LEADERS if arguments.peers == ["leaders"] else arguments.peers
    peers = all_peers() if names is None else named_peers(names)
    card = torch.cuda.get_device_name()
    bandwidth = read_bandwidth()
    print(f"{card}, torch {torch.__version__}, reads {bandwidth / 1e9:.0f} GB/s", flush=True)

    rows = []
    for tokens in arguments.tokens:
        shape = DecodeShape(
            tokens=tokens,
            batch=arguments.batch,
            heads=arguments.heads,
            kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
        )
        inputs = random_inputs(shape, spread=arguments.spread)
        reference = reference_output(inputs)
        print(f"\n{shape}")
        print(
            f"{'':30} {'us':>8} {'p10':>8} {'p90':>8} {'of bytes':>10}   error rms max", flush=True
        )
        results = []
        for peer in peers:
            result = measure_peer(peer, inputs, reference, replays=arguments.replays)
            print(describe(result, shape, bandwidth), flush=True)
            results.append(result)
        for bits in (16, 8):
            if best := fastest(results, bits):
                print(f"fastest {bits} bit: {best.name}")
        rows += [
            {"card": card, "bandwidth": bandwidth, **asdict(shape), **asdict(result)}
            for result in results
        ]
        del inputs, reference
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
