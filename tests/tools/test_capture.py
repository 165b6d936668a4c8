import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

import capture as tool  # noqa: E402

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(params=["Llama", "Gemma2"])
def model(request):
    return tiny(request.param)


TOKENS = torch.arange(40) * 7 % 97


def test_keys_and_values_are_those_that_a_cache_holds(model):
    records = tool.capture(model, TOKENS, layers=[0, 2], positions=5)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(TOKENS[None], **tool._cache_keyword(model, cache))
    assert sorted(records) == [0, 2]
    for layer, record in records.items():
        torch.testing.assert_close(record.k, cache.layers[layer].keys[0], rtol=0, atol=0)
        torch.testing.assert_close(record.v, cache.layers[layer].values[0], rtol=0, atol=0)
        assert record.q.shape == (4, 5, 8)


def test_the_model_is_left_as_it_was(model):
    before = model.config._attn_implementation
    with torch.no_grad():
        wanted = model(TOKENS[None]).logits
        tool.capture(model, TOKENS, layers=[1], positions=1)
        after = model(TOKENS[None]).logits
    assert model.config._attn_implementation == before
    assert tool.ATTENTION_NAME not in tool.ALL_ATTENTION_FUNCTIONS
    assert tool.ATTENTION_NAME not in tool.AttentionMaskInterface()
    assert torch.equal(wanted, after)


def test_a_failure_inside_leaves_the_model_as_it_was():
    model = tiny("Llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), tool.recording(model, {0}, 1):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before


def test_decode_steps_follow_the_prompt():
    model = tiny("Llama")
    records = tool.capture(model, TOKENS, layers=[0], positions=1, decode_steps=3)
    named = records[0].tensors(torch.float32)
    assert named["k_dec"].shape == named["v_dec"].shape == (2, 3, 8)
    assert named["q_dec"].shape == (4, 3, 8)
    ids = TOKENS
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    longer = tool.capture(model, ids, layers=[0], positions=3)[0]
    torch.testing.assert_close(longer.k[:, -3:], named["k_dec"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(longer.q, named["q_dec"], rtol=1e-5, atol=1e-6)


def test_softcap_scaling_and_positions_reach_the_file(tmp_path):
    record = tool.capture(tiny("Gemma2"), TOKENS, layers=[0], positions=2)[0]
    path = tmp_path / "layer.safetensors"
    tool.save(record, path, torch.float32, {"layer": "0"})
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
        assert torch.equal(file.get_tensor("q"), record.q)
    assert float(facts["scaling"]) == pytest.approx(256**-0.5)
    assert facts["softcap"] == "50.0"
    assert facts["query_positions"] == "38..39"
    assert (facts["num_heads"], facts["num_kv_heads"], facts["head_dim"]) == ("4", "2", "8")


def test_values_that_the_dtype_cannot_hold_are_refused_and_nothing_is_left(tmp_path):
    record = tool.capture(tiny("Llama"), TOKENS, layers=[0], positions=1)[0]
    record.k[0, 0, 0] = 1e6
    with pytest.raises(tool.CaptureError, match="bfloat16"):
        tool.save(record, tmp_path / "layer.safetensors", torch.float16, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/no/such/model"], "cannot load"),
        (["/no/such/model", "--tokens", "0"], "--tokens"),
        (["/no/such/model", "--tokens", "4", "--positions", "5"], "--positions"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, tmp_path, capsys):
    assert tool.main([*options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_layers_are_checked_against_the_model():
    assert tool.chosen_layers("all", 3) == [0, 1, 2]
    assert tool.chosen_layers("0,2", 3) == [0, 2]
    with pytest.raises(tool.CaptureError, match=r"0\.\.2"):
        tool.chosen_layers("3", 3)
    with pytest.raises(tool.CaptureError, match="numbers"):
        tool.chosen_layers("first", 3)


def test_the_bundled_text_is_long_enough_for_a_long_prompt():
    assert len(tool.bundled_text()) > 4 * 8192
