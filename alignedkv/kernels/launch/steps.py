"""Steps: decode, probe, and append + decode in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from alignedkv.errors import LaunchError
from alignedkv.kernels.arguments import Sizes, as_mapping, cache_values, new_rows, pack
from alignedkv.kernels.arrays import (
    START_HINTS,
    Array,
    CacheArrays,
    DecodeResult,
    HeadState,
    StepArguments,
)
from alignedkv.kernels.config import WARP, DecodeConfig, blocks_go_by_work
from alignedkv.kernels.device import Place, device_target
from alignedkv.kernels.device_array import DeviceArray
from alignedkv.kernels.footprint import shared_bytes
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.tune.wisdom import find
from alignedkv.kernels.workspace import Workspace, allocate_workspace
from alignedkv.policy import START_MARGIN

#: Warps of a block of prepare.cu; ``kPrepareWarps`` of turn.cuh.
PREPARE_WARPS = 10
#: `NewRows` of a step that appends nothing.
_NO_ROWS = {
    "keys": None,
    "values": None,
    "key_strides": (0, 0, 0),
    "value_strides": (0, 0, 0),
    "tokens": 0,
}


def configuration(spec: DecodeSpec, cache: CacheArrays) -> DecodeConfig:
    """The fastest configuration known for such a cache on its GPU; the default if untuned."""
    target = device_target(DeviceArray.of("scales", cache.scales).device)
    names = Sizes.of(spec, cache).names
    return find(spec, target, tokens=names["T"], heads=names["B"] * names["Hkv"]).config


def decode(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    state: HeadState,
    arguments: StepArguments,
    *,
    sinks: Array | None = None,
    config: DecodeConfig | None = None,
    workspace: Workspace | None = None,
    stream: int | None = None,
) -> DecodeResult:
    """Attend to a cache.

    Parameters
    ----------
    spec : DecodeSpec
    cache : CacheArrays
        Not changed.
    query : array [B, H, D] in query_dtype
    state : HeadState
        Hints of the step before; not changed.
    arguments : StepArguments
    sinks : float32 array [H], optional
        Logits, where the spec has sinks.
    config : DecodeConfig, optional
        `configuration` if not given.
    workspace : Workspace, optional
        Allocated if not given.
    stream : int, optional
        Handle of a CUDA stream.

    Returns
    -------
    DecodeResult
        Arrays of the workspace; a state of its own, as CuPy arrays.

    Raises
    ------
    LaunchError
        If an array is not what the spec and the cache take.
    """
    place = Place.of(spec, cache.scales, config or configuration(spec, cache), stream)
    if workspace is None:
        workspace = allocate_workspace(spec, place.config, place.target, cache, zeros=place.zeros)
    following = state.mapped(place.copy)
    return _run(place, cache, _NO_ROWS, query, following, arguments, workspace, sinks)


def probe(
    spec: DecodeSpec,
    cache: CacheArrays,
    query: Array,
    arguments: StepArguments,
    *,
    start_theta: float,
    sinks: Array | None = None,
    state: HeadState | None = None,
    config: DecodeConfig | None = None,
    workspace: Workspace | None = None,
    stream: int | None = None,
) -> HeadState:
    """The state of heads of which nothing is known: one pass over the first planes alone.

    Parameters
    ----------
    spec, cache, query, arguments, sinks, config, workspace, stream
        As for `decode`.
    start_theta : float
        theta / tau from which feedback starts (`PrecisionPolicy.start_theta`).
    state : HeadState, optional
        Where to write; CuPy arrays are made if not given.
    """
    place = Place.of(spec, cache.scales, config or configuration(spec, cache), stream)
    if workspace is None:
        workspace = allocate_workspace(spec, place.config, place.target, cache, zeros=place.zeros)
    if state is None:
        heads = tuple(query.shape[:2])
        state = HeadState(
            **{name: place.zeros(heads, "float32") for name in START_HINTS},
            step=place.zeros((1,), "uint32"),
            work=place.zeros(heads, "float32"),
        )
    for name, value in START_HINTS.items():
        place.fill(getattr(state, name), value)
    if state.work is not None:
        place.fill(state.work, 0)
    coarse = replace(arguments, skip_share=0.0, repairs=0)
    found = _run(place, cache, _NO_ROWS, query, state, coarse, workspace, sinks)
    place.scale(state.theta, found.size, arguments.tolerance * start_theta)
    place.fill(state.margin, START_MARGIN)
    place.fill(state.step, 0)
    return state


def step(
    spec: DecodeSpec,
    config: DecodeConfig,
    cache: CacheArrays,
    keys: Array | None,
    values: Array | None,
    query: Array,
    state: HeadState,
    arguments: StepArguments,
    workspace: Workspace,
    *,
    sinks: Array | None = None,
    stream: int | None = None,
) -> DecodeResult:
    """Append a token and attend: no allocation and no waiting, so that a CUDA graph can capture it.

    Parameters
    ----------
    spec, config, cache, query, arguments, sinks, stream
        As for `decode`; the cache grows by one token per sequence.
    keys, values : arrays [B, Hkv, 1, D] in row_dtype, or None
        None for both appends nothing: several steps over one cache, as a benchmark makes them.
    state : HeadState
        Hints of the step before; replaced by those for the next.
    workspace : Workspace
        Its outputs are overwritten.

    Notes
    -----
    Whether there is room for the token only the device knows here: the output of a sequence that is
    full is NaN, its bound infinite, and it counts as missed.
    """
    place = Place.of(spec, cache.scales, config, stream)
    if keys is None and values is None:
        rows = _NO_ROWS
    else:
        rows = new_rows(keys, values)
        if rows["tokens"] != 1:
            raise LaunchError(f"a step appends one token, not {rows['tokens']}: use encode")
    return _run(place, cache, rows, query, state, arguments, workspace, sinks)


def _run(
    place: Place,
    cache: CacheArrays,
    rows: dict[str, Any],
    query: Array,
    state: HeadState,
    arguments: StepArguments,
    workspace: Workspace,
    sinks: Array | None,
) -> DecodeResult:
    """Launch prepare.cu, then decode.cu once and again for each repair.

    Blocks of a repair whose heads all hold their bound return at once.
    """
    spec, config = place.spec, place.config
    _check_options(spec, arguments, sinks)
    sizes = Sizes.of(spec, cache, S=rows["tokens"], blocks=workspace.blocks)

    def packed_once(struct: str, source: object, values: Callable[[], dict[str, Any]]) -> Any:
        known = workspace.packed.get(struct)
        if known is None or known[0] is not source:
            known = source, pack(struct, spec, sizes, values(), device=place.device)
            workspace.packed[struct] = known
        return known[1]

    batch, kv_heads = sizes.names["B"], sizes.names["Hkv"]
    heads = batch * kv_heads * spec.subgroups
    given = {
        "cache": packed_once("Cache", cache, lambda: cache_values(spec, cache)),
        "rows": rows,
        "state": packed_once("State", state, lambda: as_mapping(state)),
        "step": packed_once("Step", arguments, lambda: _step_values(arguments)),
        "workspace": packed_once("Workspace", workspace, lambda: workspace.scratch),
        "result": packed_once("Result", workspace, lambda: workspace.outputs),
        "query": query,
        "sinks": sinks,
        "heads": heads,
        "by_work": state.work is not None
        and blocks_go_by_work(config, workspace.blocks, heads=heads, capacity=sizes.names["T"]),
        "pass": 0,
    }
    packed = pack("DecodeArguments", spec, sizes, given, device=place.device)
    place.launch(
        "prepare.cu",
        "prepare",
        packed,
        grid=(kv_heads, batch),
        block=(WARP * PREPARE_WARPS, 1),
        overlapping=True,
    )
    for number in range(1 + arguments.repairs):
        packed["pass"] = number
        place.launch(
            "decode.cu",
            "decode",
            packed,
            grid=(workspace.blocks, 1),
            block=(WARP * config.warps, 1),
            shared_bytes=shared_bytes(spec, config),
            overlapping=True,
        )
    return DecodeResult(**workspace.outputs, state=state)


def _step_values(arguments: StepArguments) -> dict[str, Any]:
    """Values of ``struct Step``; a seed of any sign and size."""
    return {**as_mapping(arguments), "seed": arguments.seed & 0xFFFFFFFF}


def _check_options(spec: DecodeSpec, arguments: StepArguments, sinks: Array | None) -> None:
    """Raise LaunchError where run-time arguments contradict the spec."""
    if spec.sinks != (sinks is not None):
        given = "no sinks" if sinks is None else "sinks"
        raise LaunchError(f"{given} given, but DecodeSpec.sinks={spec.sinks}: change one of them")
    if spec.softcap != (arguments.softcap > 0):
        raise LaunchError(
            f"softcap {arguments.softcap} given, but DecodeSpec.softcap={spec.softcap}: a spec "
            "with a softcap takes a positive one, a spec without takes 0"
        )
