"""A step of the reference for the G heads of one KV head of one sequence: passes until bounds hold.

A pass: what is expected of log Z (`reference_hints`), scores after every plane count and the plan
(`reference_plan`), sums over the tokens of each split (`reference_sums`), merged sums and the bound
(`reference_bounds`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.arrays import CacheArrays, StepArguments
from alignedkv.kernels.reference_bounds import bound, merge, normalise
from alignedkv.kernels.reference_hints import expected_log_z, feed_back, look_near, next_rest
from alignedkv.kernels.reference_plan import HeadHints, plan_rows, score_rows
from alignedkv.kernels.reference_rows import (
    Float,
    HeadRows,
    attended_tokens,
    key_transform,
    read_rows,
)
from alignedkv.kernels.reference_sums import add_up
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAnswer:
    """What one pass over one KV head found, for its G heads.

    Attributes
    ----------
    output : float64 array [G, D]
    bound, size, spread, log_z : float64 arrays [G]
    reads : int64 array [2, N]
    """

    output: Float
    bound: Float
    size: Float
    spread: Float
    log_z: Float
    reads: NDArray[np.int64]


def decode_head(
    spec: DecodeSpec,
    cache: CacheArrays,
    arguments: StepArguments,
    place: tuple[int, int],
    query: Float,
    hints: HeadHints,
    sinks: Float | None,
    splits: int,
) -> tuple[HeadAnswer, HeadHints, NDArray[np.bool_]]:
    """All passes over one KV head: answer, hints for the next step, missed [G]."""
    rows = read_rows(spec, cache, *place, attended_tokens(cache, arguments, place[0]))

    def run(hints: HeadHints) -> HeadAnswer:
        return _pass(spec, cache, arguments, place, rows, query, hints, sinks, splits)

    told, settled = hints, spec.bound is BoundKind.STATISTICAL
    near = look_near(spec, arguments, key_transform(cache, *place), rows, query)
    if not settled:
        hints = replace(hints, log_z=expected_log_z(near, hints.rest))
    answer = run(hints)
    if not len(rows.tokens):
        nothing = replace(told, log_z=answer.log_z, spread=answer.spread)
        return answer, nothing, np.zeros(len(query), np.bool_)
    missed = _misses(answer, arguments.tolerance)
    theta, margin = feed_back(told, answer.bound, arguments.tolerance * answer.size, missed)
    rest = told.rest if settled else next_rest(told.rest, near, answer.log_z)
    for left in range(arguments.repairs, 0, -1):
        if not missed.any():
            break
        finer = hints.theta * np.fmin(0.5, arguments.tolerance * answer.size / answer.bound / 2.0)
        finer = np.where(left == 1, 0.0, np.nan_to_num(finer))
        hints = replace(hints, theta=np.where(missed, finer, hints.theta))
        if not settled:
            hints = replace(hints, log_z=answer.log_z, spread=answer.spread)
        again = run(hints)
        answer = replace(again, reads=answer.reads + again.reads)
        missed = _misses(answer, arguments.tolerance)
    following = replace(
        told, log_z=answer.log_z, rest=rest, spread=answer.spread, theta=theta, margin=margin
    )
    return answer, following, missed


def _pass(
    spec: DecodeSpec,
    cache: CacheArrays,
    arguments: StepArguments,
    place: tuple[int, int],
    rows: HeadRows,
    query: Float,
    hints: HeadHints,
    sinks: Float | None,
    splits: int,
) -> HeadAnswer:
    """One pass over the rows of one KV head, in ``splits`` parts."""
    transform = key_transform(cache, *place)
    edges = np.linspace(0, len(rows.tokens), splits + 1).astype(int)
    parts = []
    reads = np.zeros((2, spec.stored_planes), np.int64)
    planes = np.arange(1, spec.stored_planes + 1)[:, None]
    for begin, end in pairwise(edges):
        part = rows.take(slice(begin, end))
        scores = score_rows(spec, arguments, transform, part, query)
        plan = plan_rows(spec, arguments, part, scores, hints)
        parts.append(add_up(spec, arguments, part, scores, plan, hints))
        reads += [(plan.keys >= planes).sum(axis=1), (plan.values >= planes).sum(axis=1)]

    sums = merge(parts)
    top = np.where(np.isneginf(sums.top), 0.0, sums.top)
    sink = np.zeros(len(top)) if sinks is None else np.exp(sinks - top)
    total = sums.linear["weight"] + sink
    if not len(rows.tokens):
        nothing = np.zeros(len(top))
        log_z = np.full(len(top), -np.inf) if sinks is None else sinks
        return HeadAnswer(
            output=np.zeros(query.shape),
            bound=nothing,
            size=nothing,
            spread=nothing,
            log_z=log_z,
            reads=reads,
        )
    sums = normalise(sums, total)
    sink = sink / total
    output = sums.linear["output"] + (1.0 - sink)[:, None] * rows.value_mean
    spread = np.abs(output - rows.value_mean).max(axis=1)
    found = bound(
        spec.bound,
        sums,
        deviations=arguments.deviations,
        tolerance=arguments.tolerance,
        sink_weight=sink,
        spread_hint=hints.spread,
        spread=spread,
        mean_size=float(np.abs(rows.value_mean).max()),
        sampled=spec.sample_values,
    )
    lost = np.isnan(output).any(axis=1)
    return HeadAnswer(
        output=output,
        bound=np.where(np.isnan(found) & ~lost, np.inf, found),
        size=np.abs(output).max(axis=1),
        spread=spread,
        log_z=top + np.log(total),
        reads=reads,
    )


def _misses(answer: HeadAnswer, tolerance: float) -> NDArray[np.bool_]:
    return ~(answer.bound <= tolerance * (answer.size - answer.bound))
