"""From what an analysis found at one query position to the records that it writes down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alignedkv.analysis.certificate import bound_of
from alignedkv.analysis.plan import Decisions, Plan
from alignedkv.analysis.plan_search import SearchResult
from alignedkv.analysis.reading import read
from alignedkv.analysis.records import (
    TOKEN_SCHEMA,
    ContextRecord,
    OutputRecord,
    PlaneRecord,
    SchemeRecord,
)
from alignedkv.analysis.schemes import SchemeResult
from alignedkv.analysis.scores import PositionScores
from alignedkv.formats import BF16
from alignedkv.policy import BoundKind, PrecisionPolicy


def output_records(
    scores: PositionScores,
    found: SearchResult,
    policy: PrecisionPolicy,
    *,
    requested: bool,
    seed: int,
) -> Iterator[OutputRecord]:
    """One record for every query head.

    Parameters
    ----------
    scores : PositionScores
    found : SearchResult
        Of that policy.
    policy : PrecisionPolicy
    requested : bool
        Whether the user asked for the policy's tolerance.
    seed : int
        Of the draws of sampled rows.
    """
    case, certificate, plan = scores.encoded.case, found.certificate, found.plan
    bits_k, bits_v = plan.mean_bits
    others = _bounds_of_same_plan(scores, plan, policy, seed)
    effective = 1 / np.square(scores.probability).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = {kind: bound / scores.size for kind, bound in others.items()}
    for g in range(case.group):
        yield OutputRecord(
            layer=case.layer,
            kv_head=case.kv_head,
            head=case.kv_head * case.group + g,
            position=scores.position,
            tokens=scores.tokens,
            effective_tokens=float(effective[g]),
            tolerance=policy.tolerance,
            requested=requested,
            bits_k=bits_k,
            bits_v=bits_v,
            read_fraction=plan.read_fraction,
            scale_fraction=BF16.bits / (16 * case.head_dim),
            stored_fraction=scores.encoded.bytes_stored / (4 * case.tokens * case.head_dim),
            log2_theta=found.log2_multiple,
            kind=str(certificate.kind),
            bound=float(certificate.relative_bound[g]),
            error=float(certificate.relative_error[g]),
            missed=bool(certificate.missed[g]),
            violated=not certificate.holds[g],
            estimate=float(relative[BoundKind.ESTIMATE][g]),
            statistical=float(relative[BoundKind.STATISTICAL][g]),
            deterministic=float(relative[BoundKind.DETERMINISTIC][g]),
        )


def _bounds_of_same_plan(
    scores: PositionScores, plan: Plan, policy: PrecisionPolicy, seed: int
) -> dict[BoundKind, NDArray[np.float64]]:
    """The three bounds of one plan, absolute [G]; NaN where one says nothing about such plans."""
    reading = read(scores, plan, seed=seed)
    nothing = np.full(len(scores.exact), np.nan)
    bounds = dict.fromkeys(BoundKind, nothing)
    # Of sampled rows and of capped scores the statistical theorem says less; see `bound_of`.
    possible = {BoundKind.ESTIMATE}
    if not plan.is_sampled.any():
        possible.add(BoundKind.DETERMINISTIC)
    if plan.decisions in (Decisions.SETTLED, Decisions.FIXED):
        possible.add(BoundKind.STATISTICAL)
    for kind in possible:
        bounds[kind] = bound_of(reading, replace(policy, bound=kind, sample_values=False))
    return bounds


def plane_records(scores: PositionScores, plan: Plan, tolerance: float) -> Iterator[PlaneRecord]:
    """Shares of rows that reach each plane; of sampled value rows, in expectation."""
    case = scores.encoded.case
    sides = (
        ("K", plan.key_planes, np.ones(scores.tokens), scores.keys.stored),
        ("V", plan.value_planes, plan.probability, scores.values.stored),
    )
    for side, planes, weight, stored in sides:
        for n in range(1, stored + 1):
            yield PlaneRecord(
                layer=case.layer,
                kv_head=case.kv_head,
                position=scores.position,
                tolerance=tolerance,
                side=side,
                plane=n,
                share=float(((planes >= n) * weight).mean()),
            )


def context_records(
    scores: PositionScores, plan: Plan, tolerance: float
) -> Iterator[ContextRecord]:
    """Mean bits of the first 1, 1, 2, 4, ... tokens and of the last."""
    case = scores.encoded.case
    bins = context_bins(scores.tokens)
    for end in (bins > 0, bins < 0):
        for place in np.unique(bins[end]):
            there = bins == place
            yield ContextRecord(
                layer=case.layer,
                kv_head=case.kv_head,
                position=scores.position,
                tolerance=tolerance,
                place=int(place),
                tokens=int(there.sum()),
                bits_k=float(plan.key_bits[there].mean()),
                bits_v=float(plan.value_bits[there].mean()),
            )


def scheme_records(scores: PositionScores, result: SchemeResult) -> Iterator[SchemeRecord]:
    """One record for every query head."""
    case = scores.encoded.case
    sixteen_bit_bytes = 4.0 * scores.tokens * case.head_dim
    for g, error in enumerate(result.relative_error):
        yield SchemeRecord(
            layer=case.layer,
            kv_head=case.kv_head,
            head=case.kv_head * case.group + g,
            position=scores.position,
            scheme=result.name,
            bits_k=result.key_bits,
            bits_v=result.value_bits,
            read_fraction=result.read_fraction,
            stored_fraction=result.bytes_stored / sixteen_bit_bytes,
            error=math.inf if math.isnan(error) else float(error),
        )


def context_bins(tokens: int) -> NDArray[np.int64]:
    """Stretches of a context that double in length away from both of its ends [T].

    Returns
    -------
    int64 array [T]
        1, 2, 3, 4, ... for the first token, the next one, the next two, the next four, ...;
        -1, -2, -3, -4, ... for the last ones likewise.  Attention sinks sit at one end and recent
        tokens at the other; both would vanish on a linear scale.
    """
    from_start = np.arange(tokens)
    from_end = from_start[::-1]
    nearest = np.minimum(from_start, from_end)
    doublings = np.frexp(nearest.astype(np.float64))[1].astype(np.int64) + 1
    return np.where(from_start < from_end, doublings, -doublings)


def token_batch(scores: PositionScores, plan: Plan, tolerance: float) -> pa.RecordBatch:
    """The per-token table of one position: a row for every visible token, see `TOKEN_SCHEMA`."""
    case, tokens = scores.encoded.case, scores.tokens
    columns = {
        "tolerance": np.full(tokens, tolerance),
        "layer": np.full(tokens, case.layer, np.int32),
        "kv_head": np.full(tokens, case.kv_head, np.int32),
        "position": np.full(tokens, scores.position),
        "token": np.arange(scores.first, scores.end),
        "probability": scores.probability.max(axis=0).astype(np.float32),
        "key_scale": scores.keys.scale.astype(np.float32),
        "value_scale": scores.values.scale.astype(np.float32),
        "key_bits": plan.key_bits.astype(np.float32),
        "value_bits": plan.value_bits.astype(np.float32),
        "key_planes": plan.key_planes,
        "value_planes": plan.value_planes,
        "read_probability": plan.probability.astype(np.float32),
    }
    return pa.RecordBatch.from_pydict(columns, schema=TOKEN_SCHEMA)
