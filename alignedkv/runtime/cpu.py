"""The Numba kernels, on the memory of torch's CPU tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignedkv.kernels import cpu
from alignedkv.kernels.arrays import HEAD_HINTS, CacheArrays, DecodeResult, HeadState
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.runtime.plan import StepPlan

Array = NDArray[np.generic]


class CpuBackend:
    """See `alignedkv.runtime.backend.Backend`."""

    def scratch(self, spec: DecodeSpec, cache: CacheArrays) -> list[Tensor]:
        """Nothing: the functions allocate what they need."""
        return []

    def fit(
        self,
        plan: StepPlan,
        cache: CacheArrays,
        keys: Tensor,
        values: Tensor,
        query_size: Tensor | None,
    ) -> None:
        """See `Backend`."""
        size = None if query_size is None else _numpy(query_size)
        rows = _numpy(keys), _numpy(values)
        cpu.fit_transforms(plan.spec, _numpy_cache(cache), *rows, size)

    def encode(self, plan: StepPlan, cache: CacheArrays, keys: Tensor, values: Tensor) -> None:
        """See `Backend`."""
        cpu.encode(plan.spec, _numpy_cache(cache), _numpy(keys), _numpy(values))

    def probe(
        self,
        plan: StepPlan,
        cache: CacheArrays,
        state: HeadState,
        query: Tensor,
        sinks: Tensor | None,
    ) -> None:
        """See `Backend`."""
        found = cpu.probe(
            plan.spec,
            _numpy_cache(cache),
            _numpy(query),
            plan.arguments,
            start_theta=plan.start_theta,
            sinks=None if sinks is None else _numpy(sinks),
        )
        _write_state(state, found)

    def step(
        self,
        plan: StepPlan,
        cache: CacheArrays,
        result: DecodeResult,
        scratch: list[Tensor],
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        sinks: Tensor | None,
    ) -> None:
        """See `Backend`."""
        arrays = _numpy_cache(cache)
        cpu.encode(plan.spec, arrays, _numpy(keys), _numpy(values))
        answer = cpu.decode(
            plan.spec,
            arrays,
            _numpy(query),
            _numpy_state(result.state),
            plan.arguments,
            sinks=None if sinks is None else _numpy(sinks),
        )
        for name in ("output", "bound", "size", "missed", "reads"):
            _write(getattr(result, name), getattr(answer, name))
        _write_state(result.state, answer.state)

    def read(self, plan: StepPlan, cache: CacheArrays, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        keys, values = cpu.dequantise(plan.spec, _numpy_cache(cache), tokens=tokens)
        return torch.from_numpy(keys), torch.from_numpy(values)


def _numpy(tensor: Tensor) -> Array:
    """The memory of a CPU tensor as NumPy; bfloat16 as its bit patterns, int32 stays int32."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
        return tensor.numpy().view(np.uint16)
    return tensor.numpy()


def _unsigned(tensor: Tensor) -> Array:
    return _numpy(tensor).view(np.uint32)


def _numpy_cache(cache: CacheArrays) -> CacheArrays:
    def seen(tensor: Tensor | None) -> Array | None:
        return None if tensor is None else _numpy(tensor)

    return CacheArrays(
        key_planes=tuple(map(_numpy, cache.key_planes)),
        value_planes=tuple(map(_numpy, cache.value_planes)),
        scales=_unsigned(cache.scales),
        key_mean=_numpy(cache.key_mean),
        balance=_numpy(cache.balance),
        value_mean=_numpy(cache.value_mean),
        signs=_numpy(cache.signs),
        dither=_numpy(cache.dither),
        lengths=_numpy(cache.lengths),
        starts=_numpy(cache.starts),
        exact_keys=seen(cache.exact_keys),
        exact_values=seen(cache.exact_values),
        exact_first=cache.exact_first,
        exact_last=cache.exact_last,
    )


def _numpy_state(state: HeadState) -> HeadState:
    hints = {name: _numpy(getattr(state, name)) for name in HEAD_HINTS}
    return HeadState(**hints, step=_unsigned(state.step))


def _write(tensor: Tensor, array: Array) -> None:
    seen = _numpy(tensor)
    seen[...] = array.view(seen.dtype) if array.dtype.itemsize == seen.dtype.itemsize else array


def _write_state(state: HeadState, found: HeadState) -> None:
    for name in (*HEAD_HINTS, "step"):
        _write(getattr(state, name), np.asarray(getattr(found, name)))
