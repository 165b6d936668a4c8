"""A decode step as Numba CUDA kernels: the twin of the CUDA C++ ones, to read and to compare.

The functions of `reference` under the same names, emitted from the same `DecodeSpec`: whatever the
spec fixes is a constant of the compiled kernels.  Three kernels make a step: `prepare` (a block a
query head), `split` (a block a split of a KV head) and `finish` (a block a query head); each repair
launches the last two again, and KV heads that need none return at once.  Nothing waits for the
host.

With ``NUMBA_ENABLE_CUDASIM=1`` in the environment before Numba is imported, the same kernels run in
Numba's simulator on NumPy arrays, a thousand times slower; otherwise arrays are CuPy's, Numba's or
whatever else has ``__cuda_array_interface__``, bfloat16 as uint16 bit patterns.  Rows are encoded
by `reference`, `cpu` or `launch`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.errors import LaunchError
from alignedkv.kernels.arrays import (
    HEAD_HINTS,
    Array,
    CacheArrays,
    DecodeResult,
    HeadState,
    StepArguments,
)
from alignedkv.kernels.checks import check_query
from alignedkv.kernels.numba_cuda.columns import (
    CLASS_SUMS,
    FACTS,
    Answer,
    Asked,
    Step,
    Stored,
    Work,
)
from alignedkv.kernels.numba_cuda.emit import compiled, emit
from alignedkv.kernels.numba_cuda.sums import count_sums
from alignedkv.kernels.reference import coarse, started, unknown_state
from alignedkv.kernels.sampling import SAMPLING_FACTOR
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import capacity_of, held_dtype
from alignedkv.policy import BoundKind

__all__ = ["decode", "emit", "launch", "launch_arguments", "probe"]

Prepared = tuple[Stored, Asked, Step, Work, Answer]

#: Whether Numba simulates: it reads the variable once, when it is imported.
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
#: Threads of a block, and tokens of a tile.  Simulated threads are slow to start and to meet.
THREADS = 16 if SIMULATED else 128
#: Blocks of `split` that a multiprocessor should find work in.
BLOCKS_PER_PROCESSOR = 4


def decode(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    state: HeadState,
    arguments: StepArguments,
    *,
    sinks: Array | None = None,
    splits: int | None = None,
    stream: Any = 0,
) -> DecodeResult:
    """One decode step: see `reference.decode`.

    Parameters
    ----------
    splits : int, optional
        Parts into which each sequence is cut; by default as many as fill the device.
    stream : int or Numba stream
        Where the kernels are queued; the result is there when they have run.

    Returns
    -------
    DecodeResult
        Numba device arrays; NumPy arrays from the simulator.

    Raises
    ------
    LaunchError
        If an array does not fit the cache, or is not on a GPU.
    """
    prepared = launch_arguments(spec, cache, query, state, arguments, sinks=sinks, splits=splits)
    launch(spec, prepared, stream=stream)
    cached, *_, answer = prepared
    shape = tuple(query.shape[:2])
    return DecodeResult(
        output=answer.output.reshape(tuple(query.shape)),
        bound=answer.bound.reshape(shape),
        size=answer.size.reshape(shape),
        missed=answer.missed.reshape(shape),
        reads=answer.reads.reshape((shape[0], cached.kv_heads, 2, spec.stored_planes)),
        state=HeadState(
            **{name: getattr(answer, name).reshape(shape) for name in HEAD_HINTS},
            step=answer.step,
        ),
    )


def launch(spec: DecodeSpec, prepared: Prepared, *, stream: Any = 0) -> None:
    """Queue the kernels of a step; nothing is allocated, so that a CUDA graph can capture it.

    Parameters
    ----------
    prepared : tuple
        From `launch_arguments`; its last part is written.
    stream : int or Numba stream
    """
    kernels = compiled(spec, threads=THREADS)
    asked, step, work = prepared[1:4]
    heads, parts = asked.query.shape[:2], work.tops.shape[:2]
    kernels.prepare[heads, THREADS, stream](*prepared)
    for attempt in range(step.repairs + 1):
        kernels.split[parts, THREADS, stream](*prepared, attempt)
        kernels.finish[heads, THREADS, stream](*prepared, attempt)


def probe(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    arguments: StepArguments,
    *,
    start_theta: float,
    sinks: Array | None = None,
) -> HeadState:
    """The state of a head of which nothing is known: see `reference.probe`.

    It comes back through the host, once a prefill.
    """
    nothing = unknown_state(*query.shape[:2])
    unknown = nothing.mapped(_put)
    found = decode(spec, cache, query, unknown, coarse(arguments), sinks=sinks)
    on_host = replace(found, size=_get(found.size), state=found.state.mapped(_get))
    return started(on_host, arguments.tolerance * start_theta).mapped(_put)


def launch_arguments(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    state: HeadState,
    arguments: StepArguments,
    *,
    sinks: Array | None = None,
    splits: int | None = None,
) -> Prepared:
    """What the kernels of a step are called with; workspace and answer are allocated here."""
    query = _seen("query", query)  # whose dtype is then NumPy's, whoever made it
    check_query(spec, cache, query, state, sinks)
    if splits is None:
        splits = _splits(spec, cache)
    batch, kv_heads, head_dim = cache.key_mean.shape
    group, homes = spec.subgroup, batch * kv_heads
    places = homes * spec.subgroups
    signs, lengths = _seen("signs", cache.signs), _seen("lengths", cache.lengths)
    seen_query = query.reshape((places, group, head_dim))

    def of_homes(name: str, array: Array) -> Array:
        return _seen(name, array).reshape((homes, *array.shape[2:]))

    def of_heads(name: str) -> Array:
        return _seen(f"state.{name}", getattr(state, name)).reshape((places, group))

    def rows(name: str) -> list[Array]:
        planes = [_seen(name, plane) for plane in getattr(cache, name)]
        return [plane.reshape((-1, plane.shape[-1])) for plane in planes]

    keys = [plane.view(np.uint32) for plane in rows("key_planes")]
    values = rows("value_planes")
    missing = 4 - spec.stored_planes
    exact = [
        seen_query if array is None else of_homes(name, array)
        for name, array in (
            ("exact_keys", cache.exact_keys),
            ("exact_values", cache.exact_values),
        )
    ]
    table = cache.block_table
    stored = Stored(
        key_planes=(*keys, *keys[:1] * missing),
        value_planes=(*values, *values[:1] * missing),
        scales=_seen("scales", cache.scales).reshape((-1,)),
        key_mean=of_homes("key_mean", cache.key_mean),
        balance=of_homes("balance", cache.balance),
        value_mean=of_homes("value_mean", cache.value_mean),
        signs=signs,
        dither=_seen("dither", cache.dither),
        lengths=lengths,
        starts=_seen("starts", cache.starts),
        block_table=lengths.reshape((1, -1)) if table is None else _seen("block_table", table),
        exact_keys=exact[0],
        exact_values=exact[1],
        exact_first=cache.exact_first,
        exact_last=cache.exact_last,
        kv_heads=kv_heads,
        capacity=capacity_of(spec, cache),
    )
    asked = Asked(
        query=seen_query,
        **{name: of_heads(name) for name in HEAD_HINTS},
        step=_seen("state.step", state.step),
        sinks=signs if sinks is None else _seen("sinks", sinks),
    )
    settled = spec.bound is BoundKind.STATISTICAL
    share = arguments.skip_share * (SAMPLING_FACTOR if spec.sample_values else 1.0)
    step = Step(
        scaling=float(arguments.scaling),
        tolerance=float(arguments.tolerance),
        deviations=float(arguments.deviations),
        share=float(share),
        margin=float(arguments.deviations if settled else arguments.plan_margin),
        softcap=float(arguments.softcap),
        window=int(arguments.window),
        seed=int(arguments.seed) & 0xFFFFFFFF,
        repairs=int(arguments.repairs),
    )
    heads, classes = (places, group), spec.dither_rows if settled else 1
    work = Work(
        queries=_new((*heads, spec.channels), "float32"),
        products=_new((*heads, spec.dither_rows), "float64"),
        facts=_new((*heads, FACTS), "float64"),
        wanted=_new((arguments.repairs + 2, *heads), "uint8"),
        tops=_new((places, splits, group), "float64"),
        sums=_new((places, splits, group, count_sums(spec)), "float64"),
        classes=_new((places, splits, group, CLASS_SUMS, classes), "float64"),
        outputs=_new((places, splits, group, spec.channels), "float64"),
    )
    answer = Answer(
        output=_new((*heads, head_dim), held_dtype(spec.query_dtype).name),
        bound=_new(heads, "float32"),
        size=_new(heads, "float32"),
        missed=_new(heads, "uint8"),
        reads=_new((homes, 2, spec.stored_planes), "uint32"),
        **{name: _new(heads, "float32") for name in HEAD_HINTS},
        step=_new((1,), "uint32"),
    )
    return stored, asked, step, work, answer


def _splits(spec: DecodeSpec, cache: CacheArrays) -> int:
    """Splits of a sequence, from what is known without asking the device: fixed for a cache."""
    tiles = -(-capacity_of(spec, cache) // THREADS)
    if SIMULATED:
        return min(2, tiles)
    places = int(cache.key_mean.shape[0]) * int(cache.key_mean.shape[1]) * spec.subgroups
    wanted = BLOCKS_PER_PROCESSOR * int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    return max(1, min(-(-wanted // places), tiles))


def _seen(name: str, array: Array) -> Array:
    """An array as kernels take it."""
    if SIMULATED:
        return array
    try:
        return cuda.as_cuda_array(array, sync=False)
    except TypeError:
        raise LaunchError(
            f"{name} is a {type(array).__name__}: give a CuPy or Numba device array, or set "
            "NUMBA_ENABLE_CUDASIM=1 before Numba is imported to run NumPy arrays in its simulator"
        ) from None


def _new(shape: tuple[int, ...], dtype: str) -> Array:
    return np.empty(shape, dtype) if SIMULATED else cuda.device_array(shape, dtype)


def _put(array: Array) -> Array:
    return array if SIMULATED else cuda.to_device(array)


def _get(array: Array) -> Array:
    return array if SIMULATED else array.copy_to_host()
