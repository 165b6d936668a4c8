"""The statistical bound: Theorems 6 and 7 at run time, Corollary 8 of theory.md.

Tokens that share a dither row may err alike, so sums are taken per dither class and squared after.
Class sums are linear in the weights: splits merge by rescaling and adding, like any other sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.plan import Decisions, Plan
from alignedkv.analysis.reading import Reading
from alignedkv.analysis.sampling import (
    bennett_bound,
    sampled_sums,
    second_order_factor,
)
from alignedkv.analysis.scores import PositionScores, log_sum_exp
from alignedkv.errors import SpecError

#: y of (5.3) as a share of the variance that one expects.
_PRIOR_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSums:
    """Sums of one quantity r over the tokens of every dither class [G, P].

    Attributes
    ----------
    linear
        Sums of p^U sigma r: V(r) is the sum of their squares.
    quadratic
        w_s, the sums of p^U gamma sigma^2 r: Q(r) follows from them.
    """

    linear: NDArray[np.float64]
    quadratic: NDArray[np.float64]

    def variance(self) -> NDArray[np.float64]:
        """V(r) of (5.1) [G]."""
        total: NDArray[np.float64] = np.square(self.linear).sum(axis=1)
        return total

    def second_order(self, deviations: float) -> NDArray[np.float64]:
        """Q(r) of (5.1) [G]."""
        w = self.quadratic
        norm = np.sqrt(np.square(w).sum(axis=1))
        q: NDArray[np.float64] = (
            w.sum(axis=1) + math.sqrt(2) * deviations * norm + deviations**2 * w.max(axis=1)
        )
        return q

    def __add__(self, other: ClassSums) -> ClassSums:
        """Sums of two sets of tokens, or of two quantities."""
        return ClassSums(
            linear=self.linear + other.linear, quadratic=self.quadratic + other.quadratic
        )

    def __mul__(self, factor: NDArray[np.float64]) -> ClassSums:
        """Sums of a multiple of the quantity, per head."""
        return ClassSums(
            linear=self.linear * factor[:, None], quadratic=self.quadratic * factor[:, None]
        )


def statistical_bound(
    reading: Reading, *, deviations: float, expected: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Corollary 8 in scalar form: R_t for |v_tj - o_j| [G].

    Parameters
    ----------
    reading : Reading
        Of a fixed or a settled plan.
    deviations : float
        z; the failure probability is (6D + 2NT + 1) exp(-z^2 / 2).
    expected : float64 array [G]
        The random part of the error, in standard deviations of the output, that one expects. It
        must not depend on the dither: take tau / z. A poor choice costs bits, not truth.

    Returns
    -------
    float64 array [G]
        Infinite where the theorem's denominator is not positive.

    Raises
    ------
    SpecError
        If planes were chosen from scores that lack them (theory.md 5.5 shows what then happens), or
        scores are capped: a capped error is no sum of independent terms.

    Notes
    -----
    (5.6) with r_t = R_t = a_t + rho, which bounds |v_tj - o_j| up to the bound itself.
    """
    scores, plan = reading.scores, reading.plan
    if plan.decisions not in (Decisions.FIXED, Decisions.SETTLED):
        raise SpecError(
            f"a statistical bound of a plan decided by {plan.decisions}: its planes depend on the "
            f"dither that they add; decide by {Decisions.SETTLED} or {Decisions.FIXED}"
        )
    if scores.encoded.case.softcap is not None:
        raise SpecError("a statistical bound of capped scores: take the deterministic bound")
    settled = plan.decisions is Decisions.SETTLED
    z = deviations
    weight = largest_weights(reading, z)
    row_size = scores.values.magnitude
    size = row_size + reading.spread[:, None]

    ones = class_sums(reading, weight, z)
    rows = class_sums(reading, weight * row_size, z)
    total = rows + ones * reading.spread
    spread_hint = np.maximum(plan.hint.spread, np.finfo(np.float64).tiny)
    prior = _PRIOR_SHARE * expected**2 if settled else None
    prior_of_one = None if prior is None else prior / spread_hint**2
    linear = deviations_times(total.variance(), z, prior)
    linear_of_one = deviations_times(ones.variance(), z, prior_of_one)

    left = 1 - 0.5 * (weight * reading.score_deviation**2).sum(axis=1) - linear_of_one
    denominator = left - ones.second_order(z)
    base = scores.base_error.max(axis=1)
    with np.errstate(over="ignore"):
        shifts = (np.expm1(scores.base_error) * weight * size).sum(axis=1)
    values = _value_part(reading, z) + np.exp(base) * shifts
    numerator = linear + total.second_order(z) + np.maximum(left, 0) * values
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.inf)


