"""The command line of `autotune.py`, and the spec that it describes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alignedkv.kernels.spec import DTYPES, HEAD_DIMS, LAYOUTS, DecodeSpec
from alignedkv.kernels.tune.search import STRATEGIES
from alignedkv.kernels.tune.synthetic import KINDS
from alignedkv.planes import PlaneLayout
from alignedkv.policy import BoundKind, PrecisionPolicy
from autotune_sweep import CAPTURED


def parse(argv: Sequence[str] | None, *, description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    modes = parser.add_mutually_exclusive_group()
    add = modes.add_argument
    add("--explain", action="store_true", help="say why configurations are pruned, and stop")
    add("--replay", type=Path, metavar="FILE", help="search a recorded sweep; needs no GPU")
    add("--report", type=Path, nargs="+", metavar="FILE", help="tables and page of sweeps")
    add("--export-t4", type=Path, nargs=2, metavar=("SWEEP", "FILE"), help="sweep to T4 JSON")
    add("--import-t4", type=Path, nargs=2, metavar=("FILE", "SWEEP"), help="T4 JSON to sweep")
    add("--show-wisdom", action="store_true", help="list the winners of --wisdom")
    add("--import-wisdom", type=Path, metavar="FILE", help="merge a file into --wisdom")
    add("--export-wisdom", type=Path, metavar="FILE", help="merge --wisdom into a file")
    _add_problem(parser.add_argument_group("what is tuned"))
    _add_search(parser.add_argument_group("how"))
    options = parser.parse_args(argv)
    options.command = "tools/autotune.py " + " ".join(sys.argv[1:] if argv is None else argv)
    return options


def _add_problem(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tokens", type=int, nargs="+", default=[32768], help="cached tokens (default 32768)")
    add("--batch", type=int, nargs="+", default=[1], help="sequences (default 1)")
    add("--kv-heads", type=int, default=8, help="KV heads (default 8)")
    add("--group", type=int, default=4, help="query heads per KV head (default 4)")
    add("--head-dim", type=int, default=128, choices=HEAD_DIMS, help="default 128")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of rows and queries")
    add("--layout", default="4|4|4|4", choices=LAYOUTS)
    add("--bound", type=BoundKind, default=BoundKind.ESTIMATE, choices=list(BoundKind))
    add("--sample-values", action=argparse.BooleanOptionalAction,
        help="sample value rows of little weight (default: as the policy does)")  # fmt: skip
    add("--page-tokens", type=int, help="tokens of a page (default: contiguous)")
    add("--tolerance", type=_number, nargs="+", default=[2.0**-7], metavar="2^-7",
        help="the first is searched; at others the fastest are measured: the front")  # fmt: skip
    add("--data", nargs="+", default=["mixed"], choices=(*KINDS, CAPTURED),
        help="kinds of scores: the first is searched, the winner is the best on all")  # fmt: skip
    add("--captured", type=Path, help="activations for --data captured (default: our sample)")


def _add_search(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--search", choices=STRATEGIES, default="tpe")
    add("--trials", type=int, help="evaluations (default: the whole space)")
    add("--time-limit", type=float, metavar="S", help="seconds per search")
    add("--seed", type=int, default=0)
    add("--ahead", type=int, default=3, help="configurations TPE chooses at a time, less one")
    add("--shortlist", type=int, default=16, help="tried on further data and tolerances")
    add("--set", nargs="+", default={}, action=_Settings, metavar="NAME=VALUE",
        help="tunables that stay fixed")  # fmt: skip
    add("--journal", type=Path, help="resume from, and share with other workers")
    add("--jobs", type=int, help="compilers at a time (default: all cores)")
    add("--device", type=int, default=0, help="number of the GPU")
    add("--out", type=Path, default=Path("autotune"), help="folder for sweeps and the page")
    add("--wisdom", type=Path, help="file of winners (default: this GPU's in the cache folder)")
    add("--no-wisdom", action="store_true", help="keep no winner")


class _Settings(argparse.Action):
    """``name=value ...`` to a dict."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        """Split at the first equals sign."""
        if bad := [text for text in values if "=" not in text]:
            parser.error(f"{option_string} {bad[0]}: give NAME=VALUE")
        setattr(namespace, self.dest, dict(text.split("=", 1) for text in values))


def _number(text: str) -> float:
    """``"0.01"`` or ``"2^-7"``."""
    base, _, exponent = text.partition("^")
    return float(base) ** float(exponent) if exponent else float(base)


def spec_of(options: argparse.Namespace) -> DecodeSpec:
    """The spec that the options describe."""
    layout = PlaneLayout.parse(options.layout)
    policy = PrecisionPolicy(bound=options.bound, sample_values=options.sample_values)
    return DecodeSpec(
        head_dim=options.head_dim,
        group=options.group,
        query_dtype=options.dtype,
        row_dtype=options.dtype,
        layout=layout,
        stored_planes=len(layout),
        bound=options.bound,
        sample_values=policy.sampled,
        page_tokens=options.page_tokens,
    )
