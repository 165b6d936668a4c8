"""Decode steps under torch.compile: one graph, fixed addresses, the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from alignedkv import runtime
from alignedkv.policy import model_policy
from alignedkv.runtime import AlignedKVCache, make_request
from tiny_models import CACHE, make_tiny, prompt

#: The default, but for the tolerance.
POLICY = model_policy(tolerance=2.0**-10)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3"])
def test_generate_compiles_to_one_graph(family: str, backend: str) -> None:
    torch.compiler.reset()
    model = make_tiny(family)
    inputs = prompt(2, 20)
    stock = model.generate(inputs, max_new_tokens=6, do_sample=False)
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    with runtime.patched(model, POLICY):
        ours = model.generate(
            inputs,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation="static",
            compile_config=config,
        )
        report = runtime.report(model)
    assert torch.equal(stock, ours)
    assert report.read_fraction.notna().all()


def test_steps_reuse_their_graph_and_keep_addresses() -> None:
    torch.compiler.reset()
    model = make_tiny("Llama")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with runtime.patched(model, POLICY), torch.no_grad():
        cache = AlignedKVCache(model.config, make_request(POLICY), max_cache_len=64)
        model(prompt(1, 20), **{CACHE: cache})
        addresses = [tensor.data_ptr() for tensor in cache.layers[0].tensors.everything()]
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for token in range(5):
            compiled(torch.tensor([[token + 2]]), **{CACHE: cache})
        assert [t.data_ptr() for t in cache.layers[0].tensors.everything()] == addresses
        assert int(cache.get_seq_length()) == 25
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("alignedkv.step" in name for name in names) == 2


def test_holes_in_a_mask_poison_a_compiled_step() -> None:
    torch.compiler.reset()
    model = make_tiny("Llama", num_hidden_layers=1)
    mask = torch.ones(1, 21, dtype=torch.long)
    with runtime.patched(model, POLICY), torch.no_grad():
        cache = AlignedKVCache(model.config, make_request(POLICY), max_cache_len=64)
        model(prompt(1, 20), **{CACHE: cache})
        mask[0, 5] = 0
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        logits = compiled(torch.tensor([[2]]), attention_mask=mask, **{CACHE: cache}).logits
    assert logits.isnan().all()
