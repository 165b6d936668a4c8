"""How far a candidate's predictions are from exact ones, and what generating costs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from alignedkv import runtime
from alignedkv.policy import PrecisionPolicy
from evallib.text import CACHE, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Next-token predictions beside the exact ones.

    Attributes
    ----------
    perplexity : float
        Of the text that follows the prompt.
    kl_mean, kl_p99, kl_max : float
        KL(exact || candidate) of the next token, nats.
    agreement : float
        Share of positions whose most probable token is the same.
    largest_gap : float
        Over the positions where it is not: the largest difference of the exact logits of the two
        tokens. A tie is a gap near zero.
    """

    perplexity: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    agreement: float
    largest_gap: float


def fidelity(logits: Tensor, exact: Tensor, following: Tensor) -> Fidelity:
    """Compare logits [positions, vocabulary] after the tokens ``following`` [positions]."""
    log_p, log_q = exact.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)
    right = log_q[:-1].gather(1, following[1:, None])
    best, near = exact.argmax(dim=-1), logits.argmax(dim=-1)
    gap = exact.gather(1, best[:, None]) - exact.gather(1, near[:, None])
    return Fidelity(
        perplexity=float(torch.exp(-right.mean())),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        agreement=float((best == near).double().mean()),
        largest_gap=float(gap.max()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A position where a candidate's most probable token is not the exact one.

    Attributes
    ----------
    position : int
        Of the token that it follows, counted from the prompt's end.
    exact_token, token : int
        The exact choice and the candidate's.
    gap : float
        Exact logit of the one less that of the other.
    """

    position: int
    exact_token: int
    token: int
    gap: float


def differences(logits: Tensor, exact: Tensor) -> list[Difference]:
    """All positions where the most probable tokens of logits [positions, vocabulary] differ."""
    best, near = exact.argmax(dim=-1), logits.argmax(dim=-1)
    return [
        Difference(
            position=position,
            exact_token=int(best[position]),
            token=int(near[position]),
            gap=float(exact[position, best[position]] - exact[position, near[position]]),
        )
        for position in (best != near).nonzero().flatten().tolist()
    ]


def gap_error(logits: Tensor, exact: Tensor) -> Tensor:
    """How wrong the difference of two logits is, root mean square over all pairs [positions]."""
    return (logits - exact).std(dim=-1, correction=0) * 2**0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Decode speed and cache memory at a context.

    Attributes
    ----------
    tokens_per_second : float
    processor_seconds : float
        Of all threads of this process, a step: on a machine that others use, what a step costs.
    cache_bytes : int
    """

    tokens_per_second: float
    processor_seconds: float
    cache_bytes: int


def cost(subject: Subject, policy: PrecisionPolicy | None, *, steps: int) -> Cost:
    """Time decode steps behind the prompt, stock (None) or patched, and weigh the cache.

    Medians over steps, the first four left out; each waits for the device.
    """
    model = subject.model
    if policy is not None:
        runtime.patch(model, policy)
    try:
        with torch.no_grad():
            cache = DynamicCache(config=model.config) if policy is None else None
            given = {} if cache is None else {CACHE: cache}
            answer = model(subject.prompt, use_cache=True, logits_to_keep=1, **given)
            cache, seconds, processor = answer[CACHE], [], []
            token = answer.logits[:, -1].argmax(dim=-1, keepdim=True)
            for _ in range(steps + 4):
                start, busy = time.perf_counter(), time.process_time()
                logits = model(token, **{CACHE: cache}).logits
                token = logits[:, -1].argmax(dim=-1, keepdim=True)
                int(token)
                seconds.append(time.perf_counter() - start)
                processor.append(time.process_time() - busy)
        if policy is None:
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        else:
            held = int(runtime.report(model).stored_bytes.sum())
    finally:
        if policy is not None:
            runtime.unpatch(model)
    return Cost(
        tokens_per_second=1 / float(np.median(seconds[4:])),
        processor_seconds=float(np.median(processor[4:])),
        cache_bytes=held,
    )
