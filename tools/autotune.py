#!/usr/bin/env python
"""Find the fastest right kernel configuration for a GPU, and keep it found.

    python tools/autotune.py --tokens 32768 --batch 1 8          # sweep this GPU, keep the winners
    python tools/autotune.py --replay sweep.json --search tpe --trials 40 --seed 0
    python tools/autotune.py --explain --head-dim 256 --group 16
    python tools/autotune.py --report sweeps/*.json --out report

A sweep compiles candidates on all cores, checks each against the reference before its time counts,
and measures one at a time.  Winners go to the wisdom file of the GPU, which every launch consults.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from alignedkv.errors import AlignedKVError, TuningError
from alignedkv.kernels.config import CHOICES, STEP_TUNABLES, products
from alignedkv.kernels.legality import configurations, default_config, restrictions
from alignedkv.kernels.target import SM90, DeviceTarget
from alignedkv.kernels.tune.measure import obstacle
from alignedkv.kernels.tune.replay import replay
from alignedkv.kernels.tune.t4 import from_t4, to_t4
from alignedkv.kernels.tune.trials import Status, Sweep, fastest, write_whole
from alignedkv.kernels.tune.wisdom import merge, read, wisdom_path
from autotune_options import parse, spec_of
from autotune_sweep import describe, sweep_all, title_of

#: Rows of the table of a sweep.
TOP = 8


def run_sweep(options: argparse.Namespace) -> int:
    """Sweep this machine's GPU; exit code 1 where no configuration was right."""
    if reason := obstacle():
        print(
            f"autotune: {reason}: nothing to measure on; --replay FILE searches a recorded sweep",
            file=sys.stderr,
        )
        return 2
    sweeps = sweep_all(options, spec_of(options))
    present(options, sweeps)
    return int(any(fastest(sweep.trials) is None for sweep in sweeps))


def run_report(options: argparse.Namespace) -> int:
    """Show recorded sweeps."""
    present(options, [Sweep.load(path) for path in options.report])
    return 0


def present(options: argparse.Namespace, sweeps: Sequence[Sweep]) -> None:
    """Tables, or JSON, and the page."""
    if options.json:
        print(json.dumps([summary(sweep) for sweep in sweeps], indent=1))
    else:
        for sweep in sweeps:
            print("\n".join(table(sweep)))
    try:
        from autotune_page import page
    except ImportError as error:
        print(f"no page: {error}; --report makes it from the sweeps elsewhere", file=sys.stderr)
        return
    write_whole(options.out / "index.html", page(sweeps))
    print(f"page: {options.out / 'index.html'}", file=sys.stderr)


def summary(sweep: Sweep) -> dict[str, object]:
    """A sweep's outcome as JSON values."""
    ranked = sweep.ranked()
    default = sweep.trial_of(sweep.default)
    return {
        "problem": title_of(sweep.problem),
        "card": sweep.card,
        "trials": len(sweep.trials),
        "statuses": dict(Counter(str(trial.status) for trial in sweep.trials)),
        "failures": failures(sweep),
        "best_us": ranked[0].median_us if ranked else None,
        "best": asdict(ranked[0].config) if ranked else None,
        "default_us": default.median_us if default and default.times_us else None,
        "gain": sweep.gain,
    }


def failures(sweep: Sweep) -> dict[str, str]:
    """An example of every kind of failure: the configuration and the first line of the reason."""
    found: dict[str, str] = {}
    for trial in sweep.trials:
        if trial.status is not Status.OK:
            reason = trial.reason.partition("\n")[0]
            found.setdefault(str(trial.status), f"{describe(trial.config)}: {reason}")
    return found


def table(sweep: Sweep) -> list[str]:
    """The fastest of a sweep, and the default, as lines."""
    ranked = sweep.ranked()
    statuses = Counter(str(trial.status) for trial in sweep.trials)
    gain = "" if sweep.gain is None else f"; {sweep.gain:.3f} times as fast as the default"
    lines = [
        "",
        f"{title_of(sweep.problem)}  [{sweep.card}]",
        "  " + ", ".join(f"{count} {status}" for status, count in statuses.items()) + gain,
        *(f"  {status}, such as {example}" for status, example in failures(sweep).items()),
        f"  {'rank':>4} {'us':>9} {'spread':>7} {'read':>6} {'bound':>9} {'error':>9}  tunables",
    ]
    shown = list(enumerate(ranked, start=1))
    shown = shown[:TOP] + [pair for pair in shown[TOP:] if pair[1].config == sweep.default]
    for rank, trial in shown:
        facts = trial.facts
        mark = " (default)" if trial.config == sweep.default else ""
        lines.append(
            f"  {rank:4} {trial.median_us:9.2f} {trial.spread_us:7.2f} "
            f"{100 * facts.get('read_fraction', float('nan')):5.1f}% "
            f"{facts.get('bound', float('nan')):9.2g} {facts.get('error', float('nan')):9.2g}  "
            f"{describe(trial.config)}{mark}"
        )
    return lines


