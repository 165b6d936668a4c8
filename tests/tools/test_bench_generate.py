import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import bench_generate as tool  # noqa: E402
import bench_generate_steps as steps  # noqa: E402

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_the_stock_step_of_fixed_length_is_the_models_own(monkeypatch):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    ids = torch.randint(0, 97, (2, 50))
    monkeypatch.setattr(steps, "PREFILL_CHUNK", 16)
    cache = transformers.DynamicCache(config=model.config)
    cache.layers = [steps.FullLayer() for _ in range(2)]
    steps.prefill(model, ids, cache)
    for layer in cache.layers:
        layer.fix()
    step = {"use_cache": True, steps.cache_keyword(model): cache}
    with torch.no_grad():
        answers = [
            model(ids[:, -1:], position_ids=torch.full((2, 1), 50), **step).logits for _ in range(2)
        ]
        wanted = model(torch.cat([ids, ids[:, -1:]], dim=1)).logits[:, -1:]
    for answer in answers:
        torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-6)
    assert cache.layers[0].keys.shape[2] == 51
    assert "forward" not in vars(model.model.layers[0].mlp)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert tool.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
