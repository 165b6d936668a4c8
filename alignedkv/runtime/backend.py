"""Which kernels serve a device: one interface, two implementations, chosen by the device alone.

The operators of `ops` and the cache layers of `layers` hold torch tensors; a backend shows them to
its kernels without a copy. A device without its backend is an error, never a reason for another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from alignedkv.errors import UnsupportedModelError
from alignedkv.kernels.arrays import CacheArrays, DecodeResult, HeadState
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.runtime.plan import StepPlan


class Backend(Protocol):
    """What the runtime wants of kernels; arrays are torch tensors of the backend's device."""

    def scratch(self, spec: DecodeSpec, cache: CacheArrays) -> list[Tensor]:
        """Memory that `step` needs besides its arguments; grows with the cache."""

    def fit(
        self,
        plan: StepPlan,
        cache: CacheArrays,
        keys: Tensor,
        values: Tensor,
        query_size: Tensor | None,
    ) -> None:
        """Set means and balance from rows [B, Hkv, S, D] that are about to be encoded."""

    def encode(self, plan: StepPlan, cache: CacheArrays, keys: Tensor, values: Tensor) -> None:
        """Append rows [B, Hkv, S, D] to the planes and advance the lengths."""

    def probe(
        self,
        plan: StepPlan,
        cache: CacheArrays,
        state: HeadState,
        query: Tensor,
        sinks: Tensor | None,
    ) -> None:
        """Write the hints that the first planes of all tokens give for ``query`` [B, H, D]."""

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
        """Append one token and attend with ``query``; everything in ``result`` is overwritten.

        ``result.state`` holds the hints of the step before and receives those for the next.
        """

    def read(self, plan: StepPlan, cache: CacheArrays, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, tokens, D] in float32, from all stored planes."""


def backend_for(device: torch.device) -> Backend:
    """The backend of a device.

    Raises
    ------
    UnsupportedModelError
        If no kernels serve this type of device, or the package they need is missing.
    """
    return _backend(device.type)


@cache
def _backend(kind: str) -> Backend:
    makers: dict[str, Callable[[], Backend]] = {
        "cpu": _make_cpu_backend,
        "cuda": _make_cuda_backend,
    }
    if kind not in makers:
        raise UnsupportedModelError(
            f"a model on device {kind!r}: the kernels run on {' and '.join(makers)}; move the model"
        )
    try:
        return makers[kind]()
    except ImportError as error:
        extra = {"cpu": "cpu", "cuda": "cuda13"}[kind]
        raise UnsupportedModelError(
            f"a model on device {kind!r} needs {error.name}: pip install 'alignedkv[{extra}]'"
        ) from error


def _make_cpu_backend() -> Backend:
    from alignedkv.runtime.cpu import CpuBackend

    return CpuBackend()


def _make_cuda_backend() -> Backend:
    from alignedkv.runtime.cuda import CudaBackend

    return CudaBackend()
