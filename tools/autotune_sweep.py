"""A GPU swept: problems, their measuring process, sweeps and winners.  A part of `autotune.py`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alignedkv.errors import TuningError
from alignedkv.kernels.codegen import source_digest
from alignedkv.kernels.config import STEP_TUNABLES, DecodeConfig
from alignedkv.kernels.device import device_target
from alignedkv.kernels.legality import configurations, default_config
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget
from alignedkv.kernels.tune.builds import Builds
from alignedkv.kernels.tune.data import Inputs, synthesise, tiled
from alignedkv.kernels.tune.isolated import Isolated
from alignedkv.kernels.tune.measure import Candidate, Session, versions
from alignedkv.kernels.tune.trials import Problem, Sweep, Trial, fastest, problem_facts
from alignedkv.kernels.tune.tuner import Budget, Tuner, tune
from alignedkv.kernels.tune.wisdom import merge, ranking, winner_of, wisdom_path

CAPTURED = "captured"
#: Seconds until a measuring process must be ready, and answer: one that hangs is ended then.
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 15.0
#: Seconds between lines of progress, and between writings of what is known so far.
PROGRESS_S = 5.0


def sweep_all(options: argparse.Namespace, spec: DecodeSpec) -> list[Sweep]:
    """Sweep every size that was asked for; sweep files and winners are kept as they come."""
    target = device_target(options.device)
    space = chosen_space(spec, target, options.set)
    sweeps: list[Sweep] = []
    with Builds(spec, target.arch, workers=options.jobs) as builds:
        for tokens in options.tokens:
            for batch in options.batch:
                problem = Problem(
                    spec=spec,
                    batch=batch,
                    kv_heads=options.kv_heads,
                    tokens=tokens,
                    tolerance=options.tolerance[0],
                    data=options.data[0],
                    seed=options.seed,
                )
                found = _sweep_sizes(options, problem, target, space, builds)
                sweeps += found
                _keep_winner(options, target, found)
    return sweeps


def chosen_space(
    spec: DecodeSpec, target: DeviceTarget, fixed: dict[str, str]
) -> list[DecodeConfig]:
    """The legal configurations of a step that have the fixed tunables' values."""
    wanted = DecodeConfig.from_settings(fixed)
    return [
        config
        for config in configurations(spec, target, STEP_TUNABLES)
        if all(getattr(config, name) == getattr(wanted, name) for name in fixed)
    ]


def _sweep_sizes(
    options: argparse.Namespace,
    problem: Problem,
    target: DeviceTarget,
    space: Sequence[DecodeConfig],
    builds: Builds,
) -> list[Sweep]:
    """Search on the first data at the first tolerance; on others try the fastest of these."""
    sweeps: list[Sweep] = []
    default = default_config(problem.spec, target)
    if options.search != "tpe":
        builds.announce([default, *space])
    for data in options.data:
        here = replace(problem, data=data)
        make = partial(make_session, here, options.captured, options.device)
        with Isolated[Candidate, Trial](
            make, start_timeout_s=START_TIMEOUT_S, timeout_s=ANSWER_TIMEOUT_S
        ) as session:
            session.start()
            for tolerance in options.tolerance:
                there = replace(here, tolerance=tolerance)
                tuner = Tuner(tolerance, builds.result, session.ask)
                budget, candidates = _budget(options, there, target, space, sweeps, default)
                kept = partial(
                    Sweep,
                    problem=there,
                    card=target.name,
                    arch=target.arch,
                    source=source_digest(),
                    versions=versions(),
                    command=options.command,
                    default=default,
                )
                path = options.out / sweep_name(there)
                trials = tune(
                    candidates,
                    default,
                    tuner,
                    budget,
                    prepare=builds.announce,
                    report=progress(there, len(candidates), kept, path),
                )
                sweep = kept(trials=tuple(trials))
                sweep.save(path)
                sweeps.append(sweep)
    return sweeps


def _budget(
    options: argparse.Namespace,
    problem: Problem,
    target: DeviceTarget,
    space: Sequence[DecodeConfig],
    sweeps: Sequence[Sweep],
    default: DecodeConfig,
) -> tuple[Budget, Sequence[DecodeConfig]]:
    facts = json.dumps([problem_facts(problem), target.name, source_digest(), repr(space)])
    budget = Budget(
        strategy=options.search,
        trials=options.trials,
        time_limit_s=options.time_limit,
        seed=options.seed,
        ahead=options.ahead if options.search == "tpe" else 4 * (options.jobs or 8),
        journal=options.journal,
        name=hashlib.sha256(facts.encode()).hexdigest()[:16],
    )
    if not sweeps:
        return budget, space
    best = [config for config, _ in ranking(sweeps[:1])[: options.shortlist]]
    return replace(budget, strategy="grid", trials=None), list(dict.fromkeys([default, *best]))


