"""What a split adds up: softmax denominator, output, and everything that its bound needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.arrays import StepArguments
from alignedkv.kernels.reference_bounds import Sums, curvature
from alignedkv.kernels.reference_plan import ENCODER_VALUE, HeadHints, Plan, Scores
from alignedkv.kernels.reference_rows import Float, HeadRows
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import DITHER_FRACTION_BITS
from alignedkv.policy import BoundKind


def add_up(
    spec: DecodeSpec,
    arguments: StepArguments,
    rows: HeadRows,
    scores: Scores,
    plan: Plan,
    hints: HeadHints,
) -> Sums:
    """The sums of one split of one KV head.

    Notes
    -----
    Every weight is exp(score - `mean_correction`).  Rows kept exact have no error terms.  A value
    row that is left to chance counts as read with one plane, whichever way the draw went: the two
    errors of (S1), of the draw and of the plane, are bounded apart (sampling.md 1, Corollary).
    """
    at = plan.used[None] - 1
    score = np.take_along_axis(scores.value, at, axis=0)[0]
    sigma = np.take_along_axis(scores.deviation, at, axis=0)[0]
    worst = np.take_along_axis(scores.worst, at, axis=0)[0]
    correction, bias = mean_correction(spec, sigma)
    score = score - correction
    top = score.max(axis=1, initial=-np.inf)
    weight = np.exp(score - np.where(np.isneginf(top), 0.0, top)[:, None])

    live = ~rows.is_exact
    size = rows.values.magnitude
    skipped = live & (plan.values == 0) & (plan.chance == 1)
    sampled = plan.chance < 1
    planes = np.where(sampled, 1, plan.values)
    steps = np.array([rows.values.half_step(n) for n in range(spec.stored_planes + 1)])
    half = np.take_along_axis(steps, planes[None], axis=0)[0] * live

    linear = {
        "weight": weight.sum(axis=1),
        "output": weight @ (_values(spec, rows, plan) / plan.chance[:, None]),
    }
    square: dict[str, Float] = {}
    largest: dict[str, Float] = {}
    extreme: dict[str, Float] = {}
    if spec.sample_values:
        reach = weight * size
        square["sampled"] = (reach**2 * (1.0 / plan.chance - 1.0)).sum(axis=1)
        largest["sampled"] = (reach / plan.chance * sampled).max(axis=1, initial=0.0)
    else:
        linear["skipped"] = weight @ (size * skipped)

    if spec.bound is BoundKind.ESTIMATE:
        reach = size + hints.spread[:, None]
        square["key"] = (weight**2 * np.expm1(sigma**2) * reach**2).sum(axis=1)
        square["value"] = (weight**2) @ (half * ~skipped) ** 2 / 3.0
        linear["second"] = (weight * bias * reach).sum(axis=1)
    else:
        error = worst + scores.shift
        grown = weight * np.expm1(error)
        linear["score_error"] = grown.sum(axis=1)
        linear["score_error_size"] = grown @ size
        linear["value_error"] = weight @ ((half + ENCODER_VALUE * rows.values.unit) * live)
        linear["smallest"] = (weight * np.exp(-error)).sum(axis=1)
    if spec.bound is BoundKind.STATISTICAL:
        linear |= _class_sums(spec, arguments, rows, scores, plan, hints, top)
        linear["class_value"] = _per_class(spec, rows, weight * half * ~skipped)
        base = 2.0 ** -(DITHER_FRACTION_BITS + 1) + ENCODER_VALUE
        linear["value_base"] = weight @ (base * rows.values.unit * live)
        extreme["size"] = np.full(len(top), size.max(initial=0.0))
        extreme["shift"] = scores.shift.max(axis=1, initial=0.0)
    return Sums(top=top, linear=linear, square=square, largest=largest, extreme=extreme)


def mean_correction(spec: DecodeSpec, sigma: Float) -> tuple[Float, Float]:
    """kappa of theory.md 5.1, and the relative bias that a weight may have with it [G, T].

    Notes
    -----
    Under an estimate kappa = sigma^2 / 2: exp(error) is that much larger than 1 on average, but for
    sigma^4 / 20 of itself.  Without it the bias is sigma^2 (theory.md 5.4), as under a softcap,
    behind which errors have neither that mean nor that deviation.  The theorems of the other bounds
    are used with kappa = 0.
    """
    if spec.bound is BoundKind.ESTIMATE and not spec.softcap:
        return sigma**2 / 2.0, sigma**4 / 20.0
    return np.zeros_like(sigma), sigma**2


def _values(spec: DecodeSpec, rows: HeadRows, plan: Plan) -> Float:
    """Each row's value as its planes tell it, less the mean; 0 where it was not read [T, D]."""
    prefixes = [rows.values.prefix(n)[:, : spec.head_dim] for n in range(spec.stored_planes + 1)]
    values = np.zeros_like(prefixes[0])
    for n, prefix in enumerate(prefixes):
        values[plan.values == n] = prefix[plan.values == n]
    values[rows.is_exact] = rows.exact_values - rows.value_mean
    return values


