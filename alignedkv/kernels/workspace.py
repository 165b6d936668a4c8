"""Memory that a step needs besides the cache: allocated once, so that a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

from alignedkv.kernels.arguments import Sizes, Zeros, allocate_struct
from alignedkv.kernels.arrays import Array, CacheArrays, DecodeResult, HeadState
from alignedkv.kernels.config import DecodeConfig, splits_per_head
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What a step writes.

    Attributes
    ----------
    scratch : dict of str to array
        By their names in ``struct Workspace`` of ``cuda/arguments.cuh``.
    result : DecodeResult
        Overwritten by every step.  Its state is the one that the step reads and replaces.
    splits : int
        Blocks per KV head.
    """

    scratch: dict[str, Array]
    result: DecodeResult
    splits: int


def allocate_workspace(
    spec: DecodeSpec,
    config: DecodeConfig,
    target: DeviceTarget,
    cache: CacheArrays,
    *,
    zeros: Zeros,
) -> Workspace:
    """Allocate for one cache, or for all caches of the same sizes whose steps follow one another.

    Parameters
    ----------
    spec, config, target
        Of the steps to come.
    cache : CacheArrays
    zeros : callable
        ``zeros(shape, dtype)`` -> zeroed array on the cache's GPU (`storage.allocate`).
    """
    batch, kv_heads = int(cache.key_mean.shape[0]), int(cache.key_mean.shape[1])
    capacity = Sizes.of(spec, cache).names["T"]
    splits = splits_per_head(config, target, heads=batch * kv_heads, capacity=capacity)
    sizes = Sizes.of(spec, cache, splits=splits)
    return Workspace(
        scratch=allocate_struct("Workspace", spec, sizes, zeros),
        result=DecodeResult(
            **allocate_struct("Result", spec, sizes, zeros),
            state=HeadState(**allocate_struct("State", spec, sizes, zeros)),
        ),
        splits=splits,
    )
