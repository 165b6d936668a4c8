"""Arguments of the implementations that take NumPy arrays, refused where they do not fit."""

from __future__ import annotations

import numpy as np

from alignedkv.errors import LaunchError
from alignedkv.kernels.arrays import HEAD_HINTS, Array, CacheArrays, HeadState
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import capacity_of, held_dtype


def check_rows(spec: DecodeSpec, cache: CacheArrays, keys: Array, values: Array) -> None:
    """Raise LaunchError unless keys and values [B, Hkv, S, D] fit behind the cache's lengths."""
    batch, kv_heads, head_dim = cache.key_mean.shape
    for name, rows in (("keys", keys), ("values", values)):
        shape = tuple(rows.shape)
        if len(shape) != 4 or shape[:2] != (batch, kv_heads) or shape[3] != head_dim:
            raise LaunchError(
                f"{name} have shape {shape}: this cache takes ({batch}, {kv_heads}, S, {head_dim})"
            )
        check_dtype(name, rows, spec.row_dtype)
    if keys.shape != values.shape:
        raise LaunchError(f"keys have {keys.shape[2]} rows and values {values.shape[2]}: give both")
    longest, capacity = int(np.max(cache.lengths)) + keys.shape[2], capacity_of(spec, cache)
    if longest > capacity:
        raise LaunchError(
            f"{keys.shape[2]} more tokens make {longest}, but the cache has room for {capacity}: "
            "allocate a larger one"
        )


def check_query(
    spec: DecodeSpec, cache: CacheArrays, query: Array, state: HeadState, sinks: Array | None
) -> None:
    """Raise LaunchError unless query [B, H, D], hints [B, H] and sinks [H] fit the cache."""
    batch, kv_heads, head_dim = cache.key_mean.shape
    heads = kv_heads * spec.group
    if tuple(query.shape) != (batch, heads, head_dim):
        raise LaunchError(
            f"query has shape {tuple(query.shape)}: this cache takes ({batch}, {heads}, {head_dim})"
        )
    check_dtype("query", query, spec.query_dtype)
    for name in HEAD_HINTS:
        shape = tuple(getattr(state, name).shape)
        if shape != (batch, heads):
            raise LaunchError(f"state.{name} has shape {shape}: give ({batch}, {heads})")
    if spec.sinks and (sinks is None or tuple(sinks.shape) != (heads,)):
        given = None if sinks is None else tuple(sinks.shape)
        raise LaunchError(f"sinks have shape {given}: give one logit a head, ({heads},)")
    if not spec.sinks and sinks is not None:
        raise LaunchError("sinks given to a spec without them: set DecodeSpec.sinks")


def check_dtype(name: str, array: Array, dtype: str) -> None:
    """Raise LaunchError unless a NumPy array holds the named dtype (bfloat16 as uint16)."""
    wanted = held_dtype(dtype)
    if array.dtype != wanted:
        pattern = ", as uint16 bit patterns" if dtype == "bfloat16" else ""
        raise LaunchError(f"{name} are {array.dtype}: this spec takes {dtype}{pattern}")
