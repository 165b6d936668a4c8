"""patch and unpatch: no trace after, nothing changed by a refusal, errors that say what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from alignedkv import runtime
from alignedkv.errors import (
    BoundMissedError,
    SpecError,
    UnsupportedModelError,
)
from alignedkv.policy import PrecisionPolicy
from tiny_models import CACHE, make_tiny, prompt, tiny


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    return {
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        },
        "with_kwargs": {
            name: len(module._forward_pre_hooks_with_kwargs)
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict(),
        "implementation": model.config._attn_implementation,
        "attention": sorted(AttentionInterface._global_mapping),
        "masks": sorted(AttentionMaskInterface._global_mapping),
    }


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_no_trace_after(family: str) -> None:
    model = make_tiny(family)
    before = traces(model)
    runtime.patch(model)
    assert traces(model) != before
    model.generate(prompt(1, 20), max_new_tokens=2)
    runtime.unpatch(model)
    assert traces(model) == before


def test_no_trace_after_an_error_in_the_block() -> None:
    model = make_tiny("Llama")
    before = traces(model)

    def fail() -> None:
        with runtime.patched(model) as inside:
            assert inside is model
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert traces(model) == before


def test_two_models_share_a_registration() -> None:
    first, second = make_tiny("Llama"), make_tiny("Llama", seed=1)
    with runtime.patched(first):
        with runtime.patched(second):
            pass
        first.generate(prompt(1, 20), max_new_tokens=2)
    assert not [name for name in AttentionInterface._global_mapping if "alignedkv" in name]


def test_a_copy_of_a_patched_model_is_patched_apart() -> None:
    model = make_tiny("Llama")
    with runtime.patched(model):
        twin = copy.deepcopy(model)
        twin.generate(prompt(1, 20), max_new_tokens=3)
        assert runtime.report(twin).read_fraction.notna().all()


def test_patching_twice() -> None:
    model = make_tiny("Llama")
    with runtime.patched(model):
        before = traces(model)
        with pytest.raises(UnsupportedModelError, match="patched already: unpatch it first"):
            runtime.patch(model)
        assert traces(model) == before


def test_unpatching_and_reporting_need_a_patch() -> None:
    for function in (runtime.unpatch, runtime.report):
        with pytest.raises(SpecError, match=r"call alignedkv\.runtime\.patch first"):
            function(tiny("Llama"))


def encoder_decoder() -> PreTrainedModel:
    sizes = {"d_model": 64, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=64))


def softcap_on_sdpa() -> PreTrainedModel:
    model = make_tiny("Gemma2")
    model.config._attn_implementation_internal = "sdpa"
    return model


def other_attention() -> PreTrainedModel:
    model = make_tiny("Llama")
    model.set_attn_implementation("flex_attention")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "no transformers model"),
        (encoder_decoder, "encoder-decoder"),
        (softcap_on_sdpa, r"softcap .* set_attn_implementation\('eager'\) first"),
        (other_attention, "'flex_attention'.*sdpa and eager"),
        (lambda: make_tiny("Llama", head_dim=32), "heads of 32 channels; the kernels take 64"),
        (
            lambda: make_tiny("Qwen3", num_attention_heads=34, num_key_value_heads=2),
            "17 query heads on a KV head; the kernels take 1 to 16",
        ),
        (lambda: make_tiny("Llama").double(), "weights are torch.float64.*float16"),
        (lambda: make_tiny("Llama").to("meta"), "device 'meta'.*cpu and cuda"),
        (
            lambda: make_tiny("Gemma3", layer_types=["sliding_attention"] * 2),
            "no full-attention layer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported(make: Any, message: str) -> None:
    model = make()
    before = traces(model) if isinstance(model, PreTrainedModel) else None
    for function in (runtime.patch, lambda model: runtime.forecast(model, context=100)):
        with pytest.raises(UnsupportedModelError, match=f"(?s){message}"):
            function(model)
    if before is not None:
        assert traces(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fast"}, "'output' or 'model'"),
        ({"on_miss": "ignore"}, "repair, flag, raise"),
        ({"break_even": -1}, "0 for always"),
        (
            {"policy": PrecisionPolicy(key_layout="4|4|8", value_layout="4|4|4|4")},
            "one layout for both",
        ),
        ({"policy": PrecisionPolicy(stored_planes=1)}, "stored_planes 1"),
    ],
)
def test_what_cannot_be_honoured(options: dict[str, Any], message: str) -> None:
    model = make_tiny("Llama")
    before = traces(model)
    with pytest.raises(SpecError, match=message):
        runtime.patch(model, **options)
    assert traces(model) == before


def test_softcap_has_no_statistical_bound() -> None:
    with pytest.raises(SpecError, match="softcap"):
        runtime.patch(make_tiny("Gemma2"), PrecisionPolicy(bound="statistical"))


def test_presets() -> None:
    for name, tolerance in (("output", 2.0**-7), ("model", 2.0**-5)):
        policy = runtime.make_request(name).policy
        assert (policy.tolerance, policy.exact_first) == (tolerance, 4)


def test_the_default_is_the_models_preset() -> None:
    wanted = runtime.make_request("model")
    assert runtime.make_request(None) == runtime.Request() == wanted
    model = make_tiny("Llama")
    assert runtime.AlignedKVCache(model.config).request == wanted
    assert runtime.forecast(model, context=4096) == runtime.forecast(
        model, context=4096, policy="model"
    )
    with runtime.patched(model), torch.no_grad():
        assert model(prompt(1, 20))[CACHE].request == wanted
        answer = model.generate(prompt(1, 20), max_new_tokens=2, return_dict_in_generate=True)
        assert answer[CACHE].request == wanted


@pytest.mark.parametrize("bound", ["deterministic", "statistical", "estimate"])
def test_every_bound_kind_holds_its_tolerance(bound: str) -> None:
    model = make_tiny("Llama")
    policy = PrecisionPolicy(tolerance=2.0**-5, bound=bound)
    with runtime.patched(model, policy):
        model.generate(prompt(1, 40), max_new_tokens=4)
        report = runtime.report(model)
    assert (report.bound_max[report.misses == 0] <= 1.01 * 2.0**-5 / (1 - 2.0**-5)).all()


def impossible() -> PrecisionPolicy:
    """No plan reaches 2^-16 with 16-bit rows."""
    return PrecisionPolicy(tolerance=2.0**-16)


def test_misses_are_counted() -> None:
    model = make_tiny("Llama")
    for on_miss in ("repair", "flag"):
        with runtime.patched(model, impossible(), on_miss=on_miss):
            model.generate(prompt(1, 40), max_new_tokens=4)
            assert (runtime.report(model).misses > 0).all()


def test_misses_raise() -> None:
    model = make_tiny("Llama")
    with (
        runtime.patched(model, impossible(), on_miss="raise"),
        pytest.raises(BoundMissedError, match="above the tolerance"),
    ):
        model.generate(prompt(1, 40), max_new_tokens=4)


def test_repairs_help() -> None:
    model = make_tiny("Llama")
    policy = PrecisionPolicy(tolerance=2.0**-9)
    misses = {}
    for on_miss in ("repair", "flag"):
        with runtime.patched(model, policy, on_miss=on_miss):
            model.generate(prompt(1, 40), max_new_tokens=6)
            misses[on_miss] = runtime.report(model).misses.sum()
    assert misses["repair"] < misses["flag"]


def test_user_caches_of_other_kinds_still_work() -> None:
    model = make_tiny("Llama")
    inputs = prompt(1, 20)
    stock = model.generate(inputs, max_new_tokens=4, do_sample=False)
    with runtime.patched(model):
        cache = DynamicCache(config=model.config)
        ours = model.generate(inputs, max_new_tokens=4, do_sample=False, **{CACHE: cache})
        assert runtime.report(model).read_fraction.isna().all()
    assert torch.equal(stock, ours)


def test_a_plane_cache_serves_an_unpatched_model() -> None:
    model = make_tiny("Llama")
    inputs = prompt(2, 20)
    cache = runtime.AlignedKVCache(model.config)
    stock = model.generate(inputs, max_new_tokens=4, do_sample=False)
    ours = model.generate(inputs, max_new_tokens=4, do_sample=False, **{CACHE: cache})
    assert torch.equal(stock, ours)


def test_training_is_left_alone() -> None:
    model = make_tiny("Llama").train()
    inputs = prompt(1, 20)
    exact = model(inputs, labels=inputs)
    exact.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with runtime.patched(model):
        model(inputs, labels=inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])


def test_without_a_cache_nothing_changes() -> None:
    model = tiny("Llama")
    inputs = prompt(2, 20)
    with torch.no_grad():
        exact = model(inputs, use_cache=False).logits
        with runtime.patched(model):
            assert torch.equal(model(inputs, use_cache=False).logits, exact)
            assert torch.equal(model(inputs).logits, exact)
