"""The sums of a decode step, their merging over splits, and the bounds that follow from them.

A split of a KV head's tokens leaves sums over its tokens, unnormalised: weights are
``exp(score - top)`` with the split's own largest score.  Everything a bound needs is such a sum, so
splits merge exactly (theory.md 4, "Merging"), and a bound is a formula in normalised sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignedkv.policy import BoundKind

Float = NDArray[np.float64]

#: The y of (5.3) is this share of the variance that would use up the tolerance: so far below what
#: is expected that z_V^2 = z^2 + ln(1 + V/y), little for much (V/y = 10 or 1000 differ by 3 %).
VARIANCE_FLOOR = 2.0**-10
#: A first-plane prefix is at most half a step beyond the row's magnitude: 8 g against 7.5 g
#: (a+ of sampling.md, Theorem S1).
PREFIX_EXCESS = 16.0 / 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over the tokens of a split, for the G heads of a KV head.

    Attributes
    ----------
    top : float64 array [G]
        m, the largest score; -inf where the split has no token.
    linear, square, largest : dict of float64 arrays [G, ...]
        Sums that are homogeneous in the weights of degree 1 and 2, and maxima of degree 1.
    extreme : dict of float64 arrays [G]
        Maxima that do not contain a weight.
    """

    top: Float
    linear: dict[str, Float]
    square: dict[str, Float]
    largest: dict[str, Float]
    extreme: dict[str, Float]


def merge(splits: list[Sums]) -> Sums:
    """The sums of all splits together."""
    top = np.max([split.top for split in splits], axis=0)
    # A split without tokens has top -inf and zero sums; where all are empty any factor will do.
    factor = [np.exp(s.top - np.where(np.isneginf(top), 0.0, top)) for s in splits]

    def scaled(name: str, key: str, power: int) -> list[Float]:
        parts = [getattr(split, name)[key] for split in splits]
        return [(_along(f, p) ** power) * p for f, p in zip(factor, parts, strict=True)]

    first = splits[0]
    return Sums(
        top=top,
        linear={key: np.sum(scaled("linear", key, 1), axis=0) for key in first.linear},
        square={key: np.sum(scaled("square", key, 2), axis=0) for key in first.square},
        largest={key: np.max(scaled("largest", key, 1), axis=0) for key in first.largest},
        extreme={key: np.max([s.extreme[key] for s in splits], axis=0) for key in first.extreme},
    )


def normalise(sums: Sums, total: Float) -> Sums:
    """Divide by the softmax denominator [G] as each sum's degree asks."""
    return Sums(
        top=sums.top,
        linear={key: part / _along(total, part) for key, part in sums.linear.items()},
        square={key: part / total**2 for key, part in sums.square.items()},
        largest={key: part / total for key, part in sums.largest.items()},
        extreme=sums.extreme,
    )


def bound(
    kind: BoundKind,
    sums: Sums,
    *,
    deviations: float,
    tolerance: float,
    sink_weight: Float,
    spread_hint: Float,
    spread: Float,
    mean_size: float,
    sampled: bool,
) -> Float:
    """Bound on the error of each head's output [G].

    Parameters
    ----------
    kind : BoundKind
    sums : Sums
        Normalised.
    deviations : float
        z.
    tolerance : float
        Only fixes the y of (5.3) before the step.
    sink_weight : float64 array [G]
        p of the sink logit.
    spread_hint, spread : float64 array [G]
        rho as the step was told it, and as it came out.
    mean_size : float
        max_j |value_mean_j|.
    sampled : bool
        Whether value rows were sampled.
    """
    if kind is BoundKind.ESTIMATE:
        return estimate(sums, z=deviations, hint=spread_hint, spread=spread, sampled=sampled)
    certain = deterministic(sums, sink_weight=sink_weight, spread=spread)
    if kind is BoundKind.DETERMINISTIC:
        return certain
    likely = statistical(
        sums,
        z=deviations,
        tolerance=tolerance,
        sink_weight=sink_weight,
        hint=spread_hint,
        spread=spread,
        mean_size=mean_size,
        sampled=sampled,
    )
    # Where sampling left rows out, Theorem 5 knows nothing of the output that was computed.
    return likely if sampled else np.minimum(likely, certain)


def estimate(sums: Sums, *, z: float, hint: Float, spread: Float, sampled: bool) -> Float:
    """Estimate 9, (5.7).

    Notes
    -----
    The second-order sum holds the bias that the mean correction leaves
    (`reference_sums.mean_correction`).
    R = a + rho was formed with the hint: where the spread came out larger, every R is at most
    spread / hint times too small, and the terms that hold it are multiplied by that.
    With sampled rows (sampling.md 1, Corollary) beta replaces z sqrt(G) and the skipped sum.
    """
    stale = np.where(spread > hint, spread / hint, 1.0)
    variance = stale**2 * sums.square["key"] + sums.square["value"]
    second = stale * sums.linear["second"]
    if sampled:
        return _sampling(variance, sums, z) + second
    return z * np.sqrt(variance) + sums.linear["skipped"] + second


def deterministic(sums: Sums, *, sink_weight: Float, spread: Float) -> Float:
    """Theorem 5 in its scalar form (4.3); the sink is a token without error."""
    value = sums.linear["value_error"]
    smallest = sums.linear["smallest"] + sink_weight
    a0, a1 = sums.linear["score_error"], sums.linear["score_error_size"]
    return value + (a1 + (spread + value) * a0) / smallest


