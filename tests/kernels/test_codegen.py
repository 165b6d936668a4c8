from __future__ import annotations

import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from alignedkv.errors import CodegenError
from alignedkv.kernels import codegen
from alignedkv.kernels.codegen import (
    CUDA_DIR,
    STEP_FILES,
    constant_name,
    generate,
    prologue,
    source_digest,
)
from alignedkv.kernels.config import CHOICES, KERNEL_TUNABLES, DecodeConfig
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import PlaneLayout
from alignedkv.policy import BoundKind

SPEC = DecodeSpec(head_dim=80, group=3, layout=PlaneLayout.parse("4|2|2|8"), stored_planes=3)
CONFIG = DecodeConfig()


def constants(text: str) -> dict[str, str]:
    found = re.findall(r"^(?:__device__ )?constexpr \w+ (k\w+)(?:\[\])? = (.*);$", text, re.M)
    assert len(dict(found)) == len(found), "a constant is defined twice"
    return dict(found)


def test_every_field_becomes_a_constant() -> None:
    known = constants(prologue(SPEC, CONFIG))
    for name in (*(field.name for field in fields(SPEC)), *KERNEL_TUNABLES):
        assert name == "layout" or constant_name(name) in known
    assert known["kHeadDim"] == "80"
    assert known["kBound"] == "Bound::Estimate"
    assert known["kQueryDtype"] == "Float::BF16"
    assert known["kPageTokens"] == "0"
    assert known["kSinks"] == "false"


def test_what_follows_from_the_fields() -> None:
    known = constants(prologue(SPEC, CONFIG))
    assert known["kChannels"] == "96"
    assert known["kHadamardBlock"] == "32"
    assert known["kWidths"] == "{4, 2, 2}"
    assert known["kUnread"] == "{12, 10, 8}"
    assert known["kPlaneRowBytes"] == "{48, 24, 24}"
    assert float.fromhex(known["kHalfRange"].removesuffix("f")) == 7.5
    assert float.fromhex(known["kSmallestScale"].removesuffix("f")) == 2.0**-100


def test_no_two_specs_share_a_text() -> None:
    changes: list[dict[str, object]] = [
        {"head_dim": 128},
        {"group": 4},
        {"query_dtype": "float32"},
        {"row_dtype": "float16"},
        {"layout": PlaneLayout.parse("4|4|8")},
        {"stored_planes": 2},
        {"bound": BoundKind.DETERMINISTIC},
        {"dither_rows": 128},
        {"sample_values": True},
        {"softcap": True},
        {"sinks": True},
        {"exact_rows": True},
        {"page_tokens": 16},
    ]
    assert {name for change in changes for name in change} == {f.name for f in fields(SPEC)}
    texts = {prologue(replace(SPEC, **change), CONFIG) for change in changes}
    texts |= {
        prologue(SPEC, replace(CONFIG, **{name: choice}))
        for name, choices in CHOICES.items()
        for choice in choices
    }
    configs = 1 + sum(len(CHOICES[name]) - 1 for name in KERNEL_TUNABLES)
    assert len(texts) == len(changes) + configs


@pytest.mark.parametrize("file", sorted(path.name for path in CUDA_DIR.glob("*.cu")))
def test_headers_are_inlined_once(file: str) -> None:
    text = generate(SPEC, CONFIG, file)
    assert '#include "' not in text
    assert text.count('#line 1 "dtypes.cuh"') <= 1
    assert text.count(f'#line 1 "{file}"') == 1


@pytest.mark.parametrize("file", sorted(path.name for path in CUDA_DIR.glob("*.cu*")))
def test_line_directives_tell_the_truth(file: str) -> None:
    """Following them, every line of the text is the line of the file that they name."""
    sources = {path.name: path.read_text().splitlines() for path in CUDA_DIR.glob("*.cu*")}
    generated = generate(SPEC, CONFIG, file).splitlines()
    start = next(i for i, line in enumerate(generated) if line.startswith("#line 1 "))
    name, number = "", 0
    for line in generated[start:]:
        if directive := re.fullmatch(r'#line (\d+) "([\w.]+)"', line):
            number, name = int(directive[1]), directive[2]
            continue
        original = sources[name][number - 1]
        assert line == ("" if original.startswith("#include") else original)
        number += 1
    assert name == file
    assert number == len(sources[file]) + 1


def test_unknown_files_are_refused() -> None:
    with pytest.raises(CodegenError, match=r"no CUDA source 'decoder.cu': there are .*encode\.cu"):
        generate(SPEC, CONFIG, "decoder.cu")


def test_values_without_a_literal_are_refused() -> None:
    with pytest.raises(CodegenError, match="no C\\+\\+ literal"):
        codegen._constant("x", object())


def test_the_source_digest_sees_code_and_no_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        codegen._text.cache_clear()
        source_digest.cache_clear()
        return source_digest()

    here = digest()
    shutil.copytree(CUDA_DIR, tmp_path / "cuda")
    monkeypatch.setattr(codegen, "CUDA_DIR", tmp_path / "cuda")
    assert digest() == here
    for name in ("decode.cu", "rows.cuh"):
        file = tmp_path / "cuda" / name
        text = file.read_text()
        file.write_text(text + "\n// Another remark.\n")
        assert digest() == here
        file.write_text(text + "\nstatic_assert(true);\n")
        assert digest() != here
        file.write_text(text)
    (tmp_path / "cuda" / "paper.cu").unlink()
    assert digest() == here, "the paper's kernel is no part of a step"
    monkeypatch.undo()
    digest()
    assert set(STEP_FILES) <= {path.name for path in CUDA_DIR.glob("*.cu")}
