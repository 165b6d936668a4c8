"""Where `tools/analyze.py` writes: a folder that gets all files or none, and the terminal."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from alignedkv.analysis.tables import (
    Findings,
    SchemeSummary,
    Summary,
    power_of_two,
    summarize_layers,
    summarize_schemes,
    summarize_tolerances,
    tolerance_name,
)
from alignedkv.errors import AlignedKVError

_Result = TypeVar("_Result")
#: Seconds between lines of progress where nobody watches a terminal.
_PROGRESS_INTERVAL = 30.0


class OutputError(AlignedKVError):
    """The output folder cannot be written."""


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder whose files appear in `out` when the block ends without an exception.

    The folder lies beside them, on the same file system, so that each file appears whole; what is
    in `out` under other names stays.  After an exception nothing is left, Ctrl-C included.

    Raises
    ------
    OutputError
        If `out` cannot be made or written.
    """
    home = out if out.is_dir() else _nearest_folder(out)
    try:
        stage = Path(tempfile.mkdtemp(prefix=".analyze-", dir=home))
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        yield stage
        _publish(stage, out)
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _nearest_folder(out: Path) -> Path:
    for place in (out, *out.absolute().parents):
        if place.is_dir():
            return place
        if place.exists():
            raise OutputError(f"--out {out}: {place} is a file; give a folder")
    raise OutputError(f"--out {out}: there is no such place")


@contextmanager
def workers_ignore_interrupts() -> Iterator[None]:
    """Let processes that start inside ignore Ctrl-C, which a terminal sends to all of them.

    They are to end with this process, not each with a traceback of its own.  Ignoring is what
    a new program inherits; a blocked signal would be unblocked by joblib's resource tracker.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python leaves signals to the main thread
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _publish(stage: Path, out: Path) -> None:
    """Move all files, and do not stop in the middle: Ctrl-C waits until they are there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(stage.iterdir()):
            file.replace(out / file.name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def with_progress(results: Iterator[_Result], total: int) -> Iterator[_Result]:
    """Pass results on and show on stderr how many have come."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            yield from progress.track(results, total=total, description="query positions")
        return
    said = time.monotonic()
    for done, result in enumerate(results, start=1):
        yield result
        if time.monotonic() - said > _PROGRESS_INTERVAL:
            print(f"analyze: {done} of {total} query positions", file=sys.stderr, flush=True)
            said = time.monotonic()


def print_tables(findings: Findings) -> None:
    """Every tolerance layer by layer, and the schemes below."""
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("K bits", "V bits", "read\n%", "error\nmedian", "error\nmax", "bound\nmax"):
        table.add_column(name, justify="right")
    table.add_column("missed", justify="right")
    for total in summarize_tolerances(findings.requested):
        outputs = findings.requested[findings.requested["tolerance"] == total.tolerance]
        table.add_row(f"[bold]tolerance {tolerance_name(total.tolerance)}[/]")
        for layer, summary in summarize_layers(outputs):
            table.add_row(f"  layer {layer}", *_cells(summary))
        table.add_row("  all", *_cells(total), style="bold", end_section=True)
    schemes = summarize_schemes(findings.schemes)
    if schemes:
        table.add_row("[bold]schemes, with scales[/]")
    for scheme in schemes:
        table.add_row(f"  {scheme.scheme}", *_scheme_cells(scheme))
    Console().print(table)


def _cells(summary: Summary) -> Sequence[str]:
    return (
        f"{summary.bits_k:.2f}",
        f"{summary.bits_v:.2f}",
        f"{100 * summary.read_fraction:.1f}",
        power_of_two(summary.error_median),
        power_of_two(summary.error_max),
        power_of_two(summary.bound_max),
        f"{summary.misses}/{summary.cases}",
    )


def _scheme_cells(summary: SchemeSummary) -> Sequence[str]:
    return (
        f"{summary.bits_k:.2f}",
        f"{summary.bits_v:.2f}",
        f"{100 * summary.read_fraction:.1f}",
        power_of_two(summary.error_median),
        power_of_two(summary.error_max),
        "",
        "",
    )
