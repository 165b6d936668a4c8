"""generate in every mode: with planes fine enough, the tokens and logits of the stock cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from alignedkv import runtime
from alignedkv.errors import ActivationError
from alignedkv.policy import model_policy
from tiny_models import CACHE, FAMILIES, make_tiny, prompt, tiny

TOLERANCE = 2.0**-10
#: The default, but for the tolerance.
POLICY = model_policy(tolerance=TOLERANCE)
NEW_TOKENS = 6
#: How much larger than an attention output's the relative error of a logit of these models may be.
AMPLIFICATION = 4.0


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("Llama")


def both(model: PreTrainedModel, inputs: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """The same call with the stock cache and patched."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    torch.manual_seed(0)
    stock = model.generate(inputs, **copy.deepcopy(options))
    with runtime.patched(model, POLICY):
        torch.manual_seed(0)
        ours = model.generate(inputs, **copy.deepcopy(options))
        report = runtime.report(model)
    assert report.read_fraction.notna().all()
    return stock, ours


def assert_close_logits(stock: Any, ours: Any) -> None:
    assert torch.equal(stock.sequences, ours.sequences)
    for exact, near in zip(stock.logits, ours.logits, strict=True):
        error = (exact - near).abs().max() / exact.abs().max()
        assert error <= AMPLIFICATION * TOLERANCE
    assert any(not torch.equal(a, b) for a, b in zip(stock.logits, ours.logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True}
    assert_close_logits(*both(tiny(family), prompt(1, 33), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    model = make_tiny("Llama").to(dtype)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    stock, ours = both(model, prompt(2, 20), **options)
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for exact, near in zip(stock.logits, ours.logits, strict=True):
        error = (exact - near).abs().max() / exact.abs().max()
        assert error <= AMPLIFICATION * (TOLERANCE + 2 * unit)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
    ],
    ids=str,
)
def test_same_tokens(model: PreTrainedModel, options: dict[str, Any], batch: int) -> None:
    stock, ours = both(model, prompt(batch, 19), **options)
    assert torch.equal(stock, ours)


def test_prompt_of_one_token(model: PreTrainedModel) -> None:
    stock, ours = both(model, prompt(2, 1))
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_left_padding(model: PreTrainedModel, implementation: str | None) -> None:
    inputs = prompt(3, 20)
    mask = torch.ones_like(inputs)
    for row, padding in enumerate((0, 3, 17)):
        inputs[row, :padding] = 0
        mask[row, :padding] = 0
    stock, ours = both(model, inputs, attention_mask=mask, cache_implementation=implementation)
    assert torch.equal(stock, ours)


def test_padding_on_the_right_is_refused(model: PreTrainedModel) -> None:
    inputs = prompt(2, 20)
    mask = torch.ones_like(inputs)
    mask[1, -3:] = 0
    with runtime.patched(model, POLICY), torch.no_grad():
        first = model(inputs, attention_mask=mask)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        with pytest.raises(ActivationError, match="pad on the left"):
            model(inputs[:, -1:], attention_mask=mask, **{CACHE: first[CACHE]})


def test_prompt_lookup(model: PreTrainedModel) -> None:
    inputs = prompt(1, 8).repeat(1, 3)
    stock, ours = both(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert torch.equal(stock, ours)


def test_assistant_model(model: PreTrainedModel) -> None:
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.3 * torch.randn_like(assistant.lm_head.weight))
    stock, ours = both(model, prompt(1, 19), assistant_model=assistant, max_new_tokens=10)
    assert torch.equal(stock, ours)


def test_patched_assistant(model: PreTrainedModel) -> None:
    assistant = make_tiny("Llama", seed=3)
    stock = model.generate(prompt(1, 19), assistant_model=assistant, max_new_tokens=6)
    with runtime.patched(assistant, POLICY):
        ours = model.generate(prompt(1, 19), assistant_model=assistant, max_new_tokens=6)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("max_cache_len", [None, 64])
def test_conversation_reuses_its_cache(model: PreTrainedModel, max_cache_len: int | None) -> None:
    first, second = prompt(1, 20), prompt(1, 15, seed=7)
    with runtime.patched(model, POLICY):
        cache = runtime.AlignedKVCache(
            model.config, runtime.make_request(POLICY), max_cache_len=max_cache_len
        )
        answer = model.generate(first, **{CACHE: cache}, max_new_tokens=5, do_sample=False)
        whole = torch.cat([answer, second], dim=1)
        ours = model.generate(whole, **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    stock = model.generate(whole, max_new_tokens=5, do_sample=False)
    assert torch.equal(stock, ours)


def test_prefix_serves_many_continuations(model: PreTrainedModel) -> None:
    prefix = prompt(1, 24)
    with runtime.patched(model, POLICY), torch.no_grad():
        stored = model(prefix, use_cache=True)[CACHE]
        for seed in (5, 6):
            whole = torch.cat([prefix, prompt(1, 3, seed=seed)], dim=1)
            twin = copy.deepcopy(stored)
            ours = model.generate(whole, **{CACHE: twin}, max_new_tokens=4, do_sample=False)
            assert stored.get_seq_length() == 24
            with_stock = DynamicCache(config=model.config)
            stock = model.generate(whole, **{CACHE: with_stock}, max_new_tokens=4, do_sample=False)
            assert torch.equal(stock, ours)


def test_calling_the_model_makes_planes(model: PreTrainedModel) -> None:
    inputs = prompt(1, 20)
    with runtime.patched(model, POLICY), torch.no_grad():
        cache = model(inputs)[CACHE]
        assert isinstance(cache, runtime.AlignedKVCache)
        near = model(inputs[:, :1], **{CACHE: cache}).logits
        assert cache.get_seq_length() == 21
    with torch.no_grad():
        exact = model(torch.cat([inputs, inputs[:, :1]], dim=1)).logits[:, -1:]
    assert (exact - near).abs().max() / exact.abs().max() <= AMPLIFICATION * TOLERANCE


def test_attention_weights_come_from_the_stock_attention() -> None:
    model = make_tiny("Llama", attn_implementation="eager")
    inputs = prompt(1, 20)
    with runtime.patched(model, POLICY), torch.no_grad():
        first = model(inputs, output_attentions=True)
        step = model(inputs[:, :1], **{CACHE: first[CACHE]}, output_attentions=True)
    assert first.attentions[1].shape == (1, 4, 20, 20)
    assert step.attentions[1].shape == (1, 4, 1, 21)


def test_short_requests_keep_the_stock_cache(model: PreTrainedModel) -> None:
    with runtime.patched(model, POLICY, break_even=100):
        stock = model.generate(prompt(1, 20), max_new_tokens=3, return_dict_in_generate=True)
        ours = model.generate(prompt(4, 30), max_new_tokens=3, return_dict_in_generate=True)
    assert type(stock[CACHE]) is DynamicCache
    assert isinstance(ours[CACHE], runtime.AlignedKVCache)
