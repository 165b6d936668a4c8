"""All query positions of all cases at several tolerances, in parallel through joblib.

One task is one query position of one case: it travels as a `CaseReference` and a number, and loads
its own rows, so that workers of a Dask cluster can serve it if they see the same files::

    with joblib.parallel_config("dask"):
        results = list(sweep(cases, settings))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import joblib
import numpy as np
import pyarrow as pa

from alignedkv.analysis.case_files import CaseReference
from alignedkv.analysis.encoding import KEY_TRANSFORM, encode_case
from alignedkv.analysis.plan import DecisionGroups
from alignedkv.analysis.plan_search import search_plan
from alignedkv.analysis.recording import (
    context_records,
    output_records,
    plane_records,
    scheme_records,
    token_batch,
)
from alignedkv.analysis.records import ContextRecord, OutputRecord, PlaneRecord, SchemeRecord
from alignedkv.analysis.schemes import Scheme
from alignedkv.analysis.scores import score_position
from alignedkv.errors import SpecError
from alignedkv.policy import PrecisionPolicy


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
        policy = replace(settings.policy, tolerance=tolerance)
        requested = tolerance in settings.tolerances
        found = search_plan(scores, policy, groups=settings.groups, seed=settings.seed)
        outputs += output_records(scores, found, policy, requested=requested, seed=settings.seed)
        if requested:
            planes += plane_records(scores, found.plan, tolerance)
            context += context_records(scores, found.plan, tolerance)
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
            schemes += scheme_records(scores, result)
    return PositionAnalysis(
        outputs=tuple(outputs),
        schemes=tuple(schemes),
        planes=tuple(planes),
        context=tuple(context),
        tokens=pa.concat_batches(batches),
        refused=tuple(refused),
    )
