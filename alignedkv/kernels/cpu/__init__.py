"""The Numba kernels: what runs where there is no GPU.

The functions of `reference` under the same names, for NumPy arrays, compiled on first use and kept
on disk (`compiled`).  They read only the planes that are needed and use all of Numba's threads.
`dequantise` and `fit_transforms` are the reference's: they run once a prefill.
"""

from __future__ import annotations

import numba
import numpy as np

from alignedkv.kernels import arithmetic
from alignedkv.kernels.arrays import (
    HEAD_HINTS,
    Array,
    CacheArrays,
    DecodeResult,
    HeadState,
    StepArguments,
)
from alignedkv.kernels.checks import check_query, check_rows
from alignedkv.kernels.cpu import rows, step, tile
from alignedkv.kernels.reference import (
    coarse,
    dequantise,
    fit_transforms,
    refuse_lost_rows,
    started,
    unknown_state,
)
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import (
    capacity_of,
    from_float64,
    to_float32,
    write_exact_rows,
)
from alignedkv.policy import BoundKind
from alignedkv.transform import hadamard_block

__all__ = ["decode", "dequantise", "encode", "fit_transforms", "probe"]

_KINDS = {
    BoundKind.ESTIMATE: tile.ESTIMATE,
    BoundKind.DETERMINISTIC: tile.DETERMINISTIC,
    BoundKind.STATISTICAL: tile.STATISTICAL,
}
#: A split takes at least this many tokens, and every thread gets two tasks if it can.
TOKENS_PER_SPLIT = 512
TASKS_PER_THREAD = 2

_NO_TABLE = np.zeros((1, 1), np.int32)
_NO_ROWS = np.zeros((1, 1, 1, 1), np.float32)
_NO_PLANE = np.zeros((1, 1), np.uint8)
_NO_SINKS = np.zeros(0, np.float32)


def encode(spec: DecodeSpec, cache: CacheArrays, keys: Array, values: Array) -> None:
    """Append rows to every sequence: see `reference.encode`."""
    check_rows(spec, cache, keys, values)
    if keys.shape[2] == 0:
        return
    seen = _view(spec, cache)
    lost = rows.encode(
        to_float32(keys, spec.row_dtype),
        to_float32(values, spec.row_dtype),
        cache.key_mean,
        cache.balance,
        cache.value_mean,
        cache.signs,
        hadamard_block(spec.channels),
        cache.dither,
        _flat(cache.key_planes),
        _flat(cache.value_planes),
        _widths(spec),
        seen.scales,
        seen.block_table,
        seen.page,
        seen.capacity,
        cache.lengths,
    )
    if lost.any():
        refuse_lost_rows(lost != 0, cache)
    write_exact_rows(cache, keys, values)
    cache.lengths[:] += np.int32(keys.shape[2])


def decode(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    state: HeadState,
    arguments: StepArguments,
    *,
    sinks: Array | None = None,
    splits: int | None = None,
) -> DecodeResult:
    """One decode step: see `reference.decode`.

    Parameters
    ----------
    splits : int, optional
        Parts into which each sequence is cut; by default as many as keep all threads busy.
    """
    check_query(spec, cache, query, state, sinks)
    batch, heads, _ = query.shape
    parts = heads // spec.subgroup
    output = np.empty(query.shape)
    answer = np.zeros((3, batch, heads), np.float32)
    hints = np.zeros((len(HEAD_HINTS), batch, heads), np.float32)
    reads = np.zeros((batch, parts, 2, spec.stored_planes), np.uint32)
    model = arithmetic.cpu(spec.channels, tile=tile.TILE)
    step.decode_step(
        _flat(cache.key_planes),
        _flat(cache.value_planes),
        _widths(spec),
        _view(spec, cache),
        _step(spec, arguments, model),
        to_float32(query, spec.query_dtype),
        cache.key_mean,
        cache.balance,
        cache.signs,
        hadamard_block(spec.channels),
        model.score_norm1,
        model.refined_norm1,
        cache.lengths,
        cache.starts,
        np.stack([getattr(state, name) for name in HEAD_HINTS]),
        int(state.step[0]),
        _NO_SINKS if sinks is None else sinks,
        splits or _splits(batch * parts, int(cache.lengths.max())),
        output,
        answer,
        hints,
        reads,
    )
    bound, size, missed = answer
    following = dict(zip(HEAD_HINTS, hints, strict=True))
    return DecodeResult(
        output=from_float64(output, spec.query_dtype),
        bound=bound,
        size=size,
        missed=missed.astype(np.uint8),
        reads=reads.reshape(batch, -1, spec.subgroups, *reads.shape[2:]).sum(2, dtype=np.uint32),
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
    """The state of a head of which nothing is known: see `reference.probe`."""
    unknown = unknown_state(*query.shape[:2])
    found = decode(spec, cache, query, unknown, coarse(arguments), sinks=sinks)
    return started(found, arguments.tolerance * start_theta)


def _splits(places: int, longest: int) -> int:
    wanted = -(-TASKS_PER_THREAD * numba.get_num_threads() // places)
    return max(1, min(wanted, longest // TOKENS_PER_SPLIT))


def _view(spec: DecodeSpec, cache: CacheArrays) -> tile.Stored:
    """All but the planes, as compiled functions take it: one type whatever the spec."""
    exact_keys, exact_values = _NO_ROWS, _NO_ROWS
    if cache.exact_keys is not None and cache.exact_values is not None:
        exact_keys = to_float32(cache.exact_keys, spec.row_dtype)
        exact_values = to_float32(cache.exact_values, spec.row_dtype)
    return tile.Stored(
        scales=cache.scales.reshape(-1),
        dither=cache.dither,
        value_mean=cache.value_mean,
        exact_keys=exact_keys,
        exact_values=exact_values,
        exact_first=cache.exact_first,
        exact_last=cache.exact_last,
        block_table=_NO_TABLE if cache.block_table is None else cache.block_table,
        page=spec.page_tokens or 0,
        capacity=capacity_of(spec, cache),
        heads=cache.key_mean.shape[1],
        stored=spec.stored_planes,
    )


def _flat(planes: tuple[Array, ...]) -> tuple[Array, ...]:
    """Four planes, flattened to rows."""
    rows = tuple(plane.reshape(-1, plane.shape[-1]) for plane in planes)
    return rows + (_NO_PLANE,) * (4 - len(rows))


def _widths(spec: DecodeSpec) -> tuple[int, ...]:
    """Four widths, 0 where a plane is not stored."""
    widths = spec.layout.widths[: spec.stored_planes]
    return widths + (0,) * (4 - len(widths))


def _step(spec: DecodeSpec, arguments: StepArguments, model: arithmetic.Arithmetic) -> tile.Step:
    return tile.Step(
        kind=_KINDS[spec.bound],
        sampled=spec.sample_values,
        scaling=arguments.scaling,
        tolerance=arguments.tolerance,
        deviations=arguments.deviations,
        skip_share=arguments.skip_share,
        margin=arguments.plan_margin,
        window=arguments.window,
        softcap=arguments.softcap if spec.softcap else 0.0,
        seed=arguments.seed,
        repairs=arguments.repairs,
        accumulation=model.accumulation,
        weight_error=model.weight,
    )
