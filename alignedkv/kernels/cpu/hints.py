"""What a step tells itself and the next on the CPU: `reference_hints`, head by head."""

from __future__ import annotations

import numpy as np

from alignedkv.kernels.cpu.compiled import compiled
from alignedkv.kernels.cpu.maths import exp, first_digits
from alignedkv.kernels.cpu.plan import cap, first_score
from alignedkv.kernels.cpu.rows import class_of, row_of
from alignedkv.kernels.cpu.tile import (
    BASE,
    LOG_Z,
    MARGIN,
    NEAR,
    NORM2,
    OFFSET,
    REST,
    SPREAD,
    STATISTICAL,
    THETA,
    key_scale_of,
)
from alignedkv.policy import (
    FEEDBACK_GAIN,
    LEAST_REST,
    MARGIN_FALL,
    MARGIN_RANGE,
    MARGIN_RISE,
    NEAR_FIRST,
    NEAR_LAST,
    NEAR_SPREAD,
    REST_GAIN,
    START_MARGIN,
    THETA_RANGE,
)

_LEAST_THETA, _MOST_THETA = THETA_RANGE
_LEAST_MARGIN, _MOST_MARGIN = MARGIN_RANGE


@compiled
def read_hints(told, b, at, facts):
    """Hints ``told`` [HEAD_HINTS, B, H] of one query head; what is not a number says nothing."""
    for k in (LOG_Z, REST, SPREAD, THETA, MARGIN):
        facts[k] = np.float64(told[k, b, at])
    facts[LOG_Z] = -np.inf if np.isnan(facts[LOG_Z]) else facts[LOG_Z]
    facts[REST] = facts[REST] if np.isfinite(facts[REST]) else -np.inf
    facts[SPREAD] = facts[SPREAD] if np.isfinite(facts[SPREAD]) else 0.0
    facts[THETA] = 0.0 if np.isnan(facts[THETA]) else facts[THETA]
    facts[MARGIN] = START_MARGIN if np.isnan(facts[MARGIN]) else facts[MARGIN]


@compiled
def expect_log_z(cache, step, head, b, h, start, length):
    """Score the near rows of tokens ``start`` to ``length``, and expect log Z from them."""
    if step.kind == STATISTICAL:
        return
    group = len(head.facts)
    older = length - 1  # rows but the newest
    near = max(min(older - start, NEAR_FIRST + NEAR_LAST), 0)
    digits = np.empty((1, head.queries.shape[1]), np.float32)
    scores = np.empty((group, near))
    squares = 0.0
    for i in range(near):
        t = start + i if i < NEAR_FIRST else older - near + i
        address = row_of(cache.block_table, cache.page, cache.heads, cache.capacity, b, h, t)
        key_scale = key_scale_of(cache.scales[address])
        squares += key_scale**2
        first_digits(cache.key_planes[0], address, digits, 0)
        own = class_of(t, cache.dither.shape[1])
        for g in range(group):
            scores[g, i] = first_score(step, head, g, digits, key_scale, own)
    mean_square = squares / max(near, 1)
    for g in range(group):
        facts = head.facts[g]
        facts[NEAR] = _log_sum_exp(scores[g])
        if step.softcap > 0:
            facts[OFFSET] = cap(facts[BASE], step.softcap)
        else:
            facts[OFFSET] = facts[BASE] + NEAR_SPREAD * facts[NORM2] ** 2 * mean_square
        log_z = np.logaddexp(facts[NEAR], facts[REST] + facts[OFFSET])
        facts[LOG_Z] = -np.inf if np.isnan(log_z) else log_z


@compiled
def _log_sum_exp(scores):
    top = -np.inf
    for score in scores:
        top = max(top, score)
    if top == -np.inf:
        return top
    total = 0.0
    for score in scores:
        total += exp(score - top)
    return top + np.log(total)


@compiled
def next_rest(step, facts, log_z):
    """`reference_hints.next_rest`; a statistical bound leaves it as it is."""
    rest, beyond = facts[REST], log_z - facts[NEAR]
    if step.kind == STATISTICAL or not (beyond > np.log1p(LEAST_REST) and np.isfinite(beyond)):
        return rest
    found = log_z + np.log(-np.expm1(-beyond)) - facts[OFFSET]
    if not np.isfinite(found):
        return rest
    return rest + REST_GAIN * (found - rest) if np.isfinite(rest) else found


@compiled
def feed_back(facts, bound, tau, missed):
    """theta and margin after a first pass: `reference_hints.feed_back`."""
    theta, margin = facts[THETA], facts[MARGIN]
    if not (tau > 0 and np.isfinite(tau)):
        return theta, margin
    margin += MARGIN_RISE if missed else -MARGIN_FALL
    margin = min(max(margin, _LEAST_MARGIN), _MOST_MARGIN)
    wanted = tau / max(bound, 1e-300) * 2.0**-margin
    theta *= min(max(wanted**FEEDBACK_GAIN, 0.25), 4.0)
    return min(max(theta, _LEAST_THETA * tau), _MOST_THETA * tau), margin
