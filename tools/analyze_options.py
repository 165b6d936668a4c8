"""Command line of `tools/analyze.py`: what may be given, checked, and turned into a sweep."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from alignedkv.analysis.case_files import find_cases, sample_path
from alignedkv.analysis.encoding import KEY_TRANSFORM
from alignedkv.analysis.plan import DecisionGroups
from alignedkv.analysis.schemes import Scheme, default_schemes
from alignedkv.analysis.sweep import SweepSettings, position_tasks
from alignedkv.errors import SpecError
from alignedkv.policy import BoundKind, PrecisionPolicy
from analyze_values import (
    Several,
    parse_jobs,
    parse_layouts,
    parse_numbers,
    parse_positions,
    parse_schemes,
    parse_tolerance,
    scheme_names,
    slug,
)

DEFAULT_TOLERANCES = (2.0**-7, 2.0**-5)
#: Tolerances of the curve "what a tolerance costs", beside those that are asked for.
CURVE = tuple(2.0**exponent for exponent in range(-9, -3))
#: Query positions of each KV head unless others are asked for: evenly spaced over those stored.
SPACED_POSITIONS = 8

EPILOG = """\
examples:
  analyze.py                                   the bundled sample, report in ./report
  analyze.py captured/ --tolerance 2^-7 2^-5   what capture.py wrote, a file a layer
  analyze.py 'captured/layer-0*.safetensors' --layers 0 5 --positions -1 --json
  analyze.py big.safetensors --jobs tcp://scheduler:8786    on a Dask cluster
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line that can be served.

    Attributes
    ----------
    tasks : list of (CaseReference, int)
    settings : SweepSettings
    sources : list of str
    command : str
        The line as it was given.
    jobs : int or str
        Processes as joblib counts them, or the address of a Dask scheduler.
    out : Path
    json : bool
    positions_left_out : bool
        Whether files hold query positions that nobody asked to leave out.
    """

    tasks: list[Any]
    settings: SweepSettings
    sources: list[str]
    command: str
    jobs: int | str
    out: Path
    json: bool
    positions_left_out: bool


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; --help lists all options\n")


def build_parser() -> OneLineParser:
    """All options."""
    parser = OneLineParser(
        prog="analyze",
        description="How few bits of each cached token does attention need?  Reads saved "
        "activations; writes a report and tables.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        metavar="FILE",
        help=".safetensors, .npz or .pt files, folders of them, or glob patterns "
        "(default: the bundled sample)",
    )

    def several(option: str, parse: Any, help_text: str, metavar: str = "N") -> None:
        add(option, nargs="+", action=Several, const=parse, metavar=metavar, help=help_text)

    several("--layers", parse_numbers, "layers, such as 0 5 10..15 (default: all)")
    several("--heads", parse_numbers, "KV heads, each with its query heads (default: all)")
    several(
        "--positions",
        parse_positions,
        "query positions as token numbers; -1 is the last one stored, 'all' means all "
        f"(default: {SPACED_POSITIONS} of each head, evenly spaced)",
    )
    several("--tolerance", parse_tolerance, "allowed relative errors (default: 2^-7 2^-5)", "X")
    add(
        "--failure",
        type=float,
        default=1e-9,
        metavar="P",
        help="probability with which a bound that is no certainty may fail (default: %(default)s)",
    )
    add(
        "--bound",
        default="estimate",
        metavar="KIND",
        help=f"{', '.join(BoundKind)} (default: %(default)s)",
    )
    add(
        "--layout",
        default="4|4|4|4",
        metavar="WIDTHS",
        help="bits of the planes, such as 4-4-8; of keys and values: 4-2-2-8,4-4-8 "
        "(default: 4-4-4-4)",
    )
    add("--stored-planes", type=int, metavar="N", help="planes kept in memory (default: all)")
    several(
        "--scheme", parse_schemes, f"schemes to compare with: {', '.join(scheme_names())}, none"
    )
    add("--group", type=int, default=1, metavar="TOKENS", help="tokens that are decided together")
    add("--sample-values", action="store_true", help="read small value rows by chance, unbiased")
    add("--exact-first", type=int, default=0, metavar="ROWS", help="first rows kept exactly")
    add("--exact-last", type=int, default=0, metavar="ROWS", help="last rows kept exactly")
    add("--dither-rows", type=int, default=64, metavar="P", help="a power of two (default: 64)")
    add(
        "--transform", default=KEY_TRANSFORM, metavar="PARTS", help="of keys (default: %(default)s)"
    )
    add("--scaling", type=float, metavar="X", help="softmax scale, in place of the files' own")
    add("--seed", type=int, default=0, metavar="N", help="of dither and draws (default: 0)")
    add(
        "--jobs",
        type=parse_jobs,
        default=-1,
        metavar="N",
        help="processes, or a Dask scheduler's address (default: all cores)",
    )
    add(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="FOLDER",
        help="folder to write (default: ./report)",
    )
    add("--json", action="store_true", help="print one JSON object per tolerance, not a table")
    parser.set_defaults(more_sources=[])
    return parser


def read_request(argv: Sequence[str] | None) -> Request:
    """Read the command line and list the work.

    Raises
    ------
    SystemExit
        Code 2, after one line on stderr, if the line cannot be parsed.
    AlignedKVError
        If what it says cannot be done.
    """
    options = build_parser().parse_args(argv)
    sources = [*options.sources, *options.more_sources] or [str(sample_path())]
    tolerances = tuple(sorted(set(options.tolerance or DEFAULT_TOLERANCES)))
    key_layout, value_layout = parse_layouts(options.layout)
    policy = PrecisionPolicy(
        tolerance=tolerances[0],
        failure=options.failure,
        bound=options.bound,
        key_layout=key_layout,
        value_layout=value_layout,
        stored_planes=options.stored_planes,
        dither_rows=options.dither_rows,
        sample_values=options.sample_values,
        exact_first=options.exact_first,
        exact_last=options.exact_last,
    )
    for tolerance in tolerances:
        if not 0 < tolerance < 1:
            raise SpecError(f"tolerance {tolerance!r}: give a number in (0, 1)")
    positions = options.positions
    chosen = None if positions is None or "all" in positions else positions
    cases = find_cases(
        sources,
        layers=options.layers,
        kv_heads=options.heads,
        positions=chosen,
        scaling=options.scaling,
    )
    tasks = position_tasks(cases, spaced=SPACED_POSITIONS if positions is None else None)
    return Request(
        tasks=tasks,
        settings=SweepSettings(
            policy=policy,
            tolerances=tolerances,
            curve=tuple(t for t in CURVE if t not in tolerances),
            groups=DecisionGroups.of(options.group),
            transform=options.transform,
            schemes=_chosen_schemes(options.scheme),
            seed=options.seed,
        ),
        sources=sources,
        command=shlex.join(["analyze.py", *(sys.argv[1:] if argv is None else argv)]),
        jobs=options.jobs,
        out=options.out,
        json=options.json,
        positions_left_out=len(tasks) < sum(len(case.query_positions()) for case in cases),
    )


def _chosen_schemes(names: Sequence[str] | None) -> tuple[Scheme, ...]:
    if names is None or "all" in names:
        return default_schemes()
    return tuple(scheme for scheme in default_schemes() if slug(scheme.name) in names)