def make_session(problem: Problem, captured: Path | None, device: int) -> Session:
    """Called in the measuring process."""
    return Session(problem, partial(make_inputs, problem, captured), device=device)


def make_inputs(problem: Problem, captured: Path | None, tokens: int, xp: Any) -> Inputs:
    """Inputs of the problem's kind; ``captured`` defaults to the sample that comes with us.

    Raises
    ------
    TuningError
        If captured heads are not of the spec's shape.
    """
    spec = problem.spec
    if problem.data != CAPTURED:
        return synthesise(
            problem.data,
            tokens=tokens,
            batch=problem.batch,
            kv_heads=problem.kv_heads,
            group=spec.group,
            head_dim=spec.head_dim,
            seed=problem.seed,
            xp=xp,
        )
    from alignedkv.analysis.case_files import find_cases, sample_path

    cases = [case.load() for case in find_cases(captured or sample_path())]
    group, _, head_dim = cases[0].query.shape
    if (group, head_dim) != (spec.group, spec.head_dim):
        raise TuningError(
            f"captured heads have {group} queries per KV head and {head_dim} channels: give "
            f"--group {group} --head-dim {head_dim}"
        )
    seen = [int(case.positions[-1]) + 1 for case in cases]
    return tiled(
        [
            (case.key[:end], case.value[:end], case.query)
            for case, end in zip(cases, seen, strict=True)
        ],
        tokens=tokens,
        batch=problem.batch,
        kv_heads=problem.kv_heads,
        scaling=cases[0].scaling,
        xp=xp,
    )


def sweep_name(problem: Problem) -> str:
    """File of a sweep: spec, sizes, data and tolerance."""
    spec = problem.spec
    return (
        f"D{spec.head_dim}-G{spec.group}-T{problem.tokens}-B{problem.batch}-{problem.data}-"
        f"{problem.tolerance:.3g}.json"
    )


def title_of(problem: Problem) -> str:
    """The problem in words."""
    return (
        f"T={problem.tokens}, B={problem.batch}, Hkv={problem.kv_heads}, "
        f"D={problem.spec.head_dim}, G={problem.spec.group}, {problem.data} scores, "
        f"tolerance {problem.tolerance:.3g}"
    )


def progress(
    problem: Problem, size: int, kept: Callable[..., Sweep], path: Path
) -> Callable[[Trial, Trial | None, int], None]:
    """Lines with the best so far, and a file with what is known so far."""
    print(f"{title_of(problem)}: {size} configurations", flush=True)
    seen: list[Trial] = []
    begun = spoken = time.monotonic()

    def report(trial: Trial, best: Trial | None, done: int) -> None:
        nonlocal spoken
        seen.append(trial)
        now = time.monotonic()
        if now - spoken < PROGRESS_S:
            return
        spoken = now
        leader = f"best {best.median_us:.2f} us {describe(best.config)}" if best else "none right"
        print(f"  {done} of {size}, {now - begun:.0f} s, {leader}", file=sys.stderr, flush=True)
        kept(trials=tuple(seen)).save(path)

    return report


def describe(config: DecodeConfig) -> str:
    """The tunables of a step on one line."""
    return " ".join(f"{name}={_short(getattr(config, name))}" for name in STEP_TUNABLES)


def _short(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _keep_winner(
    options: argparse.Namespace, target: DeviceTarget, sweeps: Sequence[Sweep]
) -> None:
    """Merge the winner over all data at the first tolerance into the wisdom file."""
    if options.no_wisdom:
        return
    same = list(_at_first_tolerance(options, sweeps))
    if any(fastest(sweep.trials) is None for sweep in same):
        print("  no right answer: nothing is kept", file=sys.stderr)
        return
    path = options.wisdom or wisdom_path(target)
    merge(path, [winner_of(same)])
    print(f"  winner kept in {path}")


def _at_first_tolerance(options: argparse.Namespace, sweeps: Sequence[Sweep]) -> Iterator[Sweep]:
    return (s for s in sweeps if s.problem.tolerance == options.tolerance[0])
