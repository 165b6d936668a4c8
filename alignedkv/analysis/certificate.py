"""What a plan's output is worth: a bound on its error, and beside it the error that it has.

Three bounds, called by their names and never by each other's (theory.md):

- ``deterministic`` (Theorem 5): true whatever the data, the dither and the plan.
- ``statistical`` (Corollary 8, or Theorem 5's if that is smaller): fails with at most the stated
  probability over the dither, for fixed and settled plans.
- ``estimate`` (Estimate 9): the tightest and the default; not proved.

Each comes in two forms: ``scalar`` from the sums that a kernel carries (`bound_sums`), and
``channel`` from a second look at the value rows, tighter by up to a factor 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.bound_sums import (
    accumulate,
    deterministic_bound,
    estimate_bound,
    growth,
    squared_growth,
)
from alignedkv.analysis.plan import Plan
from alignedkv.analysis.reading import Reading, read
from alignedkv.analysis.sampling import bennett_bound
from alignedkv.analysis.scores import PositionScores
from alignedkv.analysis.statistical import statistical_bound
from alignedkv.errors import SpecError
from alignedkv.policy import BoundKind, PrecisionPolicy

Form = Literal["channel", "scalar"]
#: Relative error of a float64 sum of up to 2^20 weighted rows, generously.
_RESOLUTION = 2.0**-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Bound and error of one output per query head, absolute, in the largest component.

    Attributes
    ----------
    kind : BoundKind
    output, exact : float64 arrays [G, D]
    bound : float64 array [G]
        Infinite where nothing is claimed.
    error : float64 array [G]
        Largest |output - exact|.
    size : float64 array [G]
        Largest |exact|, to which tolerances are relative.
    tolerance : float
    resolution : float
        What the float64 arithmetic of output and exact may add to the error.
    """

    kind: BoundKind
    output: NDArray[np.float64]
    exact: NDArray[np.float64]
    bound: NDArray[np.float64]
    error: NDArray[np.float64]
    size: NDArray[np.float64]
    tolerance: float
    resolution: float

    @property
    def holds(self) -> NDArray[np.bool_]:
        """Whether the error is within the bound [G]."""
        return self.error <= self.bound + self.resolution

    @property
    def missed(self) -> NDArray[np.bool_]:
        """Whether the bound is above the tolerance [G]."""
        return self.bound > self.tolerance * self.size

    @property
    def relative_bound(self) -> NDArray[np.float64]:
        """Bound over the size of the output [G]."""
        return _ratio(self.bound, self.size)

    @property
    def relative_error(self) -> NDArray[np.float64]:
        """Error over the size of the output [G]."""
        return _ratio(self.error, self.size)


def certify(
    scores: PositionScores,
    plan: Plan,
    policy: PrecisionPolicy,
    *,
    form: Form = "channel",
    deviations: float | None = None,
    seed: int = 0,
) -> Certificate:
    """Read what the plan says; bound the error and measure it.

    Parameters
    ----------
    scores : PositionScores
    plan : Plan
    policy : PrecisionPolicy
        Its ``bound`` is the kind of bound; its ``tolerance`` is what may be missed.
    form : "channel" or "scalar"
        Of deterministic bounds and estimates.
    deviations : float, optional
        z in place of the policy's.
    seed : int
        Of the draws of sampled value rows.

    Raises
    ------
    SpecError
        If the policy's bound says nothing about such a plan.
    """
    reading = read(scores, plan, seed=seed)
    exact = scores.output
    error = np.abs(reading.output - exact).max(axis=1)
    return Certificate(
        kind=policy.bound,
        output=reading.output,
        exact=exact,
        bound=bound_of(reading, policy, form=form, deviations=deviations),
        error=error,
        size=scores.size,
        tolerance=policy.tolerance,
        resolution=_RESOLUTION * float(np.abs(scores.encoded.case.value[scores.first :]).max()),
    )


def bound_of(
    reading: Reading,
    policy: PrecisionPolicy,
    *,
    form: Form = "channel",
    deviations: float | None = None,
) -> NDArray[np.float64]:
    """Bound of what was read, from what was read [G]; parameters as in `certify`."""
    # Weights that underflow and score errors that overflow meet as 0 times infinity: no bound.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        bound = _bound_of(reading, policy, form, deviations)
    return np.where(np.isnan(bound), np.inf, bound)


def _bound_of(
    reading: Reading, policy: PrecisionPolicy, form: Form, deviations: float | None
) -> NDArray[np.float64]:
    scores = reading.scores
    case = scores.encoded.case
    z = policy.deviations(case.head_dim, case.tokens) if deviations is None else deviations
    sampled = bool(reading.plan.is_sampled.any())
    if policy.bound is BoundKind.ESTIMATE:
        if form == "channel":
            return estimate_per_channel(reading, z)
        return estimate_bound(accumulate(reading), reading.spread, scores.sinks, z)
    if policy.bound is BoundKind.STATISTICAL:
        bound = np.full(case.group, np.inf)
        if case.softcap is None:
            expected = policy.tolerance * scores.size / z
            bound = statistical_bound(reading, deviations=z, expected=expected)
        return bound if sampled else np.minimum(bound, _theorem_5(reading, form))
    if sampled:
        raise SpecError(
            "a deterministic bound of sampled value rows: chance has none; skip them instead"
        )
    return _theorem_5(reading, form)


def _theorem_5(reading: Reading, form: Form) -> NDArray[np.float64]:
    if form == "channel":
        return deterministic_per_channel(reading)
    return deterministic_bound(accumulate(reading), reading.spread, reading.scores.sinks)


def deterministic_per_channel(reading: Reading) -> NDArray[np.float64]:
    """Theorem 5, (4.2), largest over the channels [G]."""
    relative = reading.score - reading.log_z[:, None]
    grown = growth(relative, reading.score_error)
    delta = reading.value_error
    deviation, _ = reading.channel_sums(grown, np.zeros_like(grown), delta)
    values = reading.probability @ delta
    sink = np.exp(reading.scores.sinks - reading.log_z)
    shrunk = np.exp(relative - reading.score_error).sum(axis=1) + sink
    scores_part = deviation.max(axis=1) + grown.sum(axis=1) * values
    bound: NDArray[np.float64] = values + scores_part / shrunk
    return bound


def estimate_per_channel(reading: Reading, deviations: float) -> NDArray[np.float64]:
    """Estimate 9 with |v_tj - o_j| in place of R_t, largest over the channels [G].

    Parameters
    ----------
    reading : Reading
    deviations : float
        z.
    """
    plan, p = reading.plan, reading.probability
    sums = accumulate(reading).normalised(reading.scores.sinks)
    relative = reading.score - reading.log_z[:, None]
    variance = reading.score_deviation**2
    unknown = np.where(reading.row_factor > 0, 0.0, reading.scores.values.magnitude)
    second, random = reading.channel_sums(p * variance, squared_growth(relative, variance), unknown)
    random += sums.value_variance[:, None]
    spread = bennett_bound(
        random, sums.sampled_variance[:, None], sums.sampled_largest[:, None], deviations
    )
    skipped = p @ np.where(plan.probability == 0, reading.value_error, 0.0)
    bound: NDArray[np.float64] = (spread + second).max(axis=1) + skipped
    return bound


def _ratio(amount: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """amount / size, and 0 / 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(amount == 0, 0.0, amount / size)
