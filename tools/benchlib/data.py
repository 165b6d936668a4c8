"""Keys, values and queries whose scores have a known shape: what a step reads depends on it.

Keys look like a model's: correlated from token to token, channels of unequal size, a few channels
with a large mean, a rotary embedding over all of it.  A query is scaled so that its scores have the
wanted standard deviation, and token 0 may be made a sink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchlib.problem import DecodeInputs, DecodeShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["KINDS", "ScoreKind", "captured_inputs", "effective_tokens", "synthetic_inputs"]

_ROPE_BASE = 1e4
_CORRELATED_TOKENS = 12
_OUTLIER_CHANNELS = 4
_BISECTIONS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreKind:
    """The shape of the scores of one kind of head.

    Parameters
    ----------
    spread : float or None
        Standard deviation of the scores; None draws one per head so that the tokens beside the
        sink weigh as much as 8 to 60 equal ones.
    correlation : float
        Of the keys of neighbouring tokens.
    sink_mass : float or None
        Share of the softmax weight on token 0; None for no sink.
    """

    spread: float | None
    correlation: float
    sink_mass: float | None


KINDS = {
    "flat": ScoreKind(spread=0.7, correlation=0.0, sink_mass=None),
    "mixed": ScoreKind(spread=2.2, correlation=0.7, sink_mass=0.4),
    "peaky": ScoreKind(spread=5.0, correlation=0.7, sink_mass=None),
    "model": ScoreKind(spread=None, correlation=0.7, sink_mass=0.3),
}
"""Flat heads average over thousands of tokens, mixed ones over tens to hundreds, peaky ones look at
a few; model-like heads are what captured activations mostly show."""


def synthetic_inputs(
    shape: DecodeShape, kind: str, *, seed: int = 0, device: str = "cuda"
) -> DecodeInputs:
    """Inputs of one decode step with scores of a kind of `KINDS`.

    Returns
    -------
    DecodeInputs
        float16 tensors.

    Raises
    ------
    ValueError
        If the kind is unknown or the head dimension odd.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"data kind {kind!r}: give one of {', '.join(KINDS)}")
    if shape.head_dim % 2:
        raise ValueError(f"head_dim {shape.head_dim}: rotary pairs need an even number")
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    k = torch.empty(size, dtype=torch.float16, device=device)
    v = torch.empty_like(k)
    q = torch.empty(
        (shape.batch, shape.kv_heads, shape.group, shape.head_dim),
        dtype=torch.float16,
        device=device,
    )
    for b in range(shape.batch):
        for h in range(shape.kv_heads):
            k[b, h], v[b, h], q[b, h] = _head(shape, KINDS[kind], generator)
    return DecodeInputs(q=q.flatten(1, 2), k=k, v=v)


def captured_inputs(shape: DecodeShape, path: Path, *, device: str = "cuda") -> DecodeInputs:
    """A model's own activations, repeated to the wanted length.

    Parameters
    ----------
    shape : DecodeShape
        Its head_dim must be the file's; heads and batches repeat the file's layers and heads.
    path : Path
        A safetensors file with ``layers.L.q``, ``layers.L.k`` and ``layers.L.v``.

    Notes
    -----
    Token t of the result is token t mod T of the file: a text that repeats, with exactly equal
    rows, and a softmax spread over all repetitions.  The rows lose their positions, so this is data
    of real size and spread, not a model reading a long text.

    Raises
    ------
    ValueError
        If the file has other heads than the shape.
    """
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    layers = sorted({name.rsplit(".", 1)[0] for name in tensors})
    group = tensors[f"{layers[0]}.q"].shape[0] // tensors[f"{layers[0]}.k"].shape[0]
    head_dim = tensors[f"{layers[0]}.k"].shape[2]
    if (head_dim, group) != (shape.head_dim, shape.group):
        raise ValueError(
            f"{path.name} has head_dim {head_dim} and {group} query heads per KV head, the shape "
            f"{shape.head_dim} and {shape.group}"
        )
    pool_k = torch.cat([tensors[f"{layer}.k"] for layer in layers]).to(device)
    pool_v = torch.cat([tensors[f"{layer}.v"] for layer in layers]).to(device)
    pool_q = torch.cat([tensors[f"{layer}.q"][:, -1] for layer in layers]).to(device)
    heads = torch.arange(shape.batch * shape.kv_heads, device=device) % len(pool_k)
    tokens = torch.arange(shape.tokens, device=device) % pool_k.shape[1]
    size = (shape.batch, shape.kv_heads, shape.tokens, head_dim)
    q = pool_q.unflatten(0, (-1, group))[heads].reshape(shape.batch, shape.heads, head_dim)
    return DecodeInputs(
        q=q.half(),
        k=pool_k[heads][:, tokens].view(size).half(),
        v=pool_v[heads][:, tokens].view(size).half(),
    )


