"""A needle in a haystack: whether the model still finds a number in a long text."""

from __future__ import annotations

import torch

from alignedkv import runtime
from alignedkv.policy import PrecisionPolicy
from evallib.text import Subject

NEEDLE = " The secret number of this text is {number}. "
QUESTION = "\nQuestion: what is the secret number of this text?\nAnswer: the secret number is"
#: Tokens that an answer may take.
ANSWER_TOKENS = 8


def prompts(subject: Subject, context: int, depths: list[float]) -> list[tuple[str, torch.Tensor]]:
    """Number to find and prompt of about ``context`` tokens, for each depth of the needle."""
    tokenizer, made = subject.tokenizer, []
    question = tokenizer(QUESTION, return_tensors="pt", add_special_tokens=False).input_ids
    for index, depth in enumerate(depths):
        number = str(48_271 + 7_919 * index)
        needle = tokenizer(
            NEEDLE.format(number=number), return_tensors="pt", add_special_tokens=False
        ).input_ids
        room = context - needle.shape[1] - question.shape[1]
        hay = subject.tokens[:, :room].cpu()
        at = round(depth * hay.shape[1])
        pieces = [hay[:, :at], needle, hay[:, at:], question]
        made.append((number, torch.cat(pieces, dim=1)))
    return made


def sweep(
    subject: Subject, policy: PrecisionPolicy | None, *, contexts: list[int], depths: list[float]
) -> dict[tuple[int, float], bool]:
    """Whether the number is found, by context and depth; stock (None) or patched."""
    model, found = subject.model, {}
    if policy is not None:
        runtime.patch(model, policy, break_even=0)
    try:
        for context in contexts:
            for depth, (number, ids) in zip(depths, prompts(subject, context, depths), strict=True):
                ids = ids.to(model.device)
                answer = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=ANSWER_TOKENS,
                    do_sample=False,
                )
                words = subject.tokenizer.decode(answer[0, ids.shape[1] :])
                found[context, depth] = number in words.replace(",", "")
    finally:
        if policy is not None:
            runtime.unpatch(model)
    return found
