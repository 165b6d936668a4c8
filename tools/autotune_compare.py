#!/usr/bin/env python
"""Set our searches beside Kernel Tuner's, on one recorded sweep, without a GPU.

    python tools/autotune.py --export-t4 sweep.json t4.json
    python tools/autotune_compare.py t4.json --fraction 0.1 --seeds 20

Needs Kernel Tuner (``pip install kernel_tuner``), which alignedkv itself never does: its strategies
search the sweep in its simulation mode.  What is printed is the time that a strategy found over the
fastest recorded, the median, best and worst over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from alignedkv.errors import AlignedKVError
from alignedkv.kernels.config import CHOICES
from alignedkv.kernels.tune.replay import replay
from alignedkv.kernels.tune.t4 import from_t4
from alignedkv.kernels.tune.trials import Status, Sweep

STRATEGIES = (
    "random_sample",
    "bayes_opt",
    "genetic_algorithm",
    "simulated_annealing",
    "diff_evo",
    "pso",
    "mls",
    "greedy_ils",
)
OURS = ("random", "tpe")
KERNEL = "decode"
#: Kernel Tuner wants a problem size; nothing is launched.
PROBLEM_SIZE = 1
_US_PER_MS = 1e3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("t4", type=Path, help="a sweep exported by autotune.py --export-t4")
    parser.add_argument("--fraction", type=float, default=0.1, help="of the space, to be tried")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def cache_of(sweep: Sweep) -> dict[str, Any]:
    """The sweep as Kernel Tuner's cache file, which its simulation mode answers from."""
    timings = ("compile_time", "verification_time", "benchmark_time")
    entries: dict[str, dict[str, Any]] = {}
    for trial in sweep.trials:
        params = asdict(trial.config)
        outcome: dict[str, Any] = {"time": trial.median_us / _US_PER_MS}
        if trial.status is not Status.OK:
            outcome = {"time": "RuntimeFailedConfig", "__error__": "RuntimeFailedConfig"}
        key = ",".join(str(value) for value in params.values())
        entries[key] = params | outcome | dict.fromkeys((*timings, "strategy_time"), 0.0)
    return {
        "device_name": sweep.card,
        "kernel_name": KERNEL,
        "problem_size": PROBLEM_SIZE,
        "tune_params_keys": list(CHOICES),
        "tune_params": _space(sweep),
        "objective": "time",
        "cache": entries,
    }


def _space(sweep: Sweep) -> dict[str, list[Any]]:
    """The choices that occur in the sweep, by tunable."""
    seen = {name: {getattr(trial.config, name) for trial in sweep.trials} for name in CHOICES}
    return {name: [c for c in CHOICES[name] if c in seen[name]] for name in CHOICES}


def their_slowdown(sweep: Sweep, cache: Path, strategy: str, trials: int, seed: int) -> float:
    """What a strategy of Kernel Tuner finds, over the fastest recorded."""
    import kernel_tuner

    recorded = {tuple(asdict(trial.config).values()) for trial in sweep.trials}

    # A named function of one argument: it would take a lambda's source apart.
    def is_recorded(params: dict[str, Any]) -> bool:
        return tuple(params[name] for name in CHOICES) in recorded

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - its strategies draw from the global generator
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        results, _ = kernel_tuner.tune_kernel(
            KERNEL,
            'extern "C" void decode() {}',
            PROBLEM_SIZE,
            [],
            _space(sweep),
            restrictions=is_recorded,
            lang="C",
            strategy=strategy,
            strategy_options={"max_fevals": trials},
            cache=str(cache),
            simulation_mode=True,
            verbose=False,
            quiet=True,
        )
    times = [result["time"] for result in results if isinstance(result["time"], float)]
    return min(times) * _US_PER_MS / sweep.ranked()[0].median_us


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line that says what was wrong."""
    options = parse(argv)
    try:
        sweep = from_t4(json.loads(options.t4.read_text()))
    except (OSError, ValueError, AlignedKVError) as error:
        print(f"autotune_compare: {options.t4}: {error}", file=sys.stderr)
        return 2
    try:
        import kernel_tuner  # noqa: F401
    except ImportError as error:
        print(f"autotune_compare: {error}: pip install kernel_tuner", file=sys.stderr)
        return 2
    trials = max(1, int(options.fraction * len(sweep.trials)))
    rows: dict[str, list[float]] = {}
    for strategy in OURS:
        rows[f"alignedkv {strategy}"] = [
            replay(sweep, strategy=strategy, trials=trials, seed=seed).slowdown
            for seed in range(options.seeds)
        ]
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache.json"
        cache.write_text(json.dumps(cache_of(sweep)))
        for strategy in options.strategies:
            try:
                rows[f"kernel_tuner {strategy}"] = [
                    their_slowdown(sweep, cache, strategy, trials, seed)
                    for seed in range(options.seeds)
                ]
            except Exception as error:  # noqa: BLE001 - whatever a strategy of theirs stumbles over
                failed[f"kernel_tuner {strategy}"] = f"{type(error).__name__}: {error}"
    ordered = sorted(rows.items(), key=lambda row: statistics.median(row[1]))
    if options.json:
        facts = {"trials": trials, "space": len(sweep.trials), "slowdowns": dict(ordered)}
        facts |= {"failed": failed}
        print(json.dumps(facts))
        return 0
    print(
        f"{trials} of {len(sweep.trials)} evaluations, {options.seeds} seeds: % above the fastest"
    )
    print(f"{'':34} {'median':>8} {'best':>8} {'worst':>8}")
    for name, found in ordered:
        numbers = (statistics.median(found), min(found), max(found))
        print(f"{name:34} " + " ".join(f"{100 * (number - 1):8.2f}" for number in numbers))
    for name, reason in failed.items():
        print(f"{name:34} failed: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
