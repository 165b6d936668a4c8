"""One decode step that every kernel is given, its exact answer, and the error of an answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "COLD_BYTES",
    "DecodeInputs",
    "DecodeShape",
    "OutputError",
    "copies_for_cold_cache",
    "output_error",
    "random_inputs",
    "reference_output",
]

COLD_BYTES = 400 * 10**6
"""Bytes of K and V to rotate over: 8 times the 50 MB of an H100's L2, 6.7 times an H200's 60 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape:
    """The sizes of one decode step: one new query per request against a filled cache.

    Parameters
    ----------
    tokens : int
        Cached tokens of every request (T).
    batch : int
        Requests (B).
    heads : int
        Query heads (H), a multiple of `kv_heads`.
    kv_heads : int
        Key and value heads (Hkv).
    head_dim : int
        Channels of a head (D), the same for keys and values.

    Raises
    ------
    ValueError
        If a size is not positive or `heads` is no multiple of `kv_heads`.
    """

    tokens: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "heads", "kv_heads", "head_dim"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {size}, but a decode step needs at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly; "
                f"give a multiple of {self.kv_heads}"
            )

    @property
    def group(self) -> int:
        """Query heads per KV head (G)."""
        return self.heads // self.kv_heads

    def kv_bytes(self, bits: int) -> int:
        """Bytes of all keys and values at `bits` per element."""
        return 2 * self.batch * self.kv_heads * self.tokens * self.head_dim * bits // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeInputs:
    """The numbers of one decode step, in the precision that counts as exact.

    Scores are ``q . k / sqrt(D)``.  Every competitor rounds these to its own format, and its error
    is measured against float64 attention on the numbers as they stand here.

    Parameters
    ----------
    q : torch.Tensor
        Queries, ``[B, H, D]``.
    k, v : torch.Tensor
        Keys and values, ``[B, Hkv, T, D]``, on the device of `q`.

    Raises
    ------
    ValueError
        If the three shapes do not belong together.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        q, k, v = (tuple(x.shape) for x in (self.q, self.k, self.v))
        if len(q) != 3 or len(k) != 4 or k != v or (q[0], q[2]) != (k[0], k[3]):
            raise ValueError(f"q {q}, k {k}, v {v} do not fit q [B, H, D], k and v [B, Hkv, T, D]")
        _ = self.shape

    @property
    def shape(self) -> DecodeShape:
        """The sizes of this step."""
        batch, kv_heads, tokens, head_dim = self.k.shape
        return DecodeShape(
            tokens=tokens,
            batch=batch,
            heads=self.q.shape[1],
            kv_heads=kv_heads,
            head_dim=head_dim,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """The largest error of each head's output, relative to that output's largest element.

    The unit is ``max_d |o^_d - o_d| / max_d |o_d|``, one number per request and query head; these
    are the root mean square, median and maximum over them.
    """

    rms: float
    median: float
    max: float


def copies_for_cold_cache(shape: DecodeShape, bits: int) -> int:
    """How many copies of K and V a rotation needs so that no call finds its own in the L2 cache.

    Never fewer than two: a rotation of one would measure whatever the cache keeps of it.
    """
    return max(2, math.ceil(COLD_BYTES / shape.kv_bytes(bits)))


def random_inputs(
    shape: DecodeShape, *, spread: float = 2.2, seed: int = 0, device: str = "cuda"
) -> DecodeInputs:
    """Gaussian keys and values with queries scaled to a wanted spread of scores.

    Parameters
    ----------
    shape : DecodeShape
        The sizes.
    spread : float
        Standard deviation of the scores over the tokens: 0.7 is flat, 5 is peaky.
    seed : int
        Seed of the generator.
    device : str
        Where the tensors live.

    Returns
    -------
    DecodeInputs
        float16 tensors.
    """
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).half()

    cache = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    # q . k / sqrt(D) of standard normal vectors has unit variance.
    q = (normal(shape.batch, shape.heads, shape.head_dim) * spread).half()
    return DecodeInputs(q=q, k=normal(*cache), v=normal(*cache))


def reference_output(inputs: DecodeInputs) -> Tensor:
    """Attention in float64, one KV head at a time to bound the memory.

    Returns
    -------
    torch.Tensor
        ``[B, H, D]``, float64.
    """
    import torch

    shape = inputs.shape
    q = inputs.q.double().unflatten(1, (shape.kv_heads, shape.group))
    output = torch.empty_like(q)
    for b in range(shape.batch):
        for h in range(shape.kv_heads):
            scores = q[b, h] @ inputs.k[b, h].double().T / math.sqrt(shape.head_dim)
            output[b, h] = torch.softmax(scores, dim=-1) @ inputs.v[b, h].double()
    return output.flatten(1, 2)


def output_error(output: Tensor, reference: Tensor) -> OutputError:
    """The error of `output` against `reference`, both ``[B, H, D]``.

    Raises
    ------
    ValueError
        If the shapes differ, or `output` holds NaN or infinity: no error describes that.
    """
    if output.shape != reference.shape:
        raise ValueError(
            f"output {tuple(output.shape)} and reference {tuple(reference.shape)} differ in shape"
        )
    if not bool(output.isfinite().all()):
        raise ValueError("the output holds NaN or infinity; the kernel that wrote it is broken")
    error = (output.double() - reference).abs().amax(-1) / reference.abs().amax(-1)
    return OutputError(
        rms=float(error.square().mean().sqrt()),
        median=float(error.median()),
        max=float(error.max()),
    )
