"""Attention inputs to tune and measure on: synthetic ones, and captured ones at any length.

How many bytes a step reads depends on its scores, so a time means nothing without their kind.
Arrays are NumPy's or CuPy's: whoever calls says which module makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from alignedkv.errors import TuningError
from alignedkv.kernels.arrays import Array

#: Standard deviation of the scores of each synthetic kind.
SCORE_DEVIATION: Final = {"flat": 0.7, "mixed": 2.2, "peaky": 5.0}
SYNTHETIC: Final = tuple(SCORE_DEVIATION)
#: Base of the rotary embedding's angles.
ROTARY_BASE: Final = 1e4
#: Geometric weights of the moving average that makes neighbouring tokens alike.
_MEMORY, _TAPS = 0.7, 12
#: Queries drawn per head: the first is used, the others tell how large a channel is on average.
_QUERIES = 9


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
    """Heads that look like a model's: rotated keys with large slow channels, and a sink.

    Parameters
    ----------
    kind : str
        "flat" (scores of deviation 0.7, no sink, unrelated tokens), "mixed" (2.2) or "peaky" (5.0),
        these with a sink token and with neighbours alike.
    tokens, batch, kv_heads, group, head_dim : int
        T, B, Hkv, G, D.
    seed : int
    xp : module
        ``numpy`` or ``cupy``; their numbers differ.

    Raises
    ------
    TuningError
        If the kind is unknown.
    """
    if kind not in SYNTHETIC:
        raise TuningError(f"data {kind!r}: give one of {', '.join(SYNTHETIC)}")
    shape = (batch, kv_heads, tokens, head_dim)
    keys, values = xp.empty(shape, np.float32), xp.empty(shape, np.float32)
    query = xp.empty((batch, kv_heads, group, head_dim), np.float32)
    query_size = xp.empty((batch, kv_heads, head_dim), np.float32)
    turn = _rotation(tokens, head_dim, xp)
    for head in np.ndindex(batch, kv_heads):
        place = np.ravel_multi_index(head, (batch, kv_heads))
        made = _head(kind, (tokens, head_dim, group), turn, seed=(seed, int(place)), xp=xp)
        keys[head], values[head], queries = made
        query[head] = queries[:, 0]
        query_size[head] = xp.abs(queries[:, 1:]).mean(axis=(0, 1))
    return Inputs(
        keys=keys,
        values=values,
        query=query.reshape(batch, kv_heads * group, head_dim),
        query_size=query_size,
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


def _rotation(tokens: int, head_dim: int, xp: Any) -> tuple[Array, Array]:
    """Cosine and sine [T, D/2] of the rotary embedding's angles."""
    half = head_dim // 2
    rates = ROTARY_BASE ** (-np.arange(half) / half)
    angles = xp.arange(tokens, dtype=np.float64)[:, None] * xp.asarray(rates)
    return xp.cos(angles).astype(np.float32), xp.sin(angles).astype(np.float32)


def _rotated(rows: Array, turn: tuple[Array, Array], xp: Any) -> Array:
    cosine, sine = turn
    half = rows.shape[-1] // 2
    a, b = rows[..., :half], rows[..., half:]
    return xp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


def _head(
    kind: str,
    sizes: tuple[int, int, int],
    turn: tuple[Array, Array],
    *,
    seed: tuple[int, int],
    xp: Any,
) -> tuple[Array, Array, Array]:
    """Keys [T, D], values [T, D] and queries [G, 9, D] of one KV head."""
    tokens, head_dim, group = sizes
    few = np.random.default_rng(seed)
    many = xp.random.default_rng(int(few.integers(1 << 62)))

    def normal(*shape: int) -> Array:
        return many.standard_normal(shape, dtype=np.float32)

    def put(row: np.ndarray[Any, Any]) -> Array:
        return xp.asarray(row.astype(np.float32))

    content = normal(tokens, head_dim)
    if kind != "flat":
        content = _smoothed(content, xp)
    # Slow channels hold a large mean, as keys of trained models do.
    slow = head_dim // 2 - 1 - few.integers(0, head_dim // 8, 4)
    slow[2:] += head_dim // 2
    mean = np.zeros(head_dim)
    mean[slow] = few.choice([-1.0, 1.0], 4) * few.uniform(5.0, 12.0, 4)
    sizes_of_channels = np.exp(0.5 * few.standard_normal(head_dim))
    keys = _rotated(content * put(sizes_of_channels) + put(mean), turn, xp)

    value_sizes = np.exp(0.3 * few.standard_normal(head_dim))
    values = normal(tokens, head_dim) * put(value_sizes)
    values += put(0.3 * few.standard_normal(head_dim))

    newest = turn[0][-1:], turn[1][-1:]
    queries = _rotated(normal(group, _QUERIES, head_dim) + put(0.05 * mean), newest, xp)
    scores = queries @ keys.T / math.sqrt(head_dim)
    deviation = xp.maximum(scores.std(axis=-1, keepdims=True), 1e-6)
    queries = queries * (SCORE_DEVIATION[kind] / deviation)
    if kind != "flat":
        # A sink: token 0 takes the group's mean query to a score that outweighs many others, and
        # holds little value.
        aim = queries[:, 0].mean(axis=0)
        score = math.log(tokens) + (2.0 if kind == "mixed" else 0.0)
        keys[0] = aim * (score * math.sqrt(head_dim) / (aim @ aim))
        values[0] *= 0.05
    return keys, values, queries


def _smoothed(rows: Array, xp: Any) -> Array:
    """A moving average over tokens that leaves the variance as it is."""
    weights = _MEMORY ** np.arange(_TAPS)
    weights /= math.sqrt(float((weights**2).sum()))
    total = xp.zeros_like(rows)
    for shift, weight in enumerate(weights):
        total += float(weight) * xp.roll(rows, shift, axis=0)
    return total
