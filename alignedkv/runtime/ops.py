"""The torch operators of a cache layer: opaque to torch.compile, in place, on torch's stream.

Tensors come in lists so that an operator's mutations are declared exactly:

- ``rows``: N key planes, N value planes, scales, lengths and, with exact rows, the two buffers;
- ``constants``: key_mean, balance, value_mean, signs, dither, starts;
- ``state``: the fields of `HeadState` in their order;
- ``results``: bound, size, missed, reads;
- ``scratch``: what the backend asked for.

Shapes and meanings are those of `CacheArrays`, `HeadState` and `DecodeResult`.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from alignedkv.kernels.arrays import CacheArrays, DecodeResult, HeadState
from alignedkv.runtime.backend import backend_for
from alignedkv.runtime.plan import StepPlan, parse_plan


def pack_rows(cache: CacheArrays) -> list[Tensor]:
    """The ``rows`` of a cache."""
    exact = [] if cache.exact_keys is None else [cache.exact_keys, cache.exact_values]
    return [*cache.key_planes, *cache.value_planes, cache.scales, cache.lengths, *exact]


def pack_constants(cache: CacheArrays) -> list[Tensor]:
    """The ``constants`` of a cache."""
    means = [cache.key_mean, cache.balance, cache.value_mean]
    return [*means, cache.signs, cache.dither, cache.starts]


def unpack(plan: StepPlan, rows: list[Tensor], constants: list[Tensor]) -> CacheArrays:
    """The cache whose lists these are, for the operators of ``plan``."""
    exact = plan.exact_first, plan.exact_last
    return unpack_rows(plan.spec.stored_planes, rows, constants, exact)


def unpack_rows(
    planes: int, rows: list[Tensor], constants: list[Tensor], exact_rows: tuple[int, int]
) -> CacheArrays:
    """The cache of N = ``planes`` stored planes and so many exact rows at either end."""
    scales, lengths, *exact = rows[2 * planes :]
    exact_keys, exact_values = exact if exact else (None, None)
    key_mean, balance, value_mean, signs, dither, starts = constants
    return CacheArrays(
        key_planes=tuple(rows[:planes]),
        value_planes=tuple(rows[planes : 2 * planes]),
        scales=scales,
        key_mean=key_mean,
        balance=balance,
        value_mean=value_mean,
        signs=signs,
        dither=dither,
        lengths=lengths,
        starts=starts,
        exact_keys=exact_keys,
        exact_values=exact_values,
        exact_first=exact_rows[0],
        exact_last=exact_rows[1],
    )


def _head_state(state: list[Tensor]) -> HeadState:
    return HeadState(**dict(zip(HeadState.__slots__, state, strict=True)))


@library.custom_op("alignedkv::fit", mutates_args=("constants",))
def fit(
    plan: str,
    rows: list[Tensor],
    constants: list[Tensor],
    keys: Tensor,
    values: Tensor,
    query_size: Tensor | None,
) -> None:
    """Set means and balance from rows [B, Hkv, S, D]; ``query_size`` is E|q| [B, Hkv, D]."""
    parsed = parse_plan(plan)
    cache = unpack(parsed, rows, constants)
    rows_given = keys.contiguous(), values.contiguous()
    backend_for(keys.device).fit(parsed, cache, *rows_given, query_size)


@library.custom_op("alignedkv::encode", mutates_args=("rows",))
def encode(
    plan: str, rows: list[Tensor], constants: list[Tensor], keys: Tensor, values: Tensor
) -> None:
    """Append rows [B, Hkv, S, D]."""
    parsed = parse_plan(plan)
    backend_for(keys.device).encode(
        parsed, unpack(parsed, rows, constants), keys.contiguous(), values.contiguous()
    )


@library.custom_op("alignedkv::probe", mutates_args=("state",))
def probe(
    plan: str,
    rows: list[Tensor],
    constants: list[Tensor],
    state: list[Tensor],
    query: Tensor,
    sinks: Tensor | None,
) -> None:
    """Write the hints for the next step into ``state``; ``query`` is [B, H, D]."""
    parsed = parse_plan(plan)
    backend_for(query.device).probe(
        parsed, unpack(parsed, rows, constants), _head_state(state), query.contiguous(), sinks
    )


@library.custom_op("alignedkv::step", mutates_args=("rows", "state", "results", "scratch"))
def step(
    plan: str,
    rows: list[Tensor],
    constants: list[Tensor],
    state: list[Tensor],
    results: list[Tensor],
    scratch: list[Tensor],
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Append one token [B, Hkv, 1, D] and attend with ``query`` [B, H, D]: the output [B, H, D]."""
    parsed = parse_plan(plan)
    query = query.contiguous()
    output = torch.empty_like(query)
    bound, size, missed, reads = results
    result = DecodeResult(
        output=output,
        bound=bound,
        size=size,
        missed=missed,
        reads=reads,
        state=_head_state(state),
    )
    backend_for(query.device).step(
        parsed,
        unpack(parsed, rows, constants),
        result,
        scratch,
        keys.contiguous(),
        values.contiguous(),
        query,
        sinks,
    )
    return output


@library.custom_op("alignedkv::read", mutates_args=())
def read(
    plan: str, rows: list[Tensor], constants: list[Tensor], tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, tokens, D] in ``dtype``, from all stored planes."""
    parsed = parse_plan(plan)
    keys, values = backend_for(rows[0].device).read(parsed, unpack(parsed, rows, constants), tokens)
    return keys.to(dtype), values.to(dtype)


@fit.register_fake
def _(
    plan: str,
    rows: list[Tensor],
    constants: list[Tensor],
    keys: Tensor,
    values: Tensor,
    query_size: Tensor | None,
) -> None:
    return None


@encode.register_fake
def _(plan: str, rows: list[Tensor], constants: list[Tensor], keys: Tensor, values: Tensor) -> None:
    return None


@probe.register_fake
def _(
    plan: str,
    rows: list[Tensor],
    constants: list[Tensor],
    state: list[Tensor],
    query: Tensor,
    sinks: Tensor | None,
) -> None:
    return None


@step.register_fake
def _(
    plan: str,
    rows: list[Tensor],
    constants: list[Tensor],
    state: list[Tensor],
    results: list[Tensor],
    scratch: list[Tensor],
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@read.register_fake
def _(
    plan: str, rows: list[Tensor], constants: list[Tensor], tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, _ = rows[2 * parse_plan(plan).spec.stored_planes].shape
    shape = (batch, kv_heads, tokens, parse_plan(plan).spec.head_dim)
    keys = torch.empty(shape, dtype=dtype, device=rows[0].device)
    return keys, torch.empty_like(keys)
