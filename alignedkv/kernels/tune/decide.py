"""How often to repeat a measurement: until its spread allows the decision, and no longer.

Pure policy: what measures is a function given by the caller, so all of it runs without a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from alignedkv.kernels.tune.trials import Status, Trial

#: Standard errors by which two medians must differ to count as different.
APART = 3.0
#: Relative standard error of a median that is good enough to rank by.
PRECISION = 0.002
#: Quartile distance of a normal distribution in standard deviations, and the standard error of its
#: median in units of deviation / sqrt(n): sqrt(pi / 2).
_QUARTILES, _MEDIAN = 1.349, 1.2533


def standard_error(times_us: Sequence[float]) -> float:
    """Standard error of the median in us, from the quartiles: outliers do not count.

    Infinite with fewer than four times.
    """
    if len(times_us) < 4:
        return math.inf
    low, _, high = statistics.quantiles(times_us, n=4, method="inclusive")
    return _MEDIAN * (high - low) / _QUARTILES / math.sqrt(len(times_us))


def repeat_until_decided(
    sample: Callable[[int], Sequence[float]],
    *,
    incumbent_us: float = math.inf,
    first: int = 10,
    most: int = 40,
) -> tuple[float, ...]:
    """Repeat a measurement until it is precise, or surely loses, or has cost enough.

    Parameters
    ----------
    sample : function
        ``sample(n)`` measures n more times in us.
    incumbent_us : float
        Median of the best so far: whoever is slower beyond doubt needs no precision.
    first, most : int
        Repeats at the beginning, and at most.
    """
    times = list(sample(first))
    while len(times) < most:
        median, error = statistics.median(times), standard_error(times)
        if error <= PRECISION * median or median - APART * error > incumbent_us:
            break
        times += sample(min(len(times), most - len(times)))
    return tuple(times)


def contenders(trials: Sequence[Trial], *, most: int) -> list[Trial]:
    """Right trials that may be as fast as the fastest, given their spread; the fastest first.

    Two medians are one if they lie closer than `APART` standard errors of their difference, or than
    `PRECISION`.
    """
    right = sorted((t for t in trials if t.status is Status.OK), key=lambda t: t.median_us)
    if not right:
        return []
    best = right[0]

    def near(trial: Trial) -> bool:
        errors = (standard_error(trial.times_us), standard_error(best.times_us))
        return trial.median_us - best.median_us <= max(
            APART * math.hypot(*errors), PRECISION * best.median_us
        )

    return [trial for trial in right if near(trial)][:most]


def settle(
    trials: Sequence[Trial],
    remeasure: Callable[[Trial, int], Trial],
    *,
    repeats: int = 40,
    rounds: int = 4,
    most: int = 16,
) -> list[Trial]:
    """Decide between the fastest by successive halving.

    Every round measures those that are still in the race anew, one after the other and so under the
    same conditions, with twice the repeats of the round before; the slower half leaves, and so does
    whoever has become surely slower than the first.

    Parameters
    ----------
    trials : sequence of Trial
    remeasure : function
        ``remeasure(trial, repeats)`` -> the trial with times of this round; may fail.
    repeats : int
        Of the first round.
    rounds : int
        At most.
    most : int
        Contenders of the first round.

    Returns
    -------
    list of Trial
        All trials; those that raced have the times of their last round.
    """
    latest = {trial.config: trial for trial in trials}
    racing = contenders(trials, most=most)
    for number in range(rounds):
        if len(racing) < 2:
            break
        again = [remeasure(trial, repeats << number) for trial in racing]
        latest |= {trial.config: trial for trial in again}
        racing = contenders(again, most=-(-len(racing) // 2))
    return list(latest.values())
