#!/usr/bin/env python
"""Say how few bits of each cached token attention needs.

Reads saved queries, keys and values (`tools/capture.py` makes them); plans for each query position
the fewest planes that keep a bound on the output's error below a tolerance; measures the error that
results; and sets beside it what other ways to keep a cache do to the same inputs.

    python tools/analyze.py                    # the bundled sample; report in ./report
    python tools/analyze.py captured/ --tolerance 2^-7 2^-5 --json
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import joblib
from rich.console import Console

from alignedkv.analysis.report import ReportFacts, build_report
from alignedkv.analysis.sweep import sweep
from alignedkv.analysis.tables import Findings, TokenTable, collect, summarize_tolerances
from alignedkv.errors import AlignedKVError, SpecError
from alignedkv.policy import BoundKind
from analyze_options import SPACED_POSITIONS, Request, read_request
from analyze_output import print_tables, staged_folder, with_progress, workers_ignore_interrupts

#: Seconds to wait for a Dask scheduler.
_CONNECT_TIMEOUT = 10


def analyze(request: Request, folder: Path) -> Findings:
    """Do the work and write all files into a folder."""
    with ExitStack() as stack:
        # Said of what is left undone after Ctrl-C or bad input, which is said in words of our own.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*tasks which were still being processed", UserWarning)
        jobs = request.jobs
        if isinstance(jobs, str):
            stack.enter_context(dask_cluster(jobs))
            jobs = -1
        with workers_ignore_interrupts():
            results = sweep(request.tasks, request.settings, jobs=jobs)
        stack.enter_context(closing(results))
        tokens = stack.enter_context(TokenTable(folder))
        findings = collect(with_progress(results, len(request.tasks)), tokens)
    findings.outputs.to_csv(folder / "outputs.csv", index=False)
    findings.schemes.to_csv(folder / "schemes.csv", index=False)
    (folder / "summary.json").write_text(json.dumps(json_objects(findings), indent=1) + "\n")
    report = build_report(findings, report_facts(request, findings))
    (folder / "report.html").write_text(report, encoding="utf-8")
    return findings


@contextmanager
def dask_cluster(address: str) -> Iterator[None]:
    """Let joblib send its work to a Dask cluster."""
    from distributed import Client

    try:
        client = Client(address, timeout=_CONNECT_TIMEOUT)
    except (OSError, ValueError) as error:
        raise SpecError(f"--jobs {address}: no Dask scheduler answers there ({error})") from None
    with client, joblib.parallel_config("dask"):
        yield


def json_objects(findings: Findings) -> list[dict[str, object]]:
    """One object per tolerance that was asked for."""
    return [summary.to_json() for summary in summarize_tolerances(findings.requested)]


def report_facts(request: Request, findings: Findings) -> ReportFacts:
    """What was analyzed and how."""
    settings, policy, outputs = request.settings, request.settings.policy, findings.requested
    layouts = f"{policy.key_layout} (keys), {policy.value_layout} (values)"
    if policy.key_layout == policy.value_layout:
        layouts = str(policy.key_layout)
    bound = f"{policy.bound}"
    if policy.bound is not BoundKind.DETERMINISTIC:
        bound += f", failure probability {policy.failure:g} for one output"
    heads = outputs[["layer", "kv_head"]].drop_duplicates()
    positions = len(outputs[["layer", "kv_head", "position"]].drop_duplicates())
    tokens = outputs["tokens"]
    facts = [
        ("files", ", ".join(Path(source).name for source in request.sources)),
        ("layers", ", ".join(str(layer) for layer in sorted(heads["layer"].unique()))),
        ("KV heads", f"{len(heads)} in all layers together"),
        ("query positions", f"{positions} in all heads together"),
        ("tokens seen", f"{tokens.min()} to {tokens.max()}"),
        ("effective tokens", f"median {outputs['effective_tokens'].median():.0f} (1/Σp²)"),
        ("bound", bound),
        ("planes", f"{layouts}, {policy.stored_planes or 'all'} stored"),
        ("key transform", settings.transform),
        ("tokens decided together", str(settings.groups.keys)),
        ("small value rows", "sampled" if policy.sampled else "skipped"),
        ("rows kept exactly", f"first {policy.exact_first}, last {policy.exact_last}"),
        ("dither rows, seed", f"{policy.dither_rows}, {settings.seed}"),
        ("command", request.command),
    ]
    return ReportFacts(title="What precision do these activations need?", inputs=facts)


def say_what_is_done(request: Request, console: Console) -> None:
    """One line about the work, before it begins."""
    cases = {(case.file.path, case.layer, case.kv_head) for case, _ in request.tasks}
    files = {path for path, _, _ in cases}
    line = (
        f"{len(cases)} KV heads of {', '.join(sorted(path.name for path in files)[:3])}"
        f"{', ...' if len(files) > 3 else ''}: {len(request.tasks)} query positions"
    )
    if request.positions_left_out:
        line += f", {SPACED_POSITIONS} of each (others: --positions all)"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line that says what was wrong; 130 after Ctrl-C."""
    try:
        request = read_request(argv)
        console = Console(quiet=request.json)
        with staged_folder(request.out) as folder:
            say_what_is_done(request, console)
            findings = analyze(request, folder)
    except AlignedKVError as error:
        print(f"analyze: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("analyze: stopped; nothing was written", file=sys.stderr)
        return 130
    if request.json:
        for summary in json_objects(findings):
            print(json.dumps(summary))
    else:
        print_tables(findings)
        console.print(
            f"Report: {request.out / 'report.html'}; per token: tokens.parquet, tokens.csv",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
