"""One KV head of a decode step: what its tokens say after n planes, and how many planes to read.

Everything here follows theory.md 3, 5.3 and 6, in float64, for all tokens and the G query heads of
the group at once: arrays are [G, T] unless said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.arrays import StepArguments
from alignedkv.kernels.reference_rows import Float, HeadRows
from alignedkv.kernels.sampling import DRAW_BITS, SAMPLING_FACTOR, chances, draws
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import (
    DITHER_FRACTION_BITS,
)
from alignedkv.policy import BoundKind, planes_for
from alignedkv.transform import KeyTransform

#: 0.002 in (3.1): u 7.5 4096, the butterfly's rounding in units f, per stage and sqrt(D).
ENCODER_BUTTERFLY = 0.002
#: 2^-8 in (3.1): the division by f and the sum with the dither, in units f.
ENCODER_DIGITS = 2.0**-8
#: 0.01 in (5.5): the rounding of a stored value, in units f.
ENCODER_VALUE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadHints:
    """What the step was told of the G heads, and under which name it draws.

    Attributes
    ----------
    log_z, rest, spread, theta, margin : float64 arrays [G]
        As in `HeadState`; log_z is what the pass plans with.
    key : uint64
        Stream of the sampling hash.
    """

    log_z: Float
    rest: Float
    spread: Float
    theta: Float
    margin: Float
    key: np.uint64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores after 1..N planes and how wrong they can be.

    Attributes
    ----------
    value : float64 array [N, G, T]
        Entry n - 1 after n planes; the same exact score throughout where the row is kept exact.
    deviation, worst : float64 arrays [N, G, T]
        sigma_t(n) and e_t(n) of Lemma 3; 0 where exact.
    shift : float64 array [G, T]
        b_t of Lemma 3, the part that is not random.
    """

    value: Float
    deviation: Float
    worst: Float
    shift: Float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Planes of each token.

    Attributes
    ----------
    keys : int array [T]
        Key planes read; 0 where the row is kept exact.
    used : int array [G, T]
        Key planes that a head's score uses; fewer than read only under the settled rule.
    values : int array [T]
        Value planes read.
    chance : float64 array [T]
        pi, the probability with which the value row was read; 1 where nothing was left to chance.
    """

    keys: NDArray[np.int64]
    used: NDArray[np.int64]
    values: NDArray[np.int64]
    chance: Float


def score_rows(
    spec: DecodeSpec,
    arguments: StepArguments,
    transform: KeyTransform,
    rows: HeadRows,
    query: Float,
) -> Scores:
    """Scores of the rows after every plane count.

    Parameters
    ----------
    query : float64 array [G, D]
    """
    turned = transform.exact_queries(query)
    base = arguments.scaling * transform.offsets(query, 1)
    exact = arguments.scaling * query @ rows.exact_keys.T
    norm1 = arguments.scaling * np.abs(turned).sum(axis=-1)[:, None]
    norm2 = arguments.scaling * np.sqrt((turned**2).sum(axis=-1))[:, None]
    live = ~rows.is_exact

    value, deviation, worst = [], [], []
    for n in range(1, spec.stored_planes + 1):
        score = arguments.scaling * turned @ rows.keys.prefix(n).T + base
        score[:, rows.is_exact] = exact
        score = capped(spec, arguments, score)
        half = rows.keys.half_step(n) * live
        value.append(score)
        deviation.append(norm2 * half / np.sqrt(3.0))
        worst.append(norm1 * half)

    stages = np.log2(transform.block) + 1.0
    butterfly = ENCODER_BUTTERFLY * stages * np.sqrt(spec.channels) * norm2
    digits = (2.0 ** -(DITHER_FRACTION_BITS + 1) + ENCODER_DIGITS) * norm1
    return Scores(
        value=np.stack(value),
        deviation=np.stack(deviation),
        worst=np.stack(worst),
        shift=rows.keys.unit * live * (digits + butterfly),
    )


def capped(spec: DecodeSpec, arguments: StepArguments, score: Float) -> Float:
    """Scores under the softcap, if there is one."""
    if not spec.softcap:
        return score
    under: Float = arguments.softcap * np.tanh(score / arguments.softcap)
    return under


def plan_rows(
    spec: DecodeSpec,
    arguments: StepArguments,
    rows: HeadRows,
    scores: Scores,
    hints: HeadHints,
) -> Plan:
    """Rule (6.2), or the settled rule (5.4) for a statistical bound, and the value rows' plan.

    Notes
    -----
    All comparisons are made between logarithms to base 2, so that nothing over- or underflows.
    Scores are those before the mean correction, which only weights have (`mean_correction`).
    """
    settled = spec.bound is BoundKind.STATISTICAL
    margin = arguments.deviations if settled else arguments.plan_margin
    log_theta = np.log2(hints.theta)[:, None]
    size = rows.values.magnitude
    reach = np.log2(size + hints.spread[:, None])  # log2 R

    def weight(score: Float, deviation: Float) -> Float:
        """log2 of the largest weight that a score makes plausible."""
        nats: Float = score + margin * deviation - hints.log_z[:, None]
        bits: Float = np.minimum(nats / np.log(2.0), 0.0)
        return bits

    first = weight(scores.value[0], scores.deviation[0])
    if settled:
        keys, used = _settled(arguments, scores, hints, reach)
    else:
        deterministic = spec.bound is BoundKind.DETERMINISTIC
        error = scores.worst[0] if deterministic else scores.deviation[0]
        excess = _excess(first + np.log2(error) + reach, log_theta)
        keys = planes_for(excess.max(axis=0), spec.layout, spec.stored_planes).astype(np.int64)
        used = np.broadcast_to(keys, first.shape)

    share = arguments.skip_share * (SAMPLING_FACTOR if spec.sample_values else 1.0)
    threshold = log_theta + np.log2(share) if share > 0 else np.full_like(log_theta, -np.inf)
    above = (first + np.log2(size) - threshold).max(axis=0)  # log2 of pU a / threshold
    chance = np.ones(len(size))
    if spec.sample_values:
        allowed = chances(np.exp2(np.minimum(above, 0.0)))
        drawn = draws(hints.key, rows.tokens) < allowed
        chance = np.where(above >= 0, 1.0, allowed * 2.0**-DRAW_BITS)
        chance[rows.is_exact] = 1.0

    at_used = used[None] - 1
    refined = weight(
        np.take_along_axis(scores.value, at_used, axis=0)[0],
        np.take_along_axis(scores.deviation, at_used, axis=0)[0],
    )
    half = rows.values.half_step(1)
    step = half if spec.bound is BoundKind.DETERMINISTIC else half / np.sqrt(3.0)
    excess = _excess(refined + np.log2(step), log_theta)
    values = planes_for(excess.max(axis=0), spec.layout, spec.stored_planes).astype(np.int64)
    if spec.sample_values:
        values = np.where(chance < 1, drawn, values)
    else:
        values = np.where(above > 0, values, 0)
    return Plan(
        keys=np.where(rows.is_exact, 0, keys),
        used=used,
        values=np.where(rows.is_exact, 0, values),
        chance=chance,
    )


def _settled(
    arguments: StepArguments, scores: Scores, hints: HeadHints, reach: Float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Planes read [T] and used [G, T] under the settled rule, read in one go.

    The reading test of (5.4) is made for every plane at once, from the first score and its margin:
    a true test of use still implies it, for the reason given in theory.md 5.3.
    """
    z = arguments.deviations
    log_z = hints.log_z[:, None]
    log_theta = np.log2(hints.theta)[:, None]
    sigma = scores.deviation
    read = np.ones(sigma.shape[1:], np.int64)
    tests = []
    for k in range(1, len(sigma)):
        gain = np.log2(sigma[k - 1]) + reach
        hopeful = (scores.value[0] + z * (sigma[0] + 2.0 * sigma[k]) - log_z) / np.log(2.0)
        read += _excess(hopeful + gain, log_theta) > 0
        settled = (scores.value[k] + z * sigma[k] - log_z) / np.log(2.0)
        tests.append(_excess(settled + gain, log_theta) > 0)
    group: NDArray[np.int64] = read.max(axis=0)
    used = np.ones(sigma.shape[1:], np.int64)
    for k, test in enumerate(tests, start=2):
        used[(group >= k) & test] = k
    return group, used


def _excess(log_error: Float, log_theta: Float) -> Float:
    """log2(error / theta); theta = 0 asks for every plane, whatever the error."""
    return np.where(np.isneginf(log_theta), np.inf, log_error - log_theta)
