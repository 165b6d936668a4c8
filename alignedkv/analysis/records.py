"""What an analysis writes down: one record per output, scheme, plane, stretch of context and token.

Errors and bounds are relative to the largest component of the exact output.  Bits are per element
of the visible rows; a `read_fraction` is of 16 bits per element, row scales not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alignedkv.analysis.plan import Plan
from alignedkv.analysis.scores import PositionScores

#: Columns of the per-token table.  ``probability`` is the largest softmax weight of the row among
#: the query heads that share it; ``read_probability`` is that of reading the value row: 0 where it
#: is skipped, between 0 and 1 where it is sampled.  Bits are per channel, in expectation.
TOKEN_SCHEMA = pa.schema(
    [
        ("tolerance", pa.float64()),
        ("layer", pa.int32()),
        ("kv_head", pa.int32()),
        ("position", pa.int64()),
        ("token", pa.int64()),
        ("probability", pa.float32()),
        ("key_scale", pa.float32()),
        ("value_scale", pa.float32()),
        ("key_bits", pa.float32()),
        ("value_bits", pa.float32()),
        ("key_planes", pa.int8()),
        ("value_planes", pa.int8()),
        ("read_probability", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRecord:
    """One attention output: a query head at a position, at one tolerance.

    Attributes
    ----------
    tokens : int
        Visible ones.
    effective_tokens : float
        1 / sum p^2.
    requested : bool
        Whether the user asked for this tolerance, or it only draws the cost curve.
    scale_fraction : float
        Bits of the row scales, which are read of every row, on the scale of `read_fraction`.
    stored_fraction : float
        Bytes of the whole case as stored, scales included, as a share of 16 bits per element.
    log2_theta : float
        log2(theta / tau) of the plan; -inf where every stored plane is read.
    kind : str
        Of `bound`: the one that the plan was searched for.
    missed : bool
        Whether the bound is above the tolerance.
    violated : bool
        Whether the error is above the bound.
    estimate, statistical, deterministic : float
        All bounds of the same plan; NaN where one says nothing about it.
    """

    layer: int
    kv_head: int
    head: int
    position: int
    tokens: int
    effective_tokens: float
    tolerance: float
    requested: bool
    bits_k: float
    bits_v: float
    read_fraction: float
    scale_fraction: float
    stored_fraction: float
    log2_theta: float
    kind: str
    bound: float
    error: float
    missed: bool
    violated: bool
    estimate: float
    statistical: float
    deterministic: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeRecord:
    """The same output under another scheme; its scales and zero points are in all bits."""

    layer: int
    kv_head: int
    head: int
    position: int
    scheme: str
    bits_k: float
    bits_v: float
    read_fraction: float
    stored_fraction: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneRecord:
    """Share of a KV head's visible rows of which a plane is read; ``side`` is K or V."""

    layer: int
    kv_head: int
    position: int
    tolerance: float
    side: str
    plane: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRecord:
    """Mean bits of a stretch of the context; ``place`` as in `context_bins`."""

    layer: int
    kv_head: int
    position: int
    tolerance: float
    place: int
    tokens: int
    bits_k: float
    bits_v: float


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
