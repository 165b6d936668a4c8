#!/usr/bin/env python3
"""Time the Numba CUDA kernels beside the CUDA C++ ones: the same caches, the same hints.

    python tools/bench_numba_cuda.py --tokens 8192 32768 131072 --json FILE

Both run from cold caches as CUDA graphs, one after the other for each size.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignedkv.kernels.tune.synthetic import KINDS
from benchlib.problem import DecodeShape, reference_output


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="cached")
    parser.add_argument("--batch", type=int, default=1, help="requests")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    parser.add_argument("--data", nargs="+", default=["mixed"], choices=KINDS, help="scores")
    parser.add_argument("--tolerance", type=float, default=2.0**-7, help="of an output")
    parser.add_argument("--bounds", nargs="+", default=["estimate"], help="bound kinds")
    parser.add_argument("--replays", type=int, default=15, help="graph replays of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, shape: DecodeShape, data: str) -> list[dict[str, Any]]:
    """Both implementations at one size: a row for each bound."""
    from alignedkv.policy import PrecisionPolicy
    from benchlib.data import synthetic_inputs
    from benchlib.numba_cuda import measure_numba_cuda
    from benchlib.ours import OurStep

    inputs = synthetic_inputs(shape, data)
    reference = reference_output(inputs)
    rows = []
    for bound in options.bounds:
        step = OurStep(inputs, PrecisionPolicy(tolerance=options.tolerance, bound=bound))
        numba = measure_numba_cuda(step, reference, replays=options.replays)
        ours = step.measure(reference, replays=options.replays)
        rows.append(
            {
                "T": shape.tokens,
                "batch": shape.batch,
                "head_dim": shape.head_dim,
                "group": shape.group,
                "data": data,
                "tolerance": options.tolerance,
                "bound": bound,
                "numba_us": numba.attend.median_us,
                "numba_p90_us": numba.attend.p90_us,
                "cuda_us": ours.attend.median_us,
                "cuda_p90_us": ours.attend.p90_us,
                "numba_read_fraction": numba.read_fraction,
                "cuda_read_fraction": ours.read_fraction,
                "numba_error_max": numba.error.max,
                "cuda_error_max": ours.error.max,
                "numba_misses": numba.misses,
                "cuda_misses": ours.misses,
            }
        )
    return rows


def main(argv: list[str]) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    import torch

    if not torch.cuda.is_available():
        print("torch finds no CUDA device, and there is nothing to time without one")
        return 1
    packages = ("torch", "numpy", "numba", "numba-cuda")
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    card = torch.cuda.get_device_name()
    print(f"{card}, {versions}")
    print("      T x B  data     bound          numba us   cuda us  ratio   read   error max")
    rows = []
    for tokens in options.tokens:
        shape = DecodeShape(
            tokens=tokens,
            batch=options.batch,
            heads=options.heads,
            kv_heads=options.kv_heads,
            head_dim=options.head_dim,
        )
        for data in options.data:
            for facts in measure(options, shape, data):
                print(
                    f"{tokens:7d} x {shape.batch:<2d} {data:8} {facts['bound']:13}"
                    f" {facts['numba_us']:9.1f} {facts['cuda_us']:9.1f}"
                    f" {facts['numba_us'] / facts['cuda_us']:6.1f}"
                    f" {100 * facts['numba_read_fraction']:5.1f} % {facts['numba_error_max']:.5f}",
                    flush=True,
                )
                rows.append(facts)
    if options.json:
        content = {"card": card, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
