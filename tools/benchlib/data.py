"""Keys, values and queries of a decode step: synthetic ones, and a model's own at any length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.tune.data import tiled
from alignedkv.kernels.tune.synthetic import synthetic_head
from benchlib.problem import DecodeInputs, DecodeShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["captured_inputs", "effective_tokens", "synthetic_inputs"]


class TorchNumbers:
    """`alignedkv.kernels.tune.synthetic.Numbers` of a torch generator, on its device."""

    def __init__(self, generator: torch.Generator) -> None:
        import torch

        self.xp = torch
        self._on: dict[str, Any] = {"generator": generator, "device": generator.device}

    def normal(self, *shape: int) -> Tensor:
        """See `Numbers`."""
        return self.xp.randn(*shape, **self._on)

    def uniform(self, *shape: int) -> Tensor:
        """See `Numbers`."""
        return self.xp.rand(*shape, **self._on)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """See `Numbers`."""
        return self.xp.randint(low, high, (count,), **self._on)

    def put(self, array: NDArray[Any]) -> Tensor:
        """See `Numbers`."""
        return self.xp.as_tensor(array, device=self._on["device"])

    def get(self, array: Tensor) -> NDArray[Any]:
        """See `Numbers`."""
        return array.cpu().numpy()


def synthetic_inputs(
    shape: DecodeShape, kind: str, *, seed: int = 0, device: str = "cuda"
) -> DecodeInputs:
    """Inputs of one decode step with scores of a kind of `alignedkv.kernels.tune.synthetic.KINDS`.

    Returns
    -------
    DecodeInputs
        float16 tensors.

    Raises
    ------
    TuningError
        If the kind is unknown or the head dimension odd.
    """
    import torch

    numbers = TorchNumbers(torch.Generator(device=device).manual_seed(seed))
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    k = torch.empty(size, dtype=torch.float16, device=device)
    v = torch.empty_like(k)
    q = torch.empty(
        (shape.batch, shape.kv_heads, shape.group, shape.head_dim),
        dtype=torch.float16,
        device=device,
    )
    for head in np.ndindex(shape.batch, shape.kv_heads):
        k[head], v[head], q[head] = synthetic_head(
            kind,
            tokens=shape.tokens,
            group=shape.group,
            head_dim=shape.head_dim,
            numbers=numbers,
        )
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
    A text that repeats, with exactly equal rows, and a softmax spread over all repetitions.  The
    rows lose their positions, so this is data of real size and spread, not a model reading a long
    text.

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
    heads: list[tuple[NDArray[Any], ...]] = []
    for layer in layers:
        parts = [tensors[f"{layer}.{part}"].float() for part in "kvq"]
        parts[2] = parts[2].unflatten(0, (-1, group))
        heads += zip(*(part.numpy() for part in parts), strict=True)
    found = tiled(
        heads,
        tokens=shape.tokens,
        batch=shape.batch,
        kv_heads=shape.kv_heads,
        scaling=1 / math.sqrt(head_dim),
    )
    q, k, v = (
        torch.from_numpy(part).to(device).half() for part in (found.query, found.keys, found.values)
    )
    return DecodeInputs(q=q, k=k, v=v)


def effective_tokens(inputs: DecodeInputs) -> Tensor:
    """1 / sum p^2 of every query head, ``[B, H]``: how many equal tokens would weigh as much."""
    import torch

    shape = inputs.shape
    q = inputs.q.float().unflatten(1, (shape.kv_heads, shape.group))
    scores = q @ inputs.k.float().transpose(-1, -2) / math.sqrt(shape.head_dim)
    return (1 / torch.softmax(scores, dim=-1).square().sum(-1)).flatten(1, 2)
