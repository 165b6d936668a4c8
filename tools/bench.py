#!/usr/bin/env python
"""Time alignedkv against its peers, on the same numbers, in the same run.

    python tools/bench.py decode --json benchmarks/results/decode-h100.json
    python tools/bench.py plot benchmarks/results/decode-h100.json
    python tools/bench.py analysis

``decode`` needs a GPU; peers that are not installed are skipped, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignedkv.errors import TuningError
from alignedkv.kernels.tune.synthetic import KINDS
from benchlib.peers import LEADERS, PeerResult, fastest, measure_peer, named_peers
from benchlib.problem import DecodeInputs, DecodeShape, reference_output
from benchlib.results import report_failure, run_facts, write
from benchlib.rows import Case, print_row, row

#: (tokens, batch) of the table in the README.
SIZES = ((8192, 1), (32768, 1), (131072, 1), (32768, 8))
CAPTURED = "captured"


class BenchError(Exception):
    """What cannot be timed here; the message says why."""


def cases(options: argparse.Namespace) -> Iterator[tuple[DecodeShape, str, list[float]]]:
    """Shapes and data, each with all tolerances: inputs and peers serve them together."""
    for tokens, batch in options.sizes:
        shape = DecodeShape(
            tokens=tokens,
            batch=batch,
            heads=options.kv_heads * options.group,
            kv_heads=options.kv_heads,
            head_dim=options.head_dim,
        )
        for data in options.data:
            yield shape, data, options.tolerances


def decode(options: argparse.Namespace) -> int:
    """Time the decode step at every size, data kind and tolerance."""
    _require_gpu("decode")
    import torch

    from alignedkv.kernels.config import DecodeConfig
    from alignedkv.policy import PrecisionPolicy
    from benchlib.ours import OurStep
    from benchlib.timing import read_bandwidth

    chosen = dict(setting.split("=", 1) for setting in options.set)
    config = DecodeConfig.from_settings(chosen) if chosen else None
    card = torch.cuda.get_device_name()
    bandwidth = read_bandwidth()
    print(f"{card}, torch {torch.__version__}, reads {bandwidth / 1e9:.0f} GB/s")
    print(
        "      T x B  data     tolerance     us (+append)  x16    x8   read     GB/s"
        "  bound   error   bf16    misses  err/bound",
        flush=True,
    )
    content: dict[str, Any] = {
        "card": card,
        "read_bandwidth": bandwidth,
        **run_facts(),
        "bound": options.bound,
        "failure": options.failure,
        "config": chosen,
        "rows": [],
        "failures": [],
        "skipped": {},
    }
    for shape, data, tolerances in cases(options):
        try:
            inputs = _inputs(shape, data, options.seed)
            reference = reference_output(inputs)
        except (TuningError, ValueError, RuntimeError) as error:
            report_failure(content, shape, data, error)
            continue
        peers = _measure_peers(options, inputs, reference, content)
        for tolerance in tolerances:
            policy = PrecisionPolicy(
                tolerance=tolerance,
                failure=options.failure,
                bound=options.bound,
                key_layout=options.layout,
                value_layout=options.layout,
                sample_values=options.sample_values,
                exact_first=options.exact_first,
            )
            try:
                ours = OurStep(inputs, policy, config=config)
                facts = row(
                    Case(shape=shape, data=data, tolerance=tolerance),
                    ours.measure(reference, replays=options.replays, energy_s=options.energy),
                    peers,
                    bandwidth,
                    card,
                )
            except Exception as error:  # noqa: BLE001 - one broken case must not cost the others
                report_failure(content, shape, data, error)
                continue
            finally:
                ours = None
                gc.collect()
                torch.cuda.empty_cache()
            print_row(facts)
            content["rows"].append(facts)
            write(options.json, content)
        del inputs, reference
    for name, reason in content["skipped"].items():
        print(f"skipped: {name}: {reason}")
    write(options.json, content)
    return 1 if content["failures"] else 0


def _inputs(shape: DecodeShape, data: str, seed: int) -> DecodeInputs:
    from benchlib.data import captured_inputs, synthetic_inputs

    if data == CAPTURED:
        import alignedkv.analysis

        sample = Path(alignedkv.analysis.__file__).parent / "sample"
        return captured_inputs(shape, next(sample.glob("*.safetensors")))
    return synthetic_inputs(shape, data, seed=seed)


def _measure_peers(
    options: argparse.Namespace, inputs: DecodeInputs, reference: Any, content: dict[str, Any]
) -> list[PeerResult]:
    names = LEADERS if options.peers == ["leaders"] else options.peers
    results = [
        measure_peer(peer, inputs, reference, replays=options.replays, energy_s=options.energy)
        for peer in named_peers([name for name in names if name != "none"])
    ]
    content["skipped"] |= {r.name: r.reason for r in results if r.reason is not None}
    return results


def paper(options: argparse.Namespace) -> int:
    """Time the paper's kernel with its rule, with all planes, and the best 16-bit peer."""
    _require_gpu("paper")
    import torch

    from benchlib.paper import measure_paper

    card = torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "card": card,
        **run_facts(),
        "rows": [],
        "failures": [],
        "skipped": {},
    }
    print(f"{card}\n      T x B  rule                   us  bits/element  error_max", flush=True)
    for shape, data, _ in cases(options):
        try:
            inputs = _inputs(shape, data, options.seed)
            reference = reference_output(inputs)
            results = measure_paper(inputs, reference, replays=options.replays)
        except Exception as error:  # noqa: BLE001 - one broken case must not cost the others
            report_failure(content, shape, data, error)
            continue
        best = fastest(_measure_peers(options, inputs, reference, content), 16)
        for found in results:
            facts = {
                "T": shape.tokens,
                "batch": shape.batch,
                "group": shape.group,
                "data": data,
                "rule": found.rule,
                "us": found.timing.median_us,
                "bits_per_element": found.bits_per_element,
                "error_max": found.error.max,
                "best16_us": best.timing.median_us if best and best.timing else None,
                "best16_name": best.name if best else None,
                "card": card,
            }
            print(
                f"{shape.tokens:7d} x {shape.batch:<2d} {found.rule:20} {facts['us']:7.1f}"
                f" {found.bits_per_element:8.2f}      {found.error.max:.5f}",
                flush=True,
            )
            content["rows"].append(facts)
        write(options.json, content)
    write(options.json, content)
    return 1 if content["failures"] else 0