def _class_sums(
    spec: DecodeSpec,
    arguments: StepArguments,
    rows: HeadRows,
    scores: Scores,
    plan: Plan,
    hints: HeadHints,
    top: Float,
) -> dict[str, Float]:
    """The sums of Corollary 8, with exp(score + z sigma - top) for p: see `statistical`.

    Notes
    -----
    p^U may use every plane that was read, used or not: the event |eps(k)| <= z sigma(k) holds for
    all of them.
    """
    z = arguments.deviations
    size = rows.values.magnitude
    at = np.maximum(plan.keys, 1)[None, None] - 1
    at = np.broadcast_to(at, (1, *plan.used.shape))
    score = np.take_along_axis(scores.value, at, axis=0)[0]
    spread = z * np.take_along_axis(scores.deviation, at, axis=0)[0]
    centre = score - np.where(np.isneginf(top), 0.0, top)[:, None]
    upper = np.exp(centre + spread)

    sigma = np.take_along_axis(scores.deviation, plan.used[None] - 1, axis=0)[0]
    one = upper * sigma
    two = upper * _stops(scores, plan, hints, score, spread, size, z)
    shift = upper * np.expm1(scores.shift)
    return {
        "smallest_likely": np.exp(centre - spread).sum(axis=1),
        "class_linear": _per_class(spec, rows, one),
        "class_linear_size": _per_class(spec, rows, one * size),
        "class_square": _per_class(spec, rows, two),
        "class_square_size": _per_class(spec, rows, two * size),
        "shift": shift.sum(axis=1),
        "shift_size": (shift * size).sum(axis=1),
    }


def _stops(
    scores: Scores,
    plan: Plan,
    hints: HeadHints,
    score: Float,
    spread: Float,
    size: Float,
    z: float,
) -> Float:
    """gamma sigma^2, once for every plane count at which the token may stop [G, T].

    Notes
    -----
    On the event of Theorem 7 the exact score s lies within ``spread`` of ``score``.  Test k of
    (5.4) may come out true only if exp(s + 2 z sigma(k) - L) sigma(k-1) R > theta, and false only
    if exp(s - L) sigma(k-1) R <= theta: whichever planes the dither makes a token stop at, they are
    among those that both allow.
    """
    log_z, theta = hints.log_z[:, None], hints.theta[:, None]
    reach = size + hints.spread[:, None]
    sigma = scores.deviation
    count = len(sigma)
    terms = [curvature(z * s) * s**2 for s in sigma]
    total = np.zeros_like(score)
    for n in range(1, count + 1):
        may = plan.used == n
        reached = np.ones_like(may)
        stopped = np.ones_like(may)
        if n > 1:
            highest = np.exp(score + spread + 2.0 * z * sigma[n - 1] - log_z)
            reached = highest * sigma[n - 2] * reach > theta
        if n < count:
            lowest = np.exp(score - spread - log_z)
            stopped = lowest * sigma[n - 1] * reach <= theta
        total += np.where(may | (reached & stopped), terms[n - 1], 0.0)
    return total


def _per_class(spec: DecodeSpec, rows: HeadRows, terms: Float) -> NDArray[np.float64]:
    """Sums over the tokens of each dither class [G, P]."""
    sums = np.zeros((spec.dither_rows, len(terms)))
    np.add.at(sums, rows.classes, terms.T)
    return np.ascontiguousarray(sums.T)
