"""The text to evaluate on, and the model to evaluate."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

#: Keyword and output name of a cache in this version of transformers.
CACHE = (
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EvaluationError(Exception):
    """What the user gave cannot be evaluated; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with its tokenizer, and a text.

    Attributes
    ----------
    model : PreTrainedModel
    tokenizer : tokenizer
    tokens : int64 tensor [1, context + positions]
        The text: a prompt and what follows it.
    context : int
        Tokens of the prompt.
    """

    model: PreTrainedModel
    tokenizer: Any
    tokens: torch.Tensor
    context: int

    @property
    def prompt(self) -> torch.Tensor:
        """The prompt [1, context]."""
        return self.tokens[:, : self.context]

    @property
    def following(self) -> torch.Tensor:
        """What follows it [1, positions]."""
        return self.tokens[:, self.context :]


def load(
    name: str,
    *,
    gguf: str | None,
    dtype: str,
    device: str,
    text: Path,
    context: int,
    positions: int,
) -> Subject:
    """Load a model and the beginning of a text.

    Raises
    ------
    EvaluationError
        If the model cannot be loaded or the text is too short.
    """
    source = {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **source)
        words = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot load: {str(error).splitlines()[0]}") from None
    tokens = tokenizer(words, return_tensors="pt").input_ids[:, : context + positions]
    if tokens.shape[1] < context + positions:
        raise EvaluationError(
            f"{text} has {tokens.shape[1]} tokens: give a longer one, or less than "
            f"--context {context} and --positions {positions}"
        )
    model = model.to(device).eval()
    return Subject(model=model, tokenizer=tokenizer, tokens=tokens.to(device), context=context)
