"""A search on a recorded sweep: the same policy, answers from a file, no GPU."""

from __future__ import annotations

from dataclasses import dataclass

from alignedkv.errors import TuningError
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.tune.search import search
from alignedkv.kernels.tune.trials import Sweep, Trial, fastest


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a search found in a recorded sweep.

    Attributes
    ----------
    best : Trial
    rank : int
        Of the best among all recorded trials, 1 for the fastest.
    slowdown : float
        Its time over that of the fastest recorded.
    evaluations : int
    space : int
        Recorded trials.
    """

    best: Trial
    rank: int
    slowdown: float
    evaluations: int
    space: int


def replay(
    sweep: Sweep, *, strategy: str, trials: int | None = None, seed: int = 0, ahead: int = 0
) -> Replay:
    """Search a recorded sweep, and try its default in any case, as `tuner.tune` does.

    Parameters
    ----------
    sweep : Sweep
        Its trials are the space.
    strategy, trials, seed, ahead
        As for `search.search`.

    Raises
    ------
    TuningError
        If the sweep has no right trial, or the search found none.
    """
    ranked = sweep.ranked()
    if not ranked:
        raise TuningError("the sweep has no trial with a right answer: record it again")
    recorded = {trial.config: trial for trial in sweep.trials}

    def evaluate(config: DecodeConfig) -> Trial:
        return recorded[config]

    tried = search(
        list(recorded), evaluate, strategy=strategy, trials=trials, seed=seed, ahead=ahead
    )
    default = recorded.get(sweep.default)
    if default is not None and default not in tried:
        tried.append(default)
    best = fastest(tried)
    if best is None:
        raise TuningError(f"none of {len(tried)} trials had a right answer: allow more trials")
    return Replay(
        best=best,
        rank=1 + sum(trial.median_us < best.median_us for trial in ranked),
        slowdown=best.median_us / ranked[0].median_us,
        evaluations=len(tried),
        space=len(recorded),
    )
