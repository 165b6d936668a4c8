"""Attention inputs to tune and measure on: synthetic ones, and captured ones at any length.

How many bytes a step reads depends on its scores, so a time means nothing without their kind.
Arrays are NumPy's or CuPy's: whoever calls says which module makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignedkv.errors import TuningError
from alignedkv.kernels.arrays import Array
from alignedkv.kernels.tune.synthetic import GeneratorNumbers, synthetic_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What attention is given, in float32; rows after the rotary embedding.

    Attributes
    ----------
    keys, values : float32 arrays [B, Hkv, T, D]
    query : float32 array [B, H, D]
        Of the last token.
    query_size : float32 array [B, Hkv, D]
        Mean |q| of each channel, over the group and other positions.
    scaling : float
        Softmax scale.
    """

    keys: Array
    values: Array
    query: Array
    query_size: Array
    scaling: float


def synthesise(
    kind: str,
    *,
    tokens: int,
    batch: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    seed: int = 0,
    xp: Any = np,
) -> Inputs:
    """Inputs with scores of a kind of `synthetic.KINDS`.

    Parameters
    ----------
    kind : str
    tokens, batch, kv_heads, group, head_dim : int
        T, B, Hkv, G, D.
    seed : int
    xp : module
        ``numpy`` or ``cupy``; their numbers differ.

    Raises
    ------
    TuningError
        If the kind is unknown or the head dimension odd.
    """
    shape = (batch, kv_heads, tokens, head_dim)
    keys, values = xp.empty(shape, np.float32), xp.empty(shape, np.float32)
    query = xp.empty((batch, kv_heads, group, head_dim), np.float32)
    for head in np.ndindex(batch, kv_heads):
        place = int(np.ravel_multi_index(head, (batch, kv_heads)))
        numbers = GeneratorNumbers(xp, (seed, place))
        keys[head], values[head], query[head] = synthetic_head(
            kind, tokens=tokens, group=group, head_dim=head_dim, numbers=numbers
        )
    return Inputs(
        keys=keys,
        values=values,
        query=query.reshape(batch, kv_heads * group, head_dim),
        query_size=xp.abs(query).mean(axis=2),
        scaling=1.0 / math.sqrt(head_dim),
    )


def tiled(
    heads: Sequence[tuple[Array, Array, Array]],
    *,
    tokens: int,
    batch: int,
    kv_heads: int,
    scaling: float,
    xp: Any = np,
) -> Inputs:
    """Captured heads repeated to a length and a batch.

    Parameters
    ----------
    heads : sequence of (k [t, D], v [t, D], q [G, positions, D])
        NumPy arrays; the last position's queries are used.  Heads take turns where more are wanted,
        and so do tokens: every copy of a token gets the score of the original.
    tokens, batch, kv_heads : int
        T, B, Hkv wanted.
    scaling : float
    xp : module

    Raises
    ------
    TuningError
        If there is no head, or their shapes differ.
    """
    shapes = {(k.shape, v.shape, q.shape) for k, v, q in heads}
    if len(shapes) != 1:
        raise TuningError(f"heads of shapes {sorted(shapes)}: give heads of one shape")
    group, _, head_dim = heads[0][2].shape
    shape = (batch, kv_heads, tokens, head_dim)
    keys, values = xp.empty(shape, np.float32), xp.empty(shape, np.float32)
    query = xp.empty((batch, kv_heads, group, head_dim), np.float32)
    query_size = xp.empty((batch, kv_heads, head_dim), np.float32)
    # Counted from the end, so that the newest tokens stay the newest.
    source = np.arange(tokens - 1, -1, -1) % heads[0][0].shape[0]
    source = heads[0][0].shape[0] - 1 - source
    for head in np.ndindex(batch, kv_heads):
        place = int(np.ravel_multi_index(head, (batch, kv_heads)))
        k, v, q = (np.asarray(part, np.float32) for part in heads[place % len(heads)])
        keys[head], values[head] = xp.asarray(k[source]), xp.asarray(v[source])
        query[head] = xp.asarray(q[:, -1])
        query_size[head] = xp.asarray(np.abs(q).mean(axis=(0, 1)))
    return Inputs(
        keys=keys,
        values=values,
        query=query.reshape(batch, kv_heads * group, head_dim),
        query_size=query_size,
        scaling=scaling,
    )
