"""The README's Python lines run as they stand; the files it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_five_lines_run_on_a_small_model(capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(40)[None] % 97}
    (lines,) = blocks("python")
    names = {"model": model, "inputs": inputs}
    exec(compile(lines, "README.md", "exec"), names)
    assert names["output"].shape == (1, 40 + 64)
    assert "read_fraction" in capsys.readouterr().out


def test_every_tool_and_file_that_it_names_exists():
    named = set(re.findall(r"tools/\w+(?:\.py)?", README)) | set(
        re.findall(r"\]\(([\w./-]+)\)", README)
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_every_option_of_analyze_that_it_shows_is_known():
    pytest.importorskip("rich")
    import analyze_options

    source = Path(analyze_options.__file__).read_text()
    shown = set(re.findall(r"analyze\.py[^\n]*?(--[\w-]+)", README))
    assert shown
    assert all(f'"{option}"' in source for option in shown)
