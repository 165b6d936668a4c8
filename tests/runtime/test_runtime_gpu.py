"""The runtime on a GPU: the CPU tests' claims, CUDA graphs, streams, offloading, no waiting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel

from alignedkv import runtime
from alignedkv.errors import BoundMissedError
from alignedkv.policy import PrecisionPolicy, model_policy
from alignedkv.runtime import AlignedKVCache, make_request
from tiny_models import CACHE, FAMILIES, make_tiny, prompt

pytestmark = pytest.mark.gpu

TOLERANCE = 2.0**-9
#: The default, but for the tolerance.
POLICY = model_policy(tolerance=TOLERANCE)
#: As in test_generate.py.
AMPLIFICATION = 4.0


def on_gpu(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    return make_tiny(family, **changes).to("cuda", dtype)


def relative_error(exact: torch.Tensor, near: torch.Tensor) -> float:
    return float((exact - near).abs().max() / exact.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", [None, "static"])
def test_every_family(family: str, implementation: str | None) -> None:
    model, inputs = on_gpu(family), prompt(2, 40).cuda()
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "cache_implementation": implementation,
        "disable_compile": True,
    }
    stock = model.generate(inputs, **options)
    with runtime.patched(model, POLICY, break_even=0):
        ours = model.generate(inputs, **options)
        assert runtime.report(model).read_fraction.notna().all()
    for exact, near in zip(stock.logits, ours.logits, strict=True):
        assert relative_error(exact, near) <= AMPLIFICATION * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    model, inputs = on_gpu("Llama", dtype), prompt(2, 300).cuda()
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    with torch.no_grad():
        token = inputs[:, :1]
        exact = model(torch.cat([inputs, token], dim=1)).logits[:, -1]
        with runtime.patched(model, POLICY, break_even=0):
            cache = model(inputs, use_cache=True)[CACHE]
            near = model(token, **{CACHE: cache}).logits[:, -1]
    assert relative_error(exact, near) <= AMPLIFICATION * (TOLERANCE + 2 * unit)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 16},
        {"cache_implementation": "offloaded"},
    ],
    ids=str,
)
def test_modes(options: dict[str, Any]) -> None:
    model, inputs = on_gpu("Llama"), prompt(2, 40).cuda()
    options = {"max_new_tokens": 6, **options}
    torch.manual_seed(0)
    stock = model.generate(inputs, **options)
    with runtime.patched(model, model_policy(tolerance=2.0**-11), break_even=0):
        torch.manual_seed(0)
        ours = model.generate(inputs, **options)
        assert runtime.report(model).read_fraction.notna().all()
    assert torch.equal(stock, ours)


def test_left_padding_and_speculation() -> None:
    model = on_gpu("Llama")
    inputs = prompt(2, 40).cuda()
    mask = torch.ones_like(inputs)
    mask[1, :13] = 0
    inputs[1, :13] = 0
    fine = model_policy(tolerance=2.0**-11)
    for given, options in (
        (inputs, {"attention_mask": mask}),
        (inputs[:1], {"prompt_lookup_num_tokens": 3}),
        (inputs[:1], {"assistant_model": copy.deepcopy(model)}),
    ):
        stock = model.generate(given, max_new_tokens=8, do_sample=False, **options)
        with runtime.patched(model, fine, break_even=0):
            ours = model.generate(given, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(stock, ours)


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GptOss"])
def test_compiled_static_generate_under_cuda_graphs(family: str) -> None:
    torch.compiler.reset()
    model, inputs = on_gpu(family), prompt(1, 40).cuda()
    stock = model.generate(inputs, max_new_tokens=12, do_sample=False)
    config = CompileConfig(fullgraph=True, mode="reduce-overhead")
    with runtime.patched(model, model_policy(tolerance=2.0**-11), break_even=0):
        for _ in range(2):
            ours = model.generate(
                inputs,
                max_new_tokens=12,
                do_sample=False,
                cache_implementation="static",
                compile_config=config,
            )
            assert torch.equal(stock, ours)
        assert runtime.report(model).read_fraction.notna().all()


def static_cache(model: PreTrainedModel, tokens: int) -> AlignedKVCache:
    return AlignedKVCache(model.config, make_request(POLICY), max_cache_len=tokens)


def test_a_captured_step_replays() -> None:
    """One CUDA graph of a whole step, replayed: lengths, hints and planes move on by themselves."""
    model, inputs = on_gpu("Llama"), prompt(1, 40).cuda()
    with runtime.patched(model, POLICY, break_even=0), torch.no_grad():
        eager, graphed = static_cache(model, 128), static_cache(model, 128)
        for cache in (eager, graphed):
            model(inputs, **{CACHE: cache})
            for value in (5, 6, 7):
                model(torch.tensor([[value]], device="cuda"), **{CACHE: cache})
        token = torch.tensor([[8]], device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, **{CACHE: graphed}).logits
        for value in range(8, 20):
            token.fill_(value)
            graph.replay()
            exact = model(torch.tensor([[value]], device="cuda"), **{CACHE: eager}).logits
            assert relative_error(exact, logits) <= 2 * AMPLIFICATION * TOLERANCE
        assert int(graphed.get_seq_length()) == int(eager.get_seq_length()) == 55


def test_steps_do_not_wait_for_the_device() -> None:
    model, inputs = on_gpu("Llama"), prompt(1, 40).cuda()
    with runtime.patched(model, POLICY, break_even=0), torch.no_grad():
        cache = model(inputs)[CACHE]
        token = torch.tensor([[5]], device="cuda")
        model(token, **{CACHE: cache})
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(token, **{CACHE: cache})
                assert isinstance(cache.get_seq_length(), int)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_steps_run_on_torchs_current_stream() -> None:
    model, inputs = on_gpu("Llama"), prompt(1, 40).cuda()
    stock = model.generate(inputs, max_new_tokens=6, do_sample=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with (
        runtime.patched(model, model_policy(tolerance=2.0**-11), break_even=0),
        torch.cuda.stream(side),
    ):
        ours = model.generate(inputs, max_new_tokens=6, do_sample=False)
    side.synchronize()
    assert torch.equal(stock, ours)


def test_short_requests_keep_the_stock_cache_by_default() -> None:
    model = on_gpu("Llama", torch.bfloat16)
    told = runtime.forecast(model, context=4096)
    assert told.break_even > 1000
    with runtime.patched(model):
        answer = model.generate(
            prompt(1, 40).cuda(), max_new_tokens=3, return_dict_in_generate=True
        )
    assert not isinstance(answer[CACHE], AlignedKVCache)


def test_memory_does_not_grow() -> None:
    model, inputs = on_gpu("Llama", torch.bfloat16), prompt(1, 40).cuda()
    with runtime.patched(model, POLICY, break_even=0), torch.no_grad():
        cache = static_cache(model, 2400)
        model(inputs, **{CACHE: cache})
        token = torch.tensor([[5]], device="cuda")
        for _ in range(100):
            model(token, **{CACHE: cache})
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(2000):
            model(token, **{CACHE: cache})
        torch.cuda.synchronize()
        # The monitor keeps a few numbers between tallies; a leak of 512 bytes in 16 steps fails.
        assert torch.cuda.memory_allocated() <= before + 2000 // 16 * 512


def test_misses_raise_and_repairs_help() -> None:
    model, inputs = on_gpu("Llama"), prompt(1, 200).cuda()
    impossible = PrecisionPolicy(tolerance=2.0**-16)
    with (
        runtime.patched(model, impossible, on_miss="raise", break_even=0),
        pytest.raises(BoundMissedError),
    ):
        model.generate(inputs, max_new_tokens=4)
    misses = {}
    for on_miss in ("repair", "flag"):
        with runtime.patched(model, POLICY, on_miss=on_miss, break_even=0):
            model.generate(inputs, max_new_tokens=12, do_sample=False)
            misses[on_miss] = runtime.report(model).misses.sum()
    assert misses["repair"] <= misses["flag"]
