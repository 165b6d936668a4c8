"""What a step of one KV head is told beforehand, sharpens itself, and tells the next.

A plan needs log Z before the rows that make it are read.  Most of what changes in it from one query
to the next lies in the near rows, few enough to be scored first; the weight of all others is
remembered, less what the query alone explains of it.  Arrays are [G].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.arrays import HEAD_HINTS, HeadState, StepArguments
from alignedkv.kernels.reference_plan import HeadHints, capped
from alignedkv.kernels.reference_rows import Float, HeadRows
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import (
    LEAST_REST,
    NEAR_FIRST,
    NEAR_LAST,
    NEAR_SPREAD,
    REST_GAIN,
    START_MARGIN,
    feedback_margin,
    feedback_theta,
)
from alignedkv.transform import KeyTransform


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """What the near rows and the query say of log Z.

    Attributes
    ----------
    log_sum : float64 array [G]
        Natural log-sum-exp of the near rows' scores after their first plane, rows kept exact
        included; -inf without rows.
    offset : float64 array [G]
        What the query alone explains of all other rows' weight.
    """

    log_sum: Float
    offset: Float


def read_hints(state: HeadState, b: int, mine: slice, key: np.uint64) -> HeadHints:
    """The hints for some heads; what is not a number says nothing, and then everything is read."""
    told = {name: np.asarray(getattr(state, name)[b, mine], np.float64) for name in HEAD_HINTS}
    return HeadHints(
        log_z=np.where(np.isnan(told["log_z"]), -np.inf, told["log_z"]),
        rest=np.where(np.isfinite(told["rest"]), told["rest"], -np.inf),
        spread=np.where(np.isfinite(told["spread"]), told["spread"], 0.0),
        theta=np.where(np.isnan(told["theta"]), 0.0, told["theta"]),
        margin=np.where(np.isnan(told["margin"]), START_MARGIN, told["margin"]),
        key=key,
    )


def near_rows(count: int) -> NDArray[np.bool_]:
    """Which of ``count`` attended rows are near: the first and the last of them but the newest.

    The newest is on its way into the cache while a GPU looks at the others.
    """
    place, newest = np.arange(count), count - 1
    return (place < newest) & ((place < NEAR_FIRST) | (place >= newest - NEAR_LAST))


def look_near(
    spec: DecodeSpec,
    arguments: StepArguments,
    transform: KeyTransform,
    rows: HeadRows,
    query: Float,
) -> Near:
    """Score the near rows of all attended ``rows`` for queries [G, D]."""
    chosen = near_rows(len(rows.tokens))
    keys = replace(
        rows.keys,
        words=rows.keys.words[chosen],
        scale_bits=rows.keys.scale_bits[chosen],
        dither=rows.keys.dither[chosen],
    )
    turned = transform.exact_queries(query)
    base = arguments.scaling * transform.offsets(query, 1)
    score = capped(spec, arguments, arguments.scaling * turned @ keys.prefix(1).T + base)
    norm2 = arguments.scaling * np.sqrt((turned**2).sum(axis=-1))
    offset = near_offset(spec, arguments, base[:, 0], norm2, keys.scale)
    return Near(log_sum=np.logaddexp.reduce(score, axis=1), offset=offset)


def near_offset(
    spec: DecodeSpec, arguments: StepArguments, base: Float, norm2: Float, scales: Float
) -> Float:
    """What the query explains of the other rows' weight: their mean score and half its variance.

    Parameters
    ----------
    base, norm2 : float64 array [G]
        lambda q.mean, and lambda ||q'||_2.
    scales : float64 array [near rows]
        g.  The other rows' are taken to be alike.

    Notes
    -----
    For scores distributed normally about ``base`` this is their log Z but for log T.  Under a
    softcap there is no such formula; ``base`` alone is capped like a score.
    """
    if spec.softcap:
        return capped(spec, arguments, base)
    mean_square = (scales**2).sum() / max(len(scales), 1)
    offset: Float = base + NEAR_SPREAD * norm2**2 * mean_square
    return offset


def expected_log_z(near: Near, rest: Float) -> Float:
    """The log Z to plan with; -inf, and everything is read, where the near rows are lost."""
    log_z = np.logaddexp(near.log_sum, rest + near.offset)
    return np.where(np.isnan(log_z), -np.inf, log_z)


def next_rest(rest: Float, near: Near, log_z: Float) -> Float:
    """``rest`` after a step that found ``log_z``, sink included.

    It moves `REST_GAIN` of the way to what this step makes it, all the way if nothing was known,
    and stays where the near rows are all there is.
    """
    beyond = log_z - near.log_sum
    found = log_z + np.log(-np.expm1(-beyond)) - near.offset
    moved = np.where(np.isfinite(rest), rest + REST_GAIN * (found - rest), found)
    tells = (beyond > np.log1p(LEAST_REST)) & np.isfinite(beyond) & np.isfinite(found)
    return np.where(tells, moved, rest)


def feed_back(
    hints: HeadHints, bound: Float, tau: Float, missed: NDArray[np.bool_]
) -> tuple[Float, Float]:
    """theta and margin after a first pass.

    Both stay where there is nothing to aim at: tau is 0, or an output is not finite.
    """
    counts = (tau > 0) & np.isfinite(tau)
    margin = feedback_margin(hints.margin, missed)
    theta = feedback_theta(hints.theta, bound, tau, margin)
    return np.where(counts, theta, hints.theta), np.where(counts, margin, hints.margin)
