"""The reference: a decode step in readable float64 NumPy.  It defines what is right.

Every other implementation answers to these functions: rows are encoded to the same bits, the same
planes are read but for ties, outputs lie within their own bounds, and no bound is below the one
here for the same reads.

Rows are written and read back by `reference_rows`, whose functions are these too.  One step, for
the G heads of one KV head of one sequence: what is expected of log Z
(`reference_hints`), scores after every plane count (`reference_plan`), the plan, sums over the
tokens of each split (`reference_sums`), merged sums and the bound (`reference_bounds`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.arrays import (
    HEAD_HINTS,
    START_HINTS,
    Array,
    CacheArrays,
    DecodeResult,
    HeadState,
    StepArguments,
)
from alignedkv.kernels.reference_bounds import bound, merge, normalise
from alignedkv.kernels.reference_hints import (
    expected_log_z,
    feed_back,
    look_near,
    next_rest,
    read_hints,
)
from alignedkv.kernels.reference_plan import HeadHints, plan_rows, score_rows
from alignedkv.kernels.reference_rows import (
    Float,
    HeadRows,
    attended_tokens,
    dequantise,
    encode,
    fit_transforms,
    key_transform,
    read_rows,
    refuse_lost_rows,
)
from alignedkv.kernels.reference_sums import add_up
from alignedkv.kernels.sampling import stream_key
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import (
    check_query,
    from_float64,
    to_float32,
)
from alignedkv.policy import START_MARGIN, BoundKind

__all__ = [
    "coarse",
    "decode",
    "dequantise",
    "encode",
    "fit_transforms",
    "probe",
    "refuse_lost_rows",
    "started",
    "unknown_state",
]


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


def decode(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    state: HeadState,
    arguments: StepArguments,
    *,
    sinks: Array | None = None,
    splits: int = 1,
) -> DecodeResult:
    """One decode step: output, bound, what was read, and the state for the next step.

    Parameters
    ----------
    spec : DecodeSpec
    cache : CacheArrays
    query : array [B, H, D] in query_dtype
    state : HeadState
        Hints from the previous step (or `probe`).
    arguments : StepArguments
    sinks : float32 array [H], optional
        Logit of each head's sink, where ``spec.sinks``.
    splits : int
        Parts into which the tokens are cut; changes nothing but rounding.

    Notes
    -----
    Under a statistical bound the hints must not depend on this step's dither (theory.md 5.3): they
    are the previous step's, and remain so in repairs.  That they depend on it through earlier
    outputs is gap (A) of theory.md 1.  With other bounds log Z is expected from the scores of the
    near rows, and a repair starts from what the pass before it found.
    """
    check_query(spec, cache, query, state, sinks)
    queries = to_float32(query, spec.query_dtype).astype(np.float64)
    batch, heads, _ = query.shape
    kv_heads = heads // spec.group
    output = np.zeros(query.shape)
    bounds, sizes = np.zeros((batch, heads)), np.zeros((batch, heads))
    missed = np.zeros((batch, heads), np.uint8)
    reads = np.zeros((batch, kv_heads, 2, spec.stored_planes), np.uint32)
    following = {name: np.zeros((batch, heads), np.float32) for name in HEAD_HINTS}
    step = int(state.step[0])

    for b in range(batch):
        for first in range(0, heads, spec.subgroup):
            h, mine = first // spec.group, slice(first, first + spec.subgroup)
            key = stream_key(arguments.seed, step, b * kv_heads + h)
            hints = read_hints(state, b, mine, key)
            logits = None if sinks is None else np.asarray(sinks, np.float64)[mine]
            with np.errstate(all="ignore"):
                answer, hints, gone = _decode_head(
                    spec, cache, arguments, (b, h), queries[b, mine], hints, logits, splits
                )
            output[b, mine] = answer.output
            bounds[b, mine], sizes[b, mine] = answer.bound, answer.size
            missed[b, mine] = gone
            reads[b, h] += answer.reads.astype(np.uint32)
            with np.errstate(over="ignore"):
                for name, hint in following.items():
                    hint[b, mine] = getattr(hints, name)
    with np.errstate(over="ignore"):
        bounds, sizes = bounds.astype(np.float32), sizes.astype(np.float32)
    return DecodeResult(
        output=from_float64(output, spec.query_dtype),
        bound=bounds,
        size=sizes,
        missed=missed,
        reads=reads,
        state=HeadState(**following, step=state.step + np.uint32(1)),
    )


def probe(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    arguments: StepArguments,
    *,
    start_theta: float,
    sinks: Array | None = None,
) -> HeadState:
    """The state of a head of which nothing is known: one pass over the first planes alone.

    Parameters
    ----------
    start_theta : float
        theta / tau from which feedback starts (`PrecisionPolicy.start_theta`).
    """
    unknown = unknown_state(*query.shape[:2])
    found = decode(spec, cache, query, unknown, coarse(arguments), sinks=sinks)
    return started(found, arguments.tolerance * start_theta)


def unknown_state(batch: int, heads: int) -> HeadState:
    """Hints with which a step reads first planes alone: theta is infinite."""
    hints = {name: np.full((batch, heads), x, np.float32) for name, x in START_HINTS.items()}
    return HeadState(**hints, step=np.zeros(1, np.uint32))


def coarse(arguments: StepArguments) -> StepArguments:
    """The arguments of a probe: no value row is skipped, nothing is repaired."""
    return replace(arguments, skip_share=0.0, repairs=0)


def started(probed: DecodeResult, theta_share: float) -> HeadState:
    """The state after a probe: theta is ``theta_share`` of the output's size.

    The probe's miss says nothing of the margin, which starts anew.
    """
    return replace(
        probed.state,
        theta=(theta_share * probed.size).astype(np.float32),
        margin=np.full_like(probed.state.margin, START_MARGIN),
        step=np.zeros(1, np.uint32),
    )


def _decode_head(
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