def largest_weights(reading: Reading, deviations: float) -> NDArray[np.float64]:
    """p^U: no exact weight is larger on the event |error of a score| <= z sigma [G, T].

    Notes
    -----
    Corollary 8 (i). A row that stopped has p <= theta / (sigma R) too, if the hint's log-sum-exp
    was not above log Z; if it may have been, by the factor that it may have been too large.
    """
    scores, plan = reading.scores, reading.plan
    reach = deviations * reading.score_deviation + scores.base_error
    lowest = log_sum_exp(reading.score - reach, scores.sinks)
    weight = np.exp(np.minimum(reading.score + reach - lowest[:, None], 0.0))
    if plan.decisions is not Decisions.SETTLED:
        return weight
    size = scores.values.magnitude + plan.hint.spread[:, None]
    with np.errstate(divide="ignore"):
        stopped = plan.theta[:, None] / (reading.score_deviation * size)
    too_high = np.maximum(plan.hint.log_z - lowest, 0.0)
    stopped = stopped * np.exp(too_high)[:, None]
    may_cap = (plan.key_used < scores.keys.stored) & ~scores.is_exact
    return np.where(may_cap, np.minimum(weight, stopped), weight)


def class_sums(reading: Reading, weight: NDArray[np.float64], deviations: float) -> ClassSums:
    """Class sums of weight times sigma and of weight times gamma sigma^2.

    Parameters
    ----------
    reading : Reading
    weight : float64 array [G, T]
        p^U r.
    deviations : float
        z.
    """
    scores, plan = reading.scores, reading.plan
    sigma = reading.score_deviation
    if plan.decisions is Decisions.SETTLED:
        stops = may_stop(scores, plan, deviations)
        quadratic = np.zeros_like(sigma)
        for n in range(scores.keys.stored):
            there = scores.score_deviation(n + 1)
            gamma = second_order_factor(deviations * there) + there / 2
            quadratic += np.where(stops[n], gamma * there**2, 0.0)
    else:
        quadratic = second_order_factor(deviations * sigma) * sigma**2
    classes, rows = scores.keys.classes, len(scores.keys.table)
    return ClassSums(
        linear=_by_class(weight * sigma, classes, rows),
        quadratic=_by_class(weight * quadratic, classes, rows),
    )


def may_stop(scores: PositionScores, plan: Plan, deviations: float) -> NDArray[np.bool_]:
    """Plane counts at which a row may have stopped, whatever the dither within z sigma [N, G, T].

    Notes
    -----
    Theorem 7 counts the second-order term once for each. The test of plane k says
    ``exp(score(k) + z sigma(k) - L) sigma(k-1) R > theta``; given what was read, the exact score
    lies within z sigma of the score used, and score(k) within z sigma(k) of that.
    """
    z, stored = deviations, scores.keys.stored
    used = np.maximum(plan.key_used, 1).astype(np.int64)[None] - 1
    sigma = np.stack([scores.score_deviation(n + 1) for n in range(stored)])
    score = np.take_along_axis(scores.planes, used, axis=0)[0]
    reach = z * np.take_along_axis(sigma, used, axis=0)[0] + 2 * scores.base_error
    size = scores.values.magnitude + plan.hint.spread[:, None]
    with np.errstate(divide="ignore"):
        need = np.log(plan.theta[:, None] / (sigma[:-1] * size)) + plan.hint.log_z[:, None]
    # Test k = n + 2 may fail, or hold, for some score within reach.
    fails = score - reach <= need
    holds = score + reach + 2 * z * sigma[1:] > need
    edge = np.ones((1, *score.shape), bool)
    stops = np.concatenate([fails, edge]) & np.concatenate([edge, holds])
    at_used = np.arange(stored)[:, None, None] == used
    possible: NDArray[np.bool_] = (stops | at_used) & ~scores.is_exact
    return possible


def _value_part(reading: Reading, deviations: float) -> NDArray[np.float64]:
    """(5.5), or with sampled rows the corollary of Theorem S1 [G]."""
    scores, plan = reading.scores, reading.plan
    p, error = reading.probability, reading.value_error
    skipped = plan.probability == 0
    classes, rows = scores.values.classes, len(scores.values.table)
    random = _by_class(p * np.where(skipped, 0.0, error), classes, rows)
    bound = bennett_bound(
        np.square(random).sum(axis=1) / 3,
        *sampled_sums(p, scores.values.largest_shown, plan.probability),
        deviations,
    )
    bias = np.where(scores.is_exact, 0.0, scores.value_bias)
    return bound + p @ np.where(skipped, error, bias)


def deviations_times(
    variance: NDArray[np.float64], z: float, prior: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """z sqrt(V), or for a settled plan z_V sqrt(V), (5.3), with y = prior [G]."""
    if prior is None:
        return z * np.sqrt(variance)
    y = np.maximum(prior, np.finfo(np.float64).tiny)
    inflated: NDArray[np.float64] = np.sqrt((variance + y) * (z**2 + np.log1p(variance / y)))
    return inflated


def _by_class(
    per_token: NDArray[np.float64], classes: NDArray[np.int64], rows: int
) -> NDArray[np.float64]:
    """Sums over the tokens of every class [G, P]."""
    return np.stack([np.bincount(classes, one_head, rows) for one_head in per_token])