def effective_tokens(inputs: DecodeInputs) -> Tensor:
    """1 / sum p^2 of every query head, ``[B, H]``: how many equal tokens would weigh as much."""
    import torch

    shape = inputs.shape
    q = inputs.q.float().unflatten(1, (shape.kv_heads, shape.group))
    scores = q @ inputs.k.float().transpose(-1, -2) / math.sqrt(shape.head_dim)
    return (1 / torch.softmax(scores, dim=-1).square().sum(-1)).flatten(1, 2)


def _head(
    shape: DecodeShape, kind: ScoreKind, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [T, D] and q [G, D] of one KV head, float32."""
    import torch

    device = generator.device
    tokens, channels, half = shape.tokens, shape.head_dim, shape.head_dim // 2

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    content = normal(tokens, channels)
    if kind.correlation:
        weights = kind.correlation ** torch.arange(_CORRELATED_TOKENS, device=device)
        weights = weights / weights.square().sum().sqrt()
        content = sum(w * torch.roll(content, i, 0) for i, w in enumerate(weights))
    mean = torch.zeros(channels, device=device)
    # Outlier channels sit among the slow rotations, as they do in models.
    slow = torch.randint(
        half - half // 4, half, (_OUTLIER_CHANNELS,), generator=generator, device=device
    )
    slow[_OUTLIER_CHANNELS // 2 :] += half
    mean[slow] = torch.sign(normal(_OUTLIER_CHANNELS)) * (
        5 + 7 * torch.rand(_OUTLIER_CHANNELS, generator=generator, device=device)
    )
    k = _rotate(
        content * torch.exp(0.5 * normal(channels)) + mean, torch.arange(tokens, device=device)
    )
    v = normal(tokens, channels) * torch.exp(0.3 * normal(channels)) + 0.3 * normal(channels)

    last = torch.full((shape.group,), tokens - 1, device=device)
    q = _rotate(normal(shape.group, channels) + 0.05 * mean, last)
    scores = q @ k.T / math.sqrt(channels)
    if kind.spread is None:
        wanted = 8 * 7.5 ** torch.rand(shape.group, 1, generator=generator, device=device)
        spread = _spread_for(scores / scores.std(1, keepdim=True), wanted)
    else:
        spread = torch.full((shape.group, 1), kind.spread, device=device)
    q = q * spread / scores.std(1, keepdim=True)
    if kind.sink_mass is not None:
        _make_sink(k, q, kind.sink_mass)
        v[0] *= 0.05  # a sink's value is small: that is what makes it one
    return k, v, q


def _spread_for(scores: Tensor, wanted: Tensor) -> Tensor:
    """Factor on scores [G, T] at which 1 / sum p^2 is `wanted` [G, 1], by bisection."""
    import torch

    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 50.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        effective = 1 / torch.softmax(middle * scores, 1).square().sum(1, keepdim=True)
        low = torch.where(effective > wanted, middle, low)
        high = torch.where(effective > wanted, high, middle)
    return high


def _make_sink(k: Tensor, q: Tensor, mass: float) -> None:
    """Give token 0 the smallest key that draws `mass` of every head's weight."""
    size = math.sqrt(k.shape[1])
    rest = (q @ k[1:].T / size).logsumexp(1)
    wanted = (rest + math.log(mass / (1 - mass))) * size
    k[0] = (q.T.double() @ (q @ q.T).double().inverse() @ wanted.double()).float()


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding, halves paired."""
    import torch

    half = x.shape[1] // 2
    frequency = _ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    low, high = x[:, :half], x[:, half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=1)