def run_replay(options: argparse.Namespace) -> int:
    """Search a recorded sweep."""
    sweep = Sweep.load(options.replay)
    found = replay(
        sweep, strategy=options.search, trials=options.trials, seed=options.seed, ahead=0
    )
    if options.json:
        print(json.dumps({
            "search": options.search,
            "seed": options.seed,
            "evaluations": found.evaluations,
            "space": found.space,
            "best_us": found.best.median_us,
            "best": asdict(found.best.config),
            "rank": found.rank,
            "slowdown": found.slowdown,
        }))  # fmt: skip
    else:
        print(title_of(sweep.problem))
        print(
            f"{options.search}, seed {options.seed}, {found.evaluations} of {found.space} "
            f"evaluations: best {found.best.median_us:.2f} us, rank {found.rank}, "
            f"{100 * (found.slowdown - 1):.2f} % above the fastest\n{describe(found.best.config)}"
        )
    return 0


def run_explain(options: argparse.Namespace) -> int:
    """How many configurations each restriction prunes, with an example."""
    spec, target = spec_of(options), _target()
    pruned: Counter[str] = Counter()
    example: dict[str, tuple[str, str]] = {}
    for config in products(STEP_TUNABLES):
        for reason in restrictions(spec, config, target):
            # What differs between configurations are the numbers.
            kind = " ".join(word for word in reason.split() if not word.rstrip(":").isdigit())
            pruned[kind] += 1
            example.setdefault(kind, (describe(config), reason))
    legal = sum(1 for _ in configurations(spec, target, STEP_TUNABLES))
    total = sum(1 for _ in products(STEP_TUNABLES))
    if options.json:
        facts = {"target": target.name, "total": total, "legal": legal, "pruned": pruned}
        print(json.dumps(facts | {"default": asdict(default_config(spec, target))}))
        return 0
    print(f"{spec}\n{target.name} ({target.arch}): {legal} of {total} configurations are legal")
    for name in STEP_TUNABLES:
        print(f"  {name}: {', '.join(map(str, CHOICES[name]))}")
    for kind, count in pruned.most_common():
        config, reason = example[kind]
        print(f"{count} pruned, such as {config}:\n  {reason}")
    print(f"default: {describe(default_config(spec, target))}")
    return 0


def _target() -> DeviceTarget:
    """The GPU of this machine, or an H100 where there is none."""
    if obstacle() is not None:
        return SM90
    from alignedkv.kernels.device import device_target

    return device_target(0)


def run_export_t4(options: argparse.Namespace) -> int:
    """A sweep as T4."""
    source, destination = options.export_t4
    write_whole(destination, json.dumps(to_t4(Sweep.load(source)), indent=1) + "\n")
    return 0


def run_import_t4(options: argparse.Namespace) -> int:
    """T4 as a sweep."""
    source, destination = options.import_t4
    try:
        content = json.loads(source.read_text())
    except (OSError, ValueError) as error:
        raise TuningError(f"{source} cannot be read ({error}): give a T4 file") from error
    from_t4(content).save(destination)
    return 0


def run_wisdom(options: argparse.Namespace) -> int:
    """List or merge winners."""
    path = options.wisdom or wisdom_path(_target())
    if options.import_wisdom is not None:
        if not options.import_wisdom.exists():
            raise TuningError(f"{options.import_wisdom}: no such file; give a wisdom file")
        merge(path, read(options.import_wisdom))
    if options.export_wisdom is not None:
        merge(options.export_wisdom, read(path))
    for winner in read(path):
        gain = winner.default_us / winner.median_us if winner.default_us else float("nan")
        spec = winner.spec
        print(
            f"T~2^{winner.tokens_bucket} B*Hkv~2^{winner.heads_bucket} D={spec.head_dim} "
            f"G={spec.group} {spec.bound}: {winner.median_us:.2f} us, {gain:.3f} times as fast as "
            f"the default, on {winner.data} data, {winner.card}, kernels {winner.source[:12]}: "
            f"{describe(winner.config)}"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line that says what was wrong."""
    options = parse(argv, description=__doc__)
    modes = {
        "explain": run_explain,
        "replay": run_replay,
        "report": run_report,
        "export_t4": run_export_t4,
        "import_t4": run_import_t4,
        "show_wisdom": run_wisdom,
        "import_wisdom": run_wisdom,
        "export_wisdom": run_wisdom,
    }
    chosen = next((mode for name, mode in modes.items() if getattr(options, name)), run_sweep)
    try:
        return chosen(options)
    except AlignedKVError as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autotune: stopped; a --journal resumes", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
