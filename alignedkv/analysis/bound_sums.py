"""The scalar sums of the deterministic bound and of the estimate, as kernels carry them.

A split of the tokens keeps its running maximum and weights ``w = exp(score - maximum)``; splits are
merged by rescaling (theory.md 4, "Merging").  Nothing here looks at a row twice: the price is R_t
in place of |v_tj - o_j| (theory.md (4.3), (5.7)).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.reading import Reading
from alignedkv.analysis.sampling import bennett_bound, sampled_sums

#: exp of this is still finite in float64.
_LARGEST_EXPONENT = 709.0
_SQUARES = ("m0", "m1", "m2", "value_variance", "sampled_variance")
_MAXIMA = ("sampled_largest",)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundSums:
    """Unnormalised sums over tokens [G]; names as in theory.md 4 and 5.4.

    Attributes
    ----------
    maximum
        Largest score; -inf of no tokens.
    weight
        l, the sum of the weights w.
    a0, a1, value_error, shrunk
        Sums of w phi(e), w phi(e) a, w delta and w exp(-e): A_0, A_1, E^V and S of (4.3).
    m0, m1, m2
        Sums of w^2 omega^2 a^i: M_i of (5.7), omega^2 = exp(sigma^2) - 1.
    value_variance
        Sum of w^2 delta^2 / 3 over value rows that are read, or may be.
    skipped
        Sum of w a over value rows that are skipped.
    second0, second1
        Sums of w sigma^2 and w sigma^2 a: the mean of the second-order term.
    sampled_variance, sampled_largest
        Vbar and M of Theorem S1, over value rows that are read by chance.
    """

    maximum: NDArray[np.float64]
    weight: NDArray[np.float64]
    a0: NDArray[np.float64]
    a1: NDArray[np.float64]
    value_error: NDArray[np.float64]
    shrunk: NDArray[np.float64]
    m0: NDArray[np.float64]
    m1: NDArray[np.float64]
    m2: NDArray[np.float64]
    value_variance: NDArray[np.float64]
    skipped: NDArray[np.float64]
    second0: NDArray[np.float64]
    second1: NDArray[np.float64]
    sampled_variance: NDArray[np.float64]
    sampled_largest: NDArray[np.float64]

    def scaled_to(self, maximum: NDArray[np.float64]) -> BoundSums:
        """The same sums for weights relative to another maximum."""
        factor = np.exp(self.maximum - maximum)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in values:
            values[name] = values[name] * (factor**2 if name in _SQUARES else factor)
        return BoundSums(**values | {"maximum": maximum})

    def normalised(self, sinks: NDArray[np.float64]) -> BoundSums:
        """Sums of p in place of w; a sink's logit joins the sum of weights, without error."""
        sink = np.exp(sinks - self.maximum)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["weight"] = self.weight + sink
        values["shrunk"] = self.shrunk + sink
        total = values["weight"]
        for name in values.keys() - {"maximum"}:
            values[name] = values[name] / (total**2 if name in _SQUARES else total)
        return BoundSums(**values)


def accumulate(reading: Reading, tokens: slice = slice(None)) -> BoundSums:
    """The sums over a split's tokens.

    Parameters
    ----------
    reading : Reading
    tokens : slice
        Of the visible tokens; default all.
    """
    scores, plan = reading.scores, reading.plan
    score = reading.score[:, tokens]
    maximum = score.max(axis=1, initial=-np.inf)
    relative = score - np.where(np.isfinite(maximum), maximum, 0.0)[:, None]
    weight = np.exp(relative)
    size = np.where(scores.is_exact, 0.0, scores.values.magnitude)[tokens]
    row_size = scores.values.magnitude[tokens]
    delta = reading.value_error[tokens]
    error, variance = reading.score_error[:, tokens], reading.score_deviation[:, tokens] ** 2
    grown = growth(relative, error)
    spread = squared_growth(relative, variance)
    skipped = (plan.probability == 0)[tokens]
    sampled_variance, sampled_largest = sampled_sums(
        weight, scores.values.largest_shown[tokens], plan.probability[tokens]
    )
    second = weight * variance
    return BoundSums(
        maximum=maximum,
        weight=weight.sum(axis=1),
        a0=grown.sum(axis=1),
        a1=grown @ row_size,
        value_error=weight @ delta,
        shrunk=np.exp(relative - error).sum(axis=1),
        m0=spread.sum(axis=1),
        m1=spread @ row_size,
        m2=spread @ row_size**2,
        value_variance=weight**2 @ np.where(skipped, 0.0, delta**2 / 3),
        skipped=weight @ np.where(skipped, size, 0.0),
        second0=second.sum(axis=1),
        second1=second @ row_size,
        sampled_variance=sampled_variance,
        sampled_largest=sampled_largest,
    )


def merge(first: BoundSums, second: BoundSums) -> BoundSums:
    """Join the sums of two splits."""
    maximum = np.maximum(first.maximum, second.maximum)
    one, two = first.scaled_to(maximum), second.scaled_to(maximum)
    joined = {}
    for field in fields(BoundSums):
        values = getattr(one, field.name), getattr(two, field.name)
        joined[field.name] = np.maximum(*values) if field.name in _MAXIMA else np.add(*values)
    return BoundSums(**joined | {"maximum": maximum})


def deterministic_bound(
    sums: BoundSums, spread: NDArray[np.float64], sinks: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Theorem 5 in scalar form, (4.3) [G].

    Parameters
    ----------
    sums : BoundSums
        Of all tokens.
    spread : float64 array [G]
        The output's largest distance from the mean of the values.
    sinks : float64 array [G]
    """
    p = sums.normalised(sinks)
    bound: NDArray[np.float64] = p.value_error + (p.a1 + (spread + p.value_error) * p.a0) / p.shrunk
    return bound


def estimate_bound(
    sums: BoundSums,
    spread: NDArray[np.float64],
    sinks: NDArray[np.float64],
    deviations: float,
) -> NDArray[np.float64]:
    """Estimate 9, (5.7), without mean correction; sampled rows by Theorem S1 [G].

    Parameters
    ----------
    sums, spread, sinks
        As in `deterministic_bound`.
    deviations : float
        z.
    """
    p = sums.normalised(sinks)
    variance = p.m2 + 2 * spread * p.m1 + spread**2 * p.m0 + p.value_variance
    random = bennett_bound(variance, p.sampled_variance, p.sampled_largest, deviations)
    bound: NDArray[np.float64] = random + p.skipped + p.second1 + spread * p.second0
    return bound


def growth(relative: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.float64]:
    """w (exp(e) - 1) for w = exp(relative): as one exponential where e is large."""
    weight = np.exp(relative)
    grown = weight * np.expm1(np.minimum(error, 1))
    large = error > 1
    if large.any():
        exponent = np.minimum(relative[large] + error[large], _LARGEST_EXPONENT)
        grown[large] = np.exp(exponent) - weight[large]
    return grown


def squared_growth(
    relative: NDArray[np.float64], variance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """w^2 omega^2 = w^2 (exp(sigma^2) - 1)."""
    return growth(2 * relative, variance)
