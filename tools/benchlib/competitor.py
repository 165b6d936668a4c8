"""What a competitor is: a name, the bits it reads, why it cannot run, and calls to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benchlib.problem import DecodeInputs, DecodeShape

__all__ = ["Competitor", "Element", "Rotation", "clones", "no_cuda", "round_cache", "torch_dtype"]

Element = Literal["fp16", "bf16", "fp8"]
"""The stored element of K and V; fp8 means e4m3 with one scale for K and one for V."""

_E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Calls that do the same step on different copies of K and V.

    Parameters
    ----------
    calls : tuple of callables
        Each launches one step on torch's current stream and returns the raw output ``[B, H, D]``.
    output_scale : float
        What the raw output is to be multiplied by.  The scale of fp8 values is applied here, to
        one output after the clock has stopped, because some kernels spend a launch of their own on
        it that a model would fold into the next weight.
    """

    calls: tuple[Callable[[], Tensor], ...]
    output_scale: float = 1.0

    def output(self) -> Tensor:
        """The output of the first call, ``[B, H, D]``, float32 with every scale applied."""
        return self.calls[0]().float() * self.output_scale


class Competitor(Protocol):
    """A kernel to be timed against."""

    @property
    def name(self) -> str:
        """Library, kernel, variant and stored element, such as ``flashinfer-xqa-fp8``."""

    @property
    def bits(self) -> int:
        """Bits per stored element of K and V: 16 or 8."""

    def obstacle(self, shape: DecodeShape) -> str | None:
        """Why this competitor cannot run `shape` on this machine; None if it can."""

    def build(self, inputs: DecodeInputs, copies: int) -> Rotation:
        """Round and lay out `inputs`, `copies` times, and make ready everything a call needs."""


def torch_dtype(element: Element) -> torch.dtype:
    """The torch dtype of a stored element."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[element]


def no_cuda() -> str | None:
    """Why torch cannot reach a GPU; None if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def round_cache(cache: Tensor, element: Element) -> tuple[Tensor, float]:
    """Round K or V to its stored element.

    Parameters
    ----------
    cache : torch.Tensor
        ``[B, Hkv, T, D]``.
    element : {"fp16", "bf16", "fp8"}
        The stored element.

    Returns
    -------
    stored : torch.Tensor
        ``[B, Hkv, T, D]`` in that element.
    scale : float
        `stored` times `scale` approximates `cache`.  For fp8 it maps the largest magnitude to 448,
        the largest number of e4m3; otherwise it is 1.
    """
    dtype = torch_dtype(element)
    if element != "fp8":
        return cache.to(dtype), 1.0
    scale = float(cache.abs().max()) / _E4M3_MAX or 1.0
    return (cache.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(dtype), scale


def clones(cache: Tensor, copies: int) -> list[Tensor]:
    """`cache` itself and as many clones as make up `copies`."""
    return [cache, *(cache.clone() for _ in range(copies - 1))]