def _require_gpu(command: str) -> None:
    try:
        import torch
    except ImportError:
        raise BenchError(f"{command} needs torch and a GPU; torch is not installed") from None
    if not torch.cuda.is_available():
        raise BenchError(
            f"{command} needs a GPU, and torch finds none; `plot` draws recorded results"
        )


def plot(options: argparse.Namespace) -> int:
    """Draw time against T for all peers, with the byte ceiling."""
    from benchlib.plot import draw_decode

    try:
        content = json.loads(options.file.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{options.file} is no result of `decode --json`: {error}") from None
    out = options.out or options.file.with_suffix(".svg")
    draw_decode(content, out)
    print(out)
    return 0


def analysis(options: argparse.Namespace) -> int:
    """Time the analysis of one KV head."""
    import bench_analysis

    return int(bench_analysis.main(options.rest))


def _size(text: str) -> tuple[int, int]:
    tokens, _, batch = text.partition("x")
    return int(tokens), int(batch or 1)


def _add_problem(parser: argparse.ArgumentParser, *, sizes: Sequence[tuple[int, int]]) -> None:
    parser.add_argument("--sizes", type=_size, nargs="+", default=sizes, metavar="TxB")
    parser.add_argument("--data", nargs="+", default=["mixed"], choices=(*KINDS, CAPTURED))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--peers", nargs="+", default=["leaders"], help="names, 'leaders', 'none'")
    parser.add_argument("--replays", type=int, default=25)
    parser.add_argument(
        "--energy", type=float, default=0.0, metavar="S", help="seconds to measure energy for"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to keep every number")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    timed = commands.add_parser("decode", help="our decode step beside its peers, on a GPU")
    timed.set_defaults(run=decode)
    _add_problem(timed, sizes=SIZES)
    timed.add_argument("--tolerances", type=float, nargs="+", default=[2.0**-7, 2.0**-5])
    timed.add_argument("--bound", default="estimate")
    timed.add_argument("--failure", type=float, default=1e-9)
    timed.add_argument("--layout", default="4|4|4|4")
    timed.add_argument(
        "--sample-values", action=argparse.BooleanOptionalAction, help="default: the policy's"
    )
    timed.add_argument("--exact-first", type=int, default=0, help="first rows kept exact")
    timed.add_argument("--set", nargs="*", default=[], metavar="TUNABLE=VALUE")
    published = commands.add_parser("paper", help="the AlignedKV paper's kernel, on a GPU")
    published.set_defaults(run=paper, tolerances=[])
    _add_problem(published, sizes=((32768, 1), (131072, 1)))
    drawn = commands.add_parser("plot", help="time against T, from a result of decode")
    drawn.set_defaults(run=plot)
    drawn.add_argument("file", type=Path)
    drawn.add_argument("--out", type=Path, help="picture (default: beside the file, .svg)")
    analysed = commands.add_parser("analysis", help="speed of the analysis", add_help=False)
    analysed.set_defaults(run=analysis)
    options, rest = parser.parse_known_args(argv)
    if rest and options.run is not analysis:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 if a case failed, 2 with one line where nothing can be done."""
    options = parse(argv)
    try:
        code: int = options.run(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
