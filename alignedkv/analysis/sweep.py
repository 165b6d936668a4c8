"""All query positions of all cases at several tolerances, in parallel through joblib.

One task is one query position of one case: it travels as a `CaseReference` and a number, and loads
its own rows, so that workers of a Dask cluster can serve it if they see the same files::

    with joblib.parallel_config("dask"):
        results = list(sweep(cases, settings))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import joblib
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alignedkv.analysis.case_files import CaseReference
from alignedkv.analysis.certificate import bound_of
from alignedkv.analysis.encoding import KEY_TRANSFORM, encode_case
from alignedkv.analysis.plan import DecisionGroups, Decisions, Plan
from alignedkv.analysis.plan_search import SearchResult, search_plan
from alignedkv.analysis.reading import read
from alignedkv.analysis.records import (
    ContextRecord,
    OutputRecord,
    PlaneRecord,
    SchemeRecord,
    context_bins,
    token_batch,
)
from alignedkv.analysis.schemes import Scheme, SchemeResult
from alignedkv.analysis.scores import PositionScores, score_position
from alignedkv.errors import SpecError
from alignedkv.formats import BF16
from alignedkv.policy import BoundKind, PrecisionPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """What is done at every query position.

    Attributes
    ----------
    policy : PrecisionPolicy
        All but the tolerance.
    tolerances : tuple of float
        For which everything is recorded.
    curve : tuple of float
        Further tolerances, of which only outputs are recorded: bytes, bounds and errors.
    groups : DecisionGroups
    transform : str
        Parts of the key transform, as `encode_case` takes them.
    schemes : tuple of Scheme
        What to compare with.
    seed : int
        Of dither, random signs and draws.
    """

    policy: PrecisionPolicy
    tolerances: tuple[float, ...]
    curve: tuple[float, ...] = ()
    groups: DecisionGroups = field(default_factory=DecisionGroups)
    transform: str = KEY_TRANSFORM
    schemes: tuple[Scheme, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionAnalysis:
    """What the sweep found at one query position of one case.

    Attributes
    ----------
    outputs : tuple of OutputRecord
        One for every tolerance and query head.
    schemes : tuple of SchemeRecord
        One for every scheme and query head.
    planes : tuple of PlaneRecord
    context : tuple of ContextRecord
    tokens : pyarrow.RecordBatch
        One row for every tolerance and visible token; columns as in `records.TOKEN_SCHEMA`.
    refused : tuple of (str, str)
        Schemes that cannot hold this case, and why.
    """

    outputs: tuple[OutputRecord, ...]
    schemes: tuple[SchemeRecord, ...]
    planes: tuple[PlaneRecord, ...]
    context: tuple[ContextRecord, ...]
    tokens: pa.RecordBatch
    refused: tuple[tuple[str, str], ...]


def position_tasks(
    cases: Iterable[CaseReference], *, spaced: int | None = None
) -> list[tuple[CaseReference, int]]:
    """List the query positions of cases, each a task of `sweep`.

    Parameters
    ----------
    cases : iterable of CaseReference
    spaced : int, optional
        Keep at most so many positions of a case, evenly spaced, its last one among them.
    """
    tasks = []
    for case in cases:
        positions = case.query_positions()
        if spaced is not None and spaced < len(positions):
            last = len(positions) - 1
            kept = last - np.arange(spaced)[::-1] * len(positions) // spaced
            positions = positions[kept]
        chosen = replace(case, positions=tuple(positions.tolist()))
        tasks += [(chosen, index) for index in range(len(positions))]
    return tasks


def sweep(
    tasks: Sequence[tuple[CaseReference, int]], settings: SweepSettings, *, jobs: int | None = None
) -> Iterator[PositionAnalysis]:
    """Analyze tasks in parallel; results come in their order, each as soon as it can.

    Parameters
    ----------
    tasks : sequence of (CaseReference, int)
        A case and the index of one of its query positions; `position_tasks` lists them.
    settings : SweepSettings
    jobs : int, optional
        Worker processes, as joblib counts them (-1: all cores).  Default: what an enclosing
        ``joblib.parallel_config`` says, else one.

    Raises
    ------
    ActivationError
        If a case turns out to hold NaN or infinity.
    SpecError
        If the bound says nothing about such plans.
    """
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator")
    results: Iterator[PositionAnalysis] = parallel(
        joblib.delayed(analyze_position)(reference, index, settings) for reference, index in tasks
    )
    return results


def analyze_position(
    reference: CaseReference, index: int, settings: SweepSettings
) -> PositionAnalysis:
    """Do all that the settings say at one query position.

    Parameters
    ----------
    reference : CaseReference
    index : int
        Of the position among the reference's.
    settings : SweepSettings
    """
    encoded = encode_case(
        reference.load(), settings.policy, transform=settings.transform, seed=settings.seed
    )
    scores = score_position(encoded, index)
    outputs: list[OutputRecord] = []
    planes: list[PlaneRecord] = []
    context: list[ContextRecord] = []
    batches = []
    for tolerance in (*settings.tolerances, *settings.curve):
        found = search_plan(
            scores,
            replace(settings.policy, tolerance=tolerance),
            groups=settings.groups,
            seed=settings.seed,
        )
        outputs += _output_records(scores, found, tolerance, settings)
        if tolerance in settings.tolerances:
            planes += _plane_records(scores, found.plan, tolerance)
            context += _context_records(scores, found.plan, tolerance)
            batches.append(token_batch(scores, found.plan, tolerance))
    schemes: list[SchemeRecord] = []
    refused = []
    for scheme in settings.schemes:
        try:
            # A format whose range is too small overflows; its error then says so.
            with np.errstate(over="ignore", invalid="ignore"):
                result = scheme.apply(encoded.case, index)
        except SpecError as error:
            refused.append((scheme.name, str(error)))
        else:
            schemes += _scheme_records(scores, result)
    return PositionAnalysis(
        outputs=tuple(outputs),
        schemes=tuple(schemes),
        planes=tuple(planes),
        context=tuple(context),
        tokens=pa.concat_batches(batches),
        refused=tuple(refused),
    )


def _output_records(
    scores: PositionScores, found: SearchResult, tolerance: float, settings: SweepSettings
) -> Iterator[OutputRecord]:
    case, certificate, plan = scores.encoded.case, found.certificate, found.plan
    bits_k, bits_v = plan.mean_bits
    others = _bounds_of_same_plan(scores, plan, settings)
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
            tolerance=tolerance,
            requested=tolerance in settings.tolerances,
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
    scores: PositionScores, plan: Plan, settings: SweepSettings
) -> dict[BoundKind, NDArray[np.float64]]:
    """The three bounds of one plan, absolute [G]; NaN where one says nothing about such plans."""
    reading = read(scores, plan, seed=settings.seed)
    nothing = np.full(len(scores.exact), np.nan)
    bounds = dict.fromkeys(BoundKind, nothing)
    # Of sampled rows and of capped scores the statistical theorem says less; see `bound_of`.
    possible = {BoundKind.ESTIMATE}
    if not plan.is_sampled.any():
        possible.add(BoundKind.DETERMINISTIC)
    if plan.decisions in (Decisions.SETTLED, Decisions.FIXED):
        possible.add(BoundKind.STATISTICAL)
    for kind in possible:
        policy = replace(settings.policy, bound=kind, sample_values=False)
        bounds[kind] = bound_of(reading, policy)
    return bounds


def _plane_records(scores: PositionScores, plan: Plan, tolerance: float) -> Iterator[PlaneRecord]:
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


def _context_records(
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


def _scheme_records(scores: PositionScores, result: SchemeResult) -> Iterator[SchemeRecord]:
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
