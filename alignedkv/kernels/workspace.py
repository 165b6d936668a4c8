"""Memory that a step needs besides the cache: allocated once, so that a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.arguments import Sizes, Zeros, allocate_struct
from alignedkv.kernels.arrays import Array, CacheArrays
from alignedkv.kernels.config import DecodeConfig, blocks_of_step
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What a step writes besides the state.

    Attributes
    ----------
    scratch : dict of str to array
        By their names in ``struct Workspace`` of ``cuda/arguments.cuh``; all zero at first, and
        left by every step as the next one wants it.
    outputs : dict of str to array
        Fields of `DecodeResult` without the state; overwritten by every step.
    blocks : int
        That share the KV heads, or the subgroups of their queries.
    packed : dict
        Structs as the last step packed them, with the objects that they were packed from: a step
        with the same cache and state need not look at their arrays again.
    """

    scratch: dict[str, Array]
    outputs: dict[str, Array]
    blocks: int
    packed: dict[str, tuple[object, NDArray[np.void]]] = field(
        default_factory=dict, repr=False, compare=False
    )


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
    heads = batch * kv_heads * spec.subgroups
    capacity = Sizes.of(spec, cache).names["T"]
    blocks = blocks_of_step(config, target, heads=heads, capacity=capacity)
    sizes = Sizes.of(spec, cache, blocks=blocks)
    return Workspace(
        scratch=allocate_struct("Workspace", spec, sizes, zeros),
        outputs=allocate_struct("Result", spec, sizes, zeros),
        blocks=blocks,
    )
