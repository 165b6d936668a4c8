"""The reference: a decode step in readable float64 NumPy.  It defines what is right.

Every other implementation answers to these functions: rows are encoded to the same bits, the same
planes are read but for ties, outputs lie within their own bounds, and no bound is below the one
here for the same reads.

Rows are written and read back by `reference_rows`, whose functions are these too; a step is one of
`reference_head` for each KV head of each sequence.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from alignedkv.kernels.arrays import (
    HEAD_HINTS,
    START_HINTS,
    Array,
    CacheArrays,
    DecodeResult,
    HeadState,
    StepArguments,
)
from alignedkv.kernels.checks import check_query
from alignedkv.kernels.reference_head import decode_head
from alignedkv.kernels.reference_hints import read_hints
from alignedkv.kernels.reference_rows import dequantise, encode, fit_transforms, refuse_lost_rows
from alignedkv.kernels.sampling import stream_key
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import from_float64, to_float32
from alignedkv.policy import START_MARGIN

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
                answer, hints, gone = decode_head(
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
