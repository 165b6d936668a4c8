"""What is compared: ways to keep a cache and attend to it, each giving next-token logits.

All start from the same exact prompt.  The stock cache and alignedkv run as they are; bf16 attention
is the stock one in bf16; the schemes of others are those of `alignedkv.analysis`, put in the place
of the attention function, so that their errors pass through all layers and into later keys and
values.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignedkv import runtime
from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.schemes import Scheme, default_schemes
from alignedkv.policy import PrecisionPolicy
from evallib.text import CACHE, Subject

#: Name of the attention function that stands in for the model's own.
STAND_IN = "alignedkv_evaluate"
BF16_ATTENTION = "bf16 attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A candidate's next-token logits and what they cost.

    Attributes
    ----------
    logits : float64 tensor [positions, vocabulary]
        After each token that follows the prompt.
    read_fraction : float
        Bytes of keys and values read, of those of 16-bit ones; NaN if not counted.
    misses : int
        Head outputs whose bound exceeded the tolerance.
    """

    logits: Tensor
    read_fraction: float = float("nan")
    misses: int = 0


class Candidate(Protocol):
    """A way to keep a cache."""

    @property
    def name(self) -> str:
        """As the table shows it."""

    def follow(self, subject: Subject, prompt: DynamicCache) -> Answer:
        """Logits along the text, given the exact cache of its prompt (which must not change)."""


def _at_once(subject: Subject, cache: Any, **kwargs: Any) -> Tensor:
    """All positions in one forward pass: the same as one after the other for a stock cache."""
    with torch.no_grad():
        logits = subject.model(subject.following, **{CACHE: cache}, **kwargs).logits
    return logits[0].double()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """The model as it is."""

    name: str = "stock"

    def follow(self, subject: Subject, prompt: DynamicCache) -> Answer:
        """See `Candidate`."""
        return Answer(logits=_at_once(subject, copy.deepcopy(prompt)), read_fraction=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planes:
    """alignedkv, token by token, from a prompt of its own."""

    policy: PrecisionPolicy
    name: str

    def follow(self, subject: Subject, prompt: DynamicCache) -> Answer:
        """See `Candidate`."""
        model, logits = subject.model, []
        with runtime.patched(model, self.policy), torch.no_grad():
            cache = model(subject.prompt, use_cache=True, logits_to_keep=1)[CACHE]
            for token in subject.following[0]:
                step = model(token[None, None], **{CACHE: cache})
                logits.append(step.logits[0, -1].double())
            report = runtime.report(model)
        return Answer(
            logits=torch.stack(logits),
            read_fraction=float(report.read_fraction.mean()),
            misses=int(report.misses.sum()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16Attention:
    """Keys, values, queries, weights and outputs in bfloat16."""

    name: str = BF16_ATTENTION

    def follow(self, subject: Subject, prompt: DynamicCache) -> Answer:
        """See `Candidate`."""

        def attend(
            module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any
        ) -> tuple[Tensor, None]:
            rounded = (x.bfloat16() for x in (query, key, value))
            output, _ = sdpa_attention_forward(module, *rounded, mask, **kw)
            return output.to(query.dtype), None

        with _standing_in(subject, attend):
            logits = _at_once(subject, copy.deepcopy(prompt))
        return Answer(logits=logits, read_fraction=1.0)


@dataclass(slots=True, kw_only=True)
class Emulated:
    """A scheme of `alignedkv.analysis`, one KV head and query at a time."""

    scheme: Scheme
    fractions: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the analysis calls it."""
        return self.scheme.name

    def follow(self, subject: Subject, prompt: DynamicCache) -> Answer:
        """See `Candidate`."""
        self.fractions.clear()
        with _standing_in(subject, self._attend):
            logits = _at_once(subject, copy.deepcopy(prompt))
        return Answer(logits=logits, read_fraction=float(np.mean(self.fractions)))

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        tokens, queries = key.shape[2], query.shape[2]
        group = query.shape[1] // key.shape[1]
        output = torch.empty_like(query)
        for head in range(key.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            case = AttentionCase(
                name=self.name,
                layer=module.layer_idx,
                kv_head=head,
                query=query[0, mine].float().cpu().numpy(),
                key=key[0, head].float().cpu().numpy(),
                value=value[0, head].float().cpu().numpy(),
                positions=np.arange(tokens - queries, tokens),
                dtype="float32",
                scaling=scaling,
                window=sliding_window,
                softcap=softcap,
                sinks=None if s_aux is None else s_aux[mine].double().cpu().numpy(),
                prefill=tokens - queries,
            )
            for index in range(queries):
                result = self.scheme.apply(case, index)
                output[0, mine, index] = torch.from_numpy(result.output).to(output)
                self.fractions.append(result.read_fraction)
        return output.transpose(1, 2), None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """transformers' own quantized cache, from a prompt of its own."""

    backend: str
    bits: int

    @property
    def name(self) -> str:
        """Backend and bits."""
        return f"{self.backend} int{self.bits}"

    def follow(self, subject: Subject, prompt: DynamicCache) -> Answer:
        """See `Candidate`."""
        cache = QuantizedCache(self.backend, subject.model.config, nbits=self.bits)
        with torch.no_grad():
            subject.model(subject.prompt, **{CACHE: cache}, logits_to_keep=1)
        return Answer(logits=_at_once(subject, cache))


@contextmanager
def _standing_in(subject: Subject, attend: Callable[..., Any]) -> Iterator[None]:
    model = subject.model
    stock = model.config._attn_implementation
    AttentionInterface.register(STAND_IN, attend)
    AttentionMaskInterface.register(STAND_IN, sdpa_mask)
    model.set_attn_implementation(STAND_IN)
    try:
        yield
    finally:
        model.set_attn_implementation(stock)
        AttentionInterface._global_mapping.pop(STAND_IN)
        AttentionMaskInterface._global_mapping.pop(STAND_IN)


def planes_at(bits: float, **policy: Any) -> Planes:
    """alignedkv at a tolerance of 2^-bits."""
    return Planes(
        name=f"alignedkv 2^-{bits:g}", policy=PrecisionPolicy(tolerance=2.0**-bits, **policy)
    )


def rivals(names: list[str]) -> list[Candidate]:
    """Other candidates by name; "all" for every one that can run here.

    Raises
    ------
    ValueError
        For a name that is none of them.
    """
    known: list[Candidate] = [Bf16Attention()]
    known += [Emulated(scheme=scheme) for scheme in default_schemes()]
    for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        if _installed(package):
            known += [Quantized(backend=backend, bits=4)]
    if names == ["all"]:
        return known
    by_name = {candidate.name: candidate for candidate in known}
    if wrong := [name for name in names if name not in by_name]:
        raise ValueError(f"{', '.join(wrong)}: give 'all' or any of {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
