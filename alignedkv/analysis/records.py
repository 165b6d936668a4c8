"""What an analysis writes down: one record per output, scheme, plane, stretch of context and token.

Errors and bounds are relative to the largest component of the exact output.  Bits are per element
of the visible rows; a `read_fraction` is of 16 bits per element, row scales not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

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
    """Mean bits of a stretch of the context; ``place`` as in `recording.context_bins`."""

    layer: int
    kv_head: int
    position: int
    tolerance: float
    place: int
    tokens: int
    bits_k: float
    bits_v: float
