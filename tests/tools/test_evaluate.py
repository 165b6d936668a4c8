"""tools/evaluate.py on a tiny model: every candidate, every table, every plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from evallib import candidates, measures, needle
from evallib.text import Subject
from tiny_models import prompt, tiny


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[ord(letter) % 128 for letter in text]])
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, ids: torch.Tensor) -> str:
        return "".join(map(chr, ids.tolist()))


def subject_of(family: str) -> Subject:
    return Subject(model=tiny(family), tokenizer=Letters(), tokens=prompt(1, 48), context=40)


@pytest.fixture
def subject() -> Subject:
    return subject_of("Llama")


def options(*changes: str) -> Any:
    required = ["model", "--text", "text", "--context", "40", "--positions", "8"]
    return evaluate.parse([*required, *changes])


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_every_candidate_comes_close(family: str) -> None:
    """Gemma 3 with a prompt longer than its window."""
    subject = subject_of(family)
    _, tables = evaluate.predictions(subject, options("--bits", "4,8"))
    by_name = tables["predictions"].set_index("name")
    assert by_name.kl_mean["stock"] == 0
    assert by_name.agreement["stock"] == 1
    assert by_name.kl_mean["alignedkv 2^-8"] < by_name.kl_mean["alignedkv 2^-4"]
    assert by_name.kl_mean["alignedkv 2^-8"] < by_name.kl_mean["fp8 e4m3"]
    assert by_name.kl_mean["fp16"] < by_name.kl_mean["bf16"] < by_name.kl_mean["fp8 e5m2"]
    assert {"bf16 attention", "int8"} <= set(by_name.index)
    assert by_name.misses["stock"] == 0
    assert subject.model.config._attn_implementation == "sdpa"


def test_greedy_follows_the_models_own_words(subject: Subject) -> None:
    model = subject.model
    followed, tables = evaluate.predictions(
        subject, options("--greedy", "--bits", "9", "--rivals", "none")
    )
    expected = model.generate(subject.prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(followed.tokens, expected)
    assert "differences" not in tables


def test_differing_tokens_are_listed(subject: Subject) -> None:
    subject = replace(subject, tokens=prompt(1, 240))
    _, tables = evaluate.predictions(
        subject, options("--bits", "8", "--rivals", "fp8 e5m2,bf16 attention")
    )
    listed = tables["differences"]
    figures = tables["predictions"].set_index("name")
    for name, found in figures.iterrows():
        mine = listed[listed.name == name]
        assert len(mine) == round((1 - found.agreement) * 200)
        assert mine.gap.max() == found.largest_gap or mine.empty
    assert set(listed.name) >= {"fp8 e5m2"}
    of_bf16 = listed.name == "bf16 attention"
    assert (listed.bf16_gap_error == listed.gap_error)[of_bf16].all()
    assert (listed.bf16_gap_error < listed.gap_error)[~of_bf16].all()


def test_fidelity_of_known_distributions() -> None:
    exact = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]).double().log()
    near = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.5, 0.5]]).double().log()
    found = measures.fidelity(near, exact, torch.tensor([0, 0, 1]))
    kl = [0.7 * torch.log(torch.tensor(7 / 6)) + 0.3 * torch.log(torch.tensor(3 / 4))]
    kl.append(0.4 * torch.log(torch.tensor(2 / 3)) + 0.6 * torch.log(torch.tensor(3 / 2)))
    assert found.kl_mean == pytest.approx(float(sum(kl)) / 3)
    assert found.kl_max == pytest.approx(float(max(kl)))
    assert found.agreement == pytest.approx(2 / 3)
    assert found.largest_gap == pytest.approx(float(torch.log(torch.tensor(1.5))))
    assert found.perplexity == pytest.approx((0.6 * 0.4) ** -0.5)


def test_differences_of_known_logits() -> None:
    exact = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]]).double()
    near = exact + torch.tensor([[10.0, 10.0, 12.0], [0.0, 0.0, 0.0]])
    (found,) = measures.differences(near, exact)
    assert found == measures.Difference(position=0, exact_token=1, token=2, gap=1.0)
    # Of the nine ordered pairs four differ by 2; a shift common to all logits is no error.
    expected = torch.tensor([(4 * 2.0**2 / 9) ** 0.5, 0.0]).double()
    torch.testing.assert_close(measures.gap_error(near, exact), expected)


@pytest.mark.parametrize("positions", ["1", "-3"])
def test_too_few_positions(positions: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--positions", positions)
    assert "at least 2, or 0 for none" in capsys.readouterr().err


def test_the_needle_lies_where_it_should(subject: Subject) -> None:
    text = torch.full((1, 300), ord("."))
    subject = Subject(model=subject.model, tokenizer=Letters(), tokens=text, context=250)
    for depth in (0.0, 0.5, 1.0):
        ((number, ids),) = needle.prompts(subject, 250, [depth])
        words = Letters().decode(ids[0])
        assert ids.shape == (1, 250)
        assert words.endswith("the secret number is")
        hay = 250 - len(needle.QUESTION) - len(needle.NEEDLE.format(number=number))
        assert words.index(needle.NEEDLE.format(number=number)) == round(depth * hay)


def test_tables_files_and_plots(
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *args, **facts: subject)
    arguments = ["model", "--text", "text", "--context", "40", "--positions", "8"]
    arguments += ["--bits", "6", "--rivals", "fp8 e4m3", "--speed-steps", "2"]
    arguments += ["--needle", "140", "--depths", "0.5", "--plots", str(tmp_path)]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in told["predictions"]] == ["stock", "alignedkv 2^-6", "fp8 e4m3"]
    assert [row["name"] for row in told["costs"]] == ["stock", "alignedkv 2^-6"]
    assert all(row["tokens_per_second"] > 0 for row in told["costs"])
    assert len(told["needles"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.json",
        "fidelity.svg",
        "needles.svg",
    }
    assert "predictions" in capsys.readouterr().out


def test_without_positions_there_are_no_predictions(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *args, **facts: subject)
    arguments = ["model", "--text", "text", "--positions", "0", "--bits", "6"]
    arguments += ["--needle", "140", "--depths", "0.5", "--plots", str(tmp_path)]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"options", "needles"}


def test_unknown_rivals_are_named(subject: Subject) -> None:
    with pytest.raises(ValueError, match="mine: give 'all' or any of bf16 attention"):
        candidates.rivals(["mine"])


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert evaluate.main([str(tmp_path), "--text", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("evaluate: cannot load")
