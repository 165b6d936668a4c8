"""The CUDA kernels, on torch's tensors and torch's current stream."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from alignedkv.kernels import launch
from alignedkv.kernels.arrays import CacheArrays, DecodeResult, HeadState
from alignedkv.kernels.config import DecodeConfig, blocks_of_step
from alignedkv.kernels.declarations import structs
from alignedkv.kernels.device import device_target
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget
from alignedkv.kernels.tune.wisdom import find
from alignedkv.kernels.workspace import Workspace, allocate_workspace
from alignedkv.runtime.dtypes import TORCH_DTYPES
from alignedkv.runtime.plan import StepPlan


class CudaBackend:
    """See `alignedkv.runtime.backend.Backend`."""

    def scratch(self, spec: DecodeSpec, cache: CacheArrays) -> list[Tensor]:
        """The workspace's scratch arrays, in the order of their declaration."""
        device = cache.scales.device

        def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
            return torch.zeros(shape, dtype=TORCH_DTYPES[dtype], device=device)

        config, target = _config(spec, cache)
        workspace = allocate_workspace(spec, config, target, cache, zeros=zeros)
        return [workspace.scratch[name] for name in _scratch_names()]

    def fit(
        self,
        plan: StepPlan,
        cache: CacheArrays,
        keys: Tensor,
        values: Tensor,
        query_size: Tensor | None,
    ) -> None:
        """See `Backend`."""
        launch.fit_transforms(plan.spec, cache, keys, values, query_size, stream=_stream(keys))

    def encode(self, plan: StepPlan, cache: CacheArrays, keys: Tensor, values: Tensor) -> None:
        """See `Backend`."""
        launch.encode(plan.spec, cache, keys, values, stream=_stream(keys))

    def probe(
        self,
        plan: StepPlan,
        cache: CacheArrays,
        state: HeadState,
        query: Tensor,
        sinks: Tensor | None,
    ) -> None:
        """See `Backend`."""
        launch.probe(
            plan.spec,
            cache,
            query,
            plan.arguments,
            start_theta=plan.start_theta,
            sinks=sinks,
            state=state,
            stream=_stream(query),
        )

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
        spec = plan.spec
        config, target = _config(spec, cache)
        batch, kv_heads, capacity = cache.scales.shape
        workspace = Workspace(
            scratch=dict(zip(_scratch_names(), scratch, strict=True)),
            outputs={
                "output": result.output,
                "bound": result.bound,
                "size": result.size,
                "missed": result.missed,
                "reads": result.reads,
            },
            blocks=blocks_of_step(config, target, heads=batch * kv_heads, capacity=capacity),
        )
        launch.step(
            spec,
            config,
            cache,
            keys,
            values,
            query,
            result.state,
            plan.arguments,
            workspace,
            sinks=sinks,
            stream=_stream(query),
        )

    def read(self, plan: StepPlan, cache: CacheArrays, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        batch, kv_heads, head_dim = cache.key_mean.shape
        shape = (batch, kv_heads, tokens, head_dim)
        out = (
            torch.empty(shape, dtype=torch.float32, device=cache.scales.device),
            torch.empty(shape, dtype=torch.float32, device=cache.scales.device),
        )
        launch.dequantise(plan.spec, cache, tokens=tokens, out=out, stream=_stream(cache.scales))
        return out


def _config(spec: DecodeSpec, cache: CacheArrays) -> tuple[DecodeConfig, DeviceTarget]:
    batch, kv_heads, capacity = cache.scales.shape
    return _decided(spec, cache.scales.device.index, capacity, batch * kv_heads)


@functools.cache
def _decided(
    spec: DecodeSpec, device: int, capacity: int, heads: int
) -> tuple[DecodeConfig, DeviceTarget]:
    """The fastest configuration known, decided once: its scratch must not meet another's step."""
    target = device_target(device)
    return find(spec, target, tokens=capacity, heads=heads).config, target


def _scratch_names() -> list[str]:
    return [member.name for member in structs()["Workspace"]]


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
