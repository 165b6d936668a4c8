"""What a patch will do to bytes, memory and time, before it is made.

The share of bytes read is that of models that `tools/evaluate.py` ran, and beyond their contexts of
the heads that `tools/bench.py` times. Heads that attend to everything alike read more; `report`
tells what a running model really reads.
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

#: Share of 16-bit keys and values that a step at 2^-5 reads, rows kept exact apart, by tokens of a
#: sequence.  At 1024 and 4096 the means of SmolLM2-135M and Gemma 3 270M with four rows kept exact
#: (benchmarks/results/evaluate-*.json); beyond, of both kinds of data in decode-nvidia-h200.json
#: there, at 32k with the batch of 8.
SHARE_CONTEXTS = (1024, 4096, 32768, 131072)
SHARE_BITS, SHARE_AT_BITS = 5.0, (0.393, 0.275, 0.230, 0.195)
#: What another bit of tolerance multiplies it by: 1.08 to 1.18 in these runs.
SHARE_PER_BIT = 1.13
#: What other bounds multiply it by (SmolLM2-135M at 4096 tokens and 2^-7).
SHARE_OF_BOUND = {
    BoundKind.ESTIMATE: 1.0,
    BoundKind.STATISTICAL: 2.2,
    BoundKind.DETERMINISTIC: 2.5,
}
#: Time of memory traffic of the 16-bit cache at which a decode step at 2^-7 is as fast as the best
#: 16-bit kernel: 22,300 tokens of 4 KiB on an H200 of 4.8 TB/s (21.2 against 15.0 us at 8,192
#: tokens, 33.8 against 37.9 at 32,768; benchmarks/results/decode-nvidia-h200.json).
EXTRA_SECONDS = 19e-6
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
    exact = request.policy.exact_first + request.policy.exact_last
    kept = min(exact, context)
    share = read_share(request.policy, context)
    numbers, bytes_read, bytes_stored = 0, 0.0, 0
    for layer in layers:
        spec, heads = layer.spec, batch * layer.kv_heads
        of_token = 2 * spec.head_dim
        numbers += heads * context * of_token
        # Parts of a large group read for themselves.
        bytes_read += (
            heads
            * spec.subgroups
            * (
                share * STOCK_BYTES * of_token * (context - kept)
                + kept * storage.bytes_per_exact_row(spec)
            )
        )
        bytes_stored += storage.bytes_stored(
            spec, batch=batch, kv_heads=layer.kv_heads, capacity=context, exact_rows=exact
        )
    stock = STOCK_BYTES * numbers
    return Forecast(
        context=context,
        batch=batch,
        layers_served=len(layers),
        layers_total=model.config.get_text_config(decoder=True).num_hidden_layers,
        read_share=bytes_read / stock,
        stock_bytes_read=stock,
        bytes_read=round(bytes_read),
        stock_bytes_stored=model.dtype.itemsize * numbers,
        bytes_stored=bytes_stored,
        break_even=break_even_tokens(layers),
    )


def read_share(policy: PrecisionPolicy, context: int) -> float:
    """Expected bytes read of those of 16-bit keys and values, without the rows kept exact.

    Between the measured contexts by their logarithm, outside as at the nearest one.
    """
    share = float(np.interp(math.log2(context), np.log2(SHARE_CONTEXTS), SHARE_AT_BITS))
    bits = -math.log2(policy.tolerance) - SHARE_BITS
    return min(share * SHARE_OF_BOUND[policy.bound] * math.pow(SHARE_PER_BIT, bits), 1.0)


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
