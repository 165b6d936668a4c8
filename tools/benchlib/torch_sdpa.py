"""PyTorch's own scaled dot product attention, by backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benchlib.competitor import Element, Rotation, clones, no_cuda, round_cache, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from benchlib.problem import DecodeInputs, DecodeShape

__all__ = ["TorchSdpa"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSdpa:
    """``torch.nn.functional.scaled_dot_product_attention`` pinned to one backend.

    Parameters
    ----------
    backend : {"flash", "cudnn"}
        FlashAttention 2 as it ships with torch, or cuDNN.
    element : {"fp16", "bf16"}
        Type of q, K and V.
    packed : bool
        Hand the query heads of a group over as query positions of one head, without a mask, instead
        of asking for ``enable_gqa``: the same numbers, and one pass over K and V per group even
        where a backend repeats heads.
    """

    backend: Literal["flash", "cudnn"]
    element: Element
    packed: bool = False

    @property
    def name(self) -> str:
        """Such as ``sdpa-flash-packed-bf16``."""
        return "-".join(("sdpa", self.backend, *(("packed",) if self.packed else ()), self.element))

    @property
    def bits(self) -> int:
        """16: SDPA has no 8-bit cache."""
        return 16

    def obstacle(self, shape: DecodeShape) -> str | None:
        """Why this backend cannot run; None if it can."""
        del shape  # every shape of a decode step suits both backends
        return no_cuda()

    def build(self, inputs: DecodeInputs, copies: int) -> Rotation:
        """Round q, K and V to `element` and copy K and V."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        backend = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        }[self.backend]
        q = inputs.q.to(torch_dtype(self.element))
        if self.packed:
            q = q.unflatten(1, (inputs.shape.kv_heads, inputs.shape.group))
        else:
            q = q.unsqueeze(2)

        def step(k: Tensor, v: Tensor) -> Callable[[], Tensor]:
            def call() -> Tensor:
                with sdpa_kernel(backend):
                    output = scaled_dot_product_attention(q, k, v, enable_gqa=not self.packed)
                return output.reshape(inputs.q.shape)

            return call

        keys, values = (
            clones(round_cache(cache, self.element)[0], copies) for cache in (inputs.k, inputs.v)
        )
        return Rotation(calls=tuple(step(k, v) for k, v in zip(keys, values, strict=True)))
