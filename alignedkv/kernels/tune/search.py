"""Which configuration to try next: grid, random or TPE.

The search is pure policy: it is given the legal configurations and a function that tries one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from alignedkv.errors import TuningError
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.tune.journal import Journal
from alignedkv.kernels.tune.study import Claim, Memory, Study
from alignedkv.kernels.tune.trials import Trial, fastest

STRATEGIES = ("grid", "random", "tpe")

#: A trial, the best so far, and the number of trials by this call.
Report = Callable[[Trial, Trial | None, int], None]


def search(
    legal: Sequence[DecodeConfig],
    evaluate: Callable[[DecodeConfig], Trial],
    *,
    strategy: str = "tpe",
    trials: int | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    journal: Path | None = None,
    name: str = "decode",
    ahead: int = 0,
    prepare: Callable[[Sequence[DecodeConfig]], None] | None = None,
    report: Report | None = None,
) -> list[Trial]:
    """Try configurations until trials, time or the space run out.

    Parameters
    ----------
    legal : sequence of DecodeConfig
        The space (`config.configurations`), never empty.
    evaluate : function
        Tries one configuration; failures come back as a `Trial` with their status.
    strategy : str
        "grid" tries all in order, "random" in an order drawn once, "tpe" what Optuna's estimator
        suggests.
    trials : int, optional
        Evaluations by this call, at most; None for the whole space.
    time_limit_s : float, optional
        No evaluation begins after it.
    seed : int
        Of random and TPE.
    journal : Path, optional
        File of the study; what it holds already is not tried again.
    name : str
        Of the study inside the journal: another problem, another name.
    ahead : int
        How many configurations beyond the one at hand `prepare` is told of.  TPE has to choose
        these before it knows what came out of the one at hand.
    prepare : function, optional
        Told what will be tried soon, so that it can be compiled meanwhile; returns at once.
    report : function, optional
        Called after each trial.

    Returns
    -------
    list of Trial
        All of the study, also those from earlier calls and other workers.

    Raises
    ------
    TuningError
        If the strategy is unknown, the space empty, the journal damaged, or Optuna missing where
        TPE or a journal is asked for.
    """
    study = _study(legal, strategy=strategy, seed=seed, journal=journal, name=name)
    started = time.monotonic()
    left = len(legal) if trials is None else trials
    waiting: list[Claim] = []
    done = 0

    def in_time() -> bool:
        return time_limit_s is None or time.monotonic() - started < time_limit_s

    try:
        while done < left and in_time():
            # Only a model's choices have to be claimed in advance to be known.
            wanted = min(1 + ahead, left - done) if strategy == "tpe" else 1
            if not waiting:
                waiting = _claims(study, wanted)
                if not waiting:
                    break
                if prepare is not None:
                    prepare([claim.config for claim in waiting] + study.upcoming(ahead))
            trial = evaluate(waiting[0].config)
            study.record(waiting.pop(0), trial)
            done += 1
            if report is not None:
                report(trial, fastest(study.trials()), done)
    finally:
        for claim in waiting:
            study.release(claim)
    return study.trials()


def _claims(study: Study, count: int) -> list[Claim]:
    claims: list[Claim] = []
    while len(claims) < count and (claim := study.claim()) is not None:
        claims.append(claim)
    return claims


def _study(
    legal: Sequence[DecodeConfig], *, strategy: str, seed: int, journal: Path | None, name: str
) -> Study:
    if strategy not in STRATEGIES:
        raise TuningError(f"strategy {strategy!r}: give one of {', '.join(STRATEGIES)}")
    if not legal:
        raise TuningError("no legal configuration: see the restrictions with --explain")
    order = list(legal)
    if strategy == "random":
        random.Random(seed).shuffle(order)
    if strategy != "tpe" and journal is None:
        return Memory(order)
    return Journal(order, model=strategy == "tpe", seed=seed, path=journal, name=name)
