"""One problem tuned: compile, try, decide between the fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignedkv.errors import CompileError, TuningError
from alignedkv.kernels.compile import Resources
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.tune.decide import settle
from alignedkv.kernels.tune.isolated import LostProcessError
from alignedkv.kernels.tune.measure import Candidate
from alignedkv.kernels.tune.search import Report, search
from alignedkv.kernels.tune.trials import Status, Trial

#: Measuring processes lost one after the other until the fault is not the candidates'.
MAX_LOST = 5

Build = Callable[[DecodeConfig], Mapping[str, Resources]]
Ask = Callable[[Candidate], Trial]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long to search and how; the arguments of `search.search`.

    Attributes
    ----------
    strategy : str
    trials : int or None
    time_limit_s : float or None
    seed, ahead : int
    journal : Path or None
    name : str
    settle_rounds : int
        Rounds of successive halving at the end.
    """

    strategy: str = "tpe"
    trials: int | None = None
    time_limit_s: float | None = None
    seed: int = 0
    ahead: int = 0
    journal: Path | None = None
    name: str = "decode"
    settle_rounds: int = 3


class Tuner:
    """Tries configurations of one problem; what fails comes back as a trial.

    Parameters
    ----------
    tolerance : float
    build : function
        Compiles a configuration (`Builds.result`).
    ask : function
        Checks and times one (`Isolated.ask` of a `Session`).
    """

    def __init__(self, tolerance: float, build: Build, ask: Ask) -> None:
        self._tolerance, self._build, self._ask = tolerance, build, ask
        self._incumbent_us = math.inf
        self._lost = 0

    def evaluate(self, config: DecodeConfig) -> Trial:
        """Compile, check and time a configuration, as long as it may be the fastest.

        Raises
        ------
        TuningError
            If no measuring process survives: then it is not a matter of candidates.
        """
        trial = self._measure(
            Candidate(config=config, tolerance=self._tolerance, incumbent_us=self._incumbent_us)
        )
        self._incumbent_us = min(self._incumbent_us, trial.median_us)
        return trial

    def remeasure(self, trial: Trial, repeats: int) -> Trial:
        """Time a configuration anew, exactly so many times."""
        return self._measure(
            Candidate(config=trial.config, tolerance=self._tolerance, repeats=repeats, most=repeats)
        )

    def _measure(self, candidate: Candidate) -> Trial:
        config = candidate.config
        try:
            taken = self._build(config).values()
        except CompileError as error:
            return Trial(config=config, status=Status.COMPILE_FAILED, reason=str(error))
        try:
            trial = self._ask(candidate)
            self._lost = 0
        except LostProcessError as error:
            self._lost += 1
            if self._lost >= MAX_LOST:
                raise TuningError(
                    f"{MAX_LOST} measuring processes were lost in a row, the last because: {error}."
                    " See whether the GPU works; a journal resumes the search"
                ) from error
            status = Status.TIMED_OUT if error.timed_out else Status.LAUNCH_FAILED
            trial = Trial(config=config, status=status, reason=str(error))
        facts = {
            "registers": max((kernel.registers for kernel in taken), default=0),
            "spill_bytes": max((kernel.spill_store_bytes for kernel in taken), default=0),
        }
        return replace(trial, facts={**trial.facts, **facts})


def tune(
    space: Sequence[DecodeConfig],
    default: DecodeConfig,
    tuner: Tuner,
    budget: Budget,
    *,
    prepare: Callable[[Sequence[DecodeConfig]], None] | None = None,
    report: Report | None = None,
) -> list[Trial]:
    """Search a space, try the default in any case, and decide between the fastest.

    Returns
    -------
    list of Trial
        Of the whole study, once per configuration.
    """
    trials = search(
        space,
        tuner.evaluate,
        strategy=budget.strategy,
        trials=budget.trials,
        time_limit_s=budget.time_limit_s,
        seed=budget.seed,
        journal=budget.journal,
        name=budget.name,
        ahead=budget.ahead,
        prepare=prepare,
        report=report,
    )
    if all(trial.config != default for trial in trials):
        trials.append(tuner.evaluate(default))
    return settle(trials, tuner.remeasure, rounds=budget.settle_rounds)