def statistical(
    sums: Sums,
    *,
    z: float,
    tolerance: float,
    sink_weight: Float,
    hint: Float,
    spread: Float,
    mean_size: float,
    sampled: bool,
) -> Float:
    """Corollary 8 under the settled rule, in scalar form: R_t = a_t + ||o - mean|| for |v - o|.

    Notes
    -----
    No mean correction is applied (kappa = 0), which makes two terms of Theorem 7 vanish:
    the sigma / 2 of gamma_t and the (1/2) sum p sigma^2 of Delta.

    z_V depends on V, and V on the unknown error X through |v - o| <= R + X.  With
    F(x) = z_V sqrt(V) = ((x^2 + y)(z^2 + ln(1 + x^2/y)))^(1/2) at x = sqrt(V), the slope of F is
    below sqrt(l) + 1/sqrt(l), l = z^2 + ln(1 + x^2/y) at the largest x possible, which follows
    from X <= ||o^ - mean|| + ||o - mean||.  So (5.6) holds with that slope for z_V in its
    denominator.
    """
    p_upper = 1.0 / (sums.linear["smallest_likely"] + sink_weight)  # (4.4), z sigma for e
    rho = spread[:, None]

    def with_size(name: str) -> Float:
        return _along(p_upper, rho) * (sums.linear[name + "_size"] + rho * sums.linear[name])

    linear = _norm(with_size("class_linear"))
    linear_one = p_upper * _norm(sums.linear["class_linear"])
    quadratic = _chi_square(with_size("class_square"), z)
    quadratic_one = _chi_square(_along(p_upper, rho) * sums.linear["class_square"], z)

    floor_one = VARIANCE_FLOOR * (tolerance / z) ** 2
    floor = floor_one * hint**2
    delta = 1.0 - _mixture(linear_one, np.full_like(hint, floor_one), z)
    farthest = spread + np.maximum(sums.extreme["size"], mean_size)
    level = z * z + np.log1p((linear + farthest * linear_one) ** 2 / floor)
    slope = np.sqrt(level) + 1.0 / np.sqrt(level)

    variance = (sums.linear["class_value"] ** 2).sum(axis=-1) / 3.0
    if sampled:
        value = _sampling(variance, sums, z)
    else:
        value = z * np.sqrt(variance) + sums.linear["skipped"]
    value = value + sums.linear["value_base"]

    room = delta - slope * linear_one - quadratic_one
    random = (_mixture(linear, floor, z) + quadratic + delta * value) / room
    random = np.where((delta > 0) & (room > 0), random, np.inf)
    # The shifts that are not random: o and o deg of theory.md 5.1, by Theorem 4.
    grown = np.exp(sums.extreme["shift"]) * p_upper
    shift, shift_size = grown * sums.linear["shift"], grown * sums.linear["shift_size"]
    return random * (1.0 + shift) + shift_size + spread * shift


def sampling_bound(variance: Float, sampled: Float, largest: Float, z: float) -> Float:
    """beta(G; V, M) of (S2): Bennett's form at the best of 48 slopes, or Bernstein's if smaller.

    Every slope b > 0 gives a bound; the best one lies below z / sqrt(G + V), where it is without
    the third and higher moments.

    Parameters
    ----------
    variance, sampled, largest : float64 array [G]
        G, the sub-Gaussian proxy of the rest; V and M of Theorem S1.
    """
    total = variance + sampled
    bernstein = z**2 * largest / 6 + np.sqrt(z**4 * largest**2 / 36 + z**2 * total)
    positive = np.where(total > 0, total, 1.0)
    b = z / np.sqrt(positive) * np.exp2(-np.arange(48.0) / 8)[:, None]
    bennett = b * variance / 2 + b * sampled * curvature(b * largest) + z**2 / (2 * b)
    return np.where(total > 0, np.minimum(bernstein, bennett.min(axis=0)), bernstein)


def curvature(x: Float) -> Float:
    """Gamma(x) = (e^x - 1 - x) / x^2, 1/2 at 0, for x >= 0."""
    series = 0.5 + x / 6 + x**2 / 24 + x**3 / 120 + x**4 / 720
    safe = np.where(x > 0.01, x, 1.0)
    direct = (np.expm1(safe) - safe) / safe**2
    return np.where(x > 0.01, direct, series)


def _sampling(variance: Float, sums: Sums, z: float) -> Float:
    excess = PREFIX_EXCESS
    sampled, largest = sums.square["sampled"], sums.largest["sampled"]
    return sampling_bound(variance, excess**2 * sampled, excess * largest, z)


def _mixture(x: Float, floor: Float, z: float) -> Float:
    """z_V sqrt(V) of (5.3) at V = x^2; inf where nothing was known to fix y by."""
    return np.where(floor > 0, np.sqrt((x**2 + floor) * (z * z + np.log1p(x**2 / floor))), np.inf)


def _chi_square(w: Float, z: float) -> Float:
    """Q of (5.1) from its class sums [G, P]: Laurent and Massart's tail of sum w_s chi^2_1."""
    tail: Float = w.sum(axis=-1) + np.sqrt(2.0) * z * _norm(w) + z * z * w.max(axis=-1)
    return tail


def _norm(classes: Float) -> Float:
    root: Float = np.sqrt((classes**2).sum(axis=-1))
    return root


def _along(per_head: Float, like: Float) -> Float:
    """A number per head, shaped to multiply [G, ...]."""
    return per_head.reshape(per_head.shape[:1] + (1,) * (like.ndim - 1))
