"""What a patch will do to bytes, memory and time, before it is made.

The share of bytes read is that of real heads (measurements.md 5 and 6: SmolLM2-135M, thresholds fed
back from step to step, which costs 2 points over the best ones). Heads that attend to everything
alike read up to half as much again; `report` tells what a running model really reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from alignedkv.errors import SpecError
from alignedkv.kernels import storage
from alignedkv.policy import BoundKind, PrecisionPolicy
from alignedkv.runtime.monitor import STOCK_BYTES
from alignedkv.runtime.request import make_request
from alignedkv.runtime.support import ServedLayer, check_model

#: Share of 16-bit keys and values read at a tolerance of 2^-bits, for an estimate.
READ_SHARE_BITS = (4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
READ_SHARE = (0.195, 0.216, 0.242, 0.269, 0.301, 0.337)
#: A statistical bound is about twice an estimate (measurements.md 4): one bit of tolerance.
STATISTICAL_BITS = 1.0
#: Absolute error bounds gain little from small weights (theory.md 7).
DETERMINISTIC_SHARE = 0.68
#: Time of memory traffic of the 16-bit cache at which a decode step at 2^-7 is as fast as the best
#: 16-bit kernel: 36,000 tokens of 4 KiB on an H200 of 4.8 TB/s (38.8 against 37.3 us at 32,768
#: tokens, 81.4 against 123.7 at 131,072; benchmarks/results/decode-nvidia-h200.json).
EXTRA_SECONDS = 31e-6
#: Bandwidth where the driver does not tell it: of an H100.
DEFAULT_BANDWIDTH = 3.06e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a decode step at a context length will read and keep, for the whole model.

    Attributes
    ----------
    context, batch : int
        Tokens of a sequence, and sequences.
    layers_served, layers_total : int
        Layers that keep planes; the others (sliding windows) stay as they are.
    read_share : float
        Expected bytes read of those of 16-bit keys and values.
    stock_bytes_read, bytes_read : int
        A step's KV traffic in the served layers, before and after.
    stock_bytes_stored, bytes_stored : int
        Memory of the served layers, before (in the model's dtype) and after.
    break_even : int
        Tokens, of all sequences together, from which a step is faster than the stock one; 0 where
        that has not been measured (CPUs).
    """

    context: int
    batch: int
    layers_served: int
    layers_total: int
    read_share: float
    stock_bytes_read: int
    bytes_read: int
    stock_bytes_stored: int
    bytes_stored: int
    break_even: int

    def __str__(self) -> str:
        mib = 2.0**20
        return (
            f"{self.layers_served} of {self.layers_total} layers keep planes; at {self.batch} x "
            f"{self.context} tokens a step reads about {self.bytes_read / mib:.1f} MiB of keys and "
            f"values instead of {self.stock_bytes_read / mib:.1f} ({self.read_share:.0%}); they "
            f"take {self.bytes_stored / mib:.1f} MiB instead of "
            f"{self.stock_bytes_stored / mib:.1f}; break-even at {self.break_even} tokens"
        )


def forecast(
    model: PreTrainedModel,
    *,
    context: int,
    batch: int = 1,
    policy: PrecisionPolicy | str | None = None,
) -> Forecast:
    """Tell what `patch` with the same policy would do; changes nothing.

    Raises
    ------
    UnsupportedModelError
        As `patch` would.
    SpecError
        If ``context`` or ``batch`` is not positive, or the policy cannot be honoured.
    """
    if context < 1 or batch < 1:
        raise SpecError(f"{batch} sequences of {context} tokens: give at least one of each")
    request = make_request(policy)
    layers = check_model(model, request)
    numbers = [2 * layer.kv_heads * layer.spec.head_dim * context * batch for layer in layers]
    stored = [
        storage.bytes_stored(layer.spec, batch=batch, kv_heads=layer.kv_heads, capacity=context)
        for layer in layers
    ]
    # Parts of a large group read for themselves.
    reads = [layer.spec.subgroups * count for layer, count in zip(layers, numbers, strict=True)]
    share = read_share(request.policy) * sum(reads) / sum(numbers)
    stock = STOCK_BYTES * sum(numbers)
    return Forecast(
        context=context,
        batch=batch,
        layers_served=len(layers),
        layers_total=model.config.get_text_config(decoder=True).num_hidden_layers,
        read_share=share,
        stock_bytes_read=stock,
        bytes_read=round(share * stock),
        stock_bytes_stored=model.dtype.itemsize * sum(numbers),
        bytes_stored=sum(stored),
        break_even=break_even_tokens(layers),
    )


def read_share(policy: PrecisionPolicy) -> float:
    """Expected bytes read of those of 16-bit keys and values."""
    if policy.bound is BoundKind.DETERMINISTIC:
        return DETERMINISTIC_SHARE
    bits = -math.log2(policy.tolerance)
    if policy.bound is BoundKind.STATISTICAL:
        bits += STATISTICAL_BITS
    return float(np.interp(bits, READ_SHARE_BITS, READ_SHARE))


def break_even_tokens(layers: Sequence[ServedLayer]) -> int:
    """Tokens, of all sequences together, from which planes are faster; 0 on a CPU."""
    smallest = min(2 * STOCK_BYTES * layer.kv_heads * layer.spec.head_dim for layer in layers)
    device = layers[0].device
    if device.type != "cuda":
        return 0
    return math.ceil(EXTRA_SECONDS * _bandwidth(device) / smallest)


def _bandwidth(device: torch.device) -> float:
    from alignedkv.kernels.device import device_target

    return device_target(device.index).bandwidth or DEFAULT_BANDWIDTH
