from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignedkv.errors import CompileError
from alignedkv.kernels import cache_folder
from alignedkv.kernels import compile as compiling
from alignedkv.kernels.cache_folder import CACHE_VARIABLE, cache_directory
from alignedkv.kernels.compile import (
    Resources,
    build,
    cache_key,
    compile_text,
    compiler_version,
    parse_resources,
)
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.spec import DecodeSpec

SPEC = DecodeSpec(head_dim=64, group=1)
CONFIG = DecodeConfig()
FILE = "dequantise.cu"

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 5.881 ms
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for helper
    24 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really compiled."""
    names: list[str] = []

    def counted(text: str, name: str, arch: str) -> tuple[bytes, str]:
        names.append(name)
        return compile_text(text, name, arch)

    monkeypatch.setattr(compiling, "compile_text", counted)
    return names


def test_the_log_of_ptxas() -> None:
    first = Resources(
        registers=40, spill_store_bytes=12, spill_load_bytes=16, stack_bytes=8, shared_bytes=2048
    )
    second = Resources(
        registers=8, spill_store_bytes=4, spill_load_bytes=4, stack_bytes=24, shared_bytes=0
    )
    assert parse_resources(LOG) == {"first": first, "second": second}


def test_a_spill_is_seen() -> None:
    """test_resources.py can fail: a kernel that must spill is told from one that need not."""
    body = "".join(f"float x{i} = in[{i} * n];\n" for i in range(64))
    total = " + ".join(f"x{i} * in[n + {i} * x{i} > 0 ? 1 : 0]" for i in range(64))
    text = (
        'extern "C" __global__ void __launch_bounds__(1024, 2) k(volatile float* in, int n) {\n'
        f"{body} __syncthreads();\n in[0] = {total}; }}"
    )
    _, log = compile_text(text, "k.cu", "sm_90")
    assert parse_resources(log)["k"].spill_store_bytes > 0


def test_an_entry_holds_source_binary_and_resources(folder: Path, compiled: list[str]) -> None:
    binary = build(SPEC, CONFIG, FILE, "sm_90")
    assert binary.cubin.parent.parent == folder
    assert sorted(path.name for path in binary.cubin.parent.iterdir()) == [
        "dequantise.cu",
        "dequantise.cubin",
        "resources.json",
    ]
    assert binary.cubin.read_bytes().startswith(b"\x7fELF")
    assert "constexpr int kHeadDim = 64;" in binary.source.read_text()
    assert binary.resources["dequantise"].registers > 0
    assert build(SPEC, CONFIG, FILE, "sm_90") == binary
    assert compiled == [FILE]


def test_everything_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "spec": SPEC, "config": CONFIG, "file": FILE, "arch": "sm_90", "text": "x"
    }  # fmt: skip
    changes: dict[str, Any] = {
        "spec": DecodeSpec(head_dim=64, group=2),
        "config": DecodeConfig(warps=4),
        "file": "encode.cu",
        "arch": "sm_80",
        "text": "y",
    }
    keys = {cache_key(**given)} | {
        cache_key(**{**given, name: value}) for name, value in changes.items()
    }
    monkeypatch.setattr(compiling, "OPTIONS", ("--std=c++20",))
    keys.add(cache_key(**given))
    monkeypatch.setattr(compiling, "compiler_version", lambda: (0, 0))
    keys.add(cache_key(**given))
    assert len(keys) == len(changes) + 3


@pytest.mark.parametrize("name", ["dequantise.cubin", "resources.json"])
@pytest.mark.parametrize("content", [b"", b"damaged", b"{}", b'[{"key": 1}]'])
def test_a_damaged_entry_is_compiled_again(
    folder: Path,
    compiled: list[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
    content: bytes,
) -> None:
    binary = build(SPEC, CONFIG, FILE, "sm_90")
    healthy = binary.cubin.read_bytes()
    (binary.cubin.parent / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = build(SPEC, CONFIG, FILE, "sm_90")
    assert compiled == [FILE, FILE]
    assert again.cubin.read_bytes() == healthy
    assert "damaged or foreign" in caplog.text
    build(SPEC, CONFIG, FILE, "sm_90")
    assert compiled == [FILE, FILE]


def test_a_foreign_entry_is_compiled_again(
    folder: Path, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    binary = build(SPEC, CONFIG, FILE, "sm_90")
    facts = binary.cubin.parent / "resources.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "key": "of another version"}))
    with caplog.at_level(logging.WARNING):
        assert build(SPEC, CONFIG, FILE, "sm_90") == binary
    assert compiled == [FILE, FILE]
    assert "does not match" in caplog.text


def test_a_half_written_entry_is_no_entry(folder: Path, compiled: list[str]) -> None:
    binary = build(SPEC, CONFIG, FILE, "sm_90")
    (binary.cubin.parent / "resources.json").unlink()
    assert build(SPEC, CONFIG, FILE, "sm_90") == binary
    assert compiled == [FILE, FILE]


def test_two_processes_compile_at_once(folder: Path) -> None:
    program = (
        "from alignedkv.kernels.compile import build\n"
        "from alignedkv.kernels.config import DecodeConfig\n"
        "from alignedkv.kernels.spec import DecodeSpec\n"
        f"b = build(DecodeSpec(head_dim=64, group=1), DecodeConfig(), {FILE!r}, 'sm_90')\n"
        "print(b.cubin)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    paths = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert paths[0] == paths[1] == str(build(SPEC, CONFIG, FILE, "sm_90").cubin)
    assert len(list(Path(paths[0]).parent.iterdir())) == 3


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the cache folder should be stands for every failure to write (root may all)."""
    obstacle = tmp_path / "cache"
    obstacle.write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(obstacle))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        binary = build(SPEC, CONFIG, FILE, "sm_90")
    assert binary.cubin.is_file()
    assert binary.source.is_file()
    assert "cache folder cannot be used" in caplog.text
    assert CACHE_VARIABLE in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where nobody may")
def test_a_read_only_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with caplog.at_level(logging.WARNING):
        binary = build(SPEC, CONFIG, FILE, "sm_90")
    folder.chmod(stat.S_IRWXU)
    assert binary.cubin.is_file()
    assert "cache folder cannot be used" in caplog.text


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_folder, "write_atomically", full)
    with pytest.raises(CompileError, match=rf"No space left.*set {CACHE_VARIABLE}"):
        build(SPEC, CONFIG, FILE, "sm_90")


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache_folder.write_atomically(folder, {"a": b"x"})
    assert list(folder.iterdir()) == []


def test_rejected_source_is_kept_with_its_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "generate", lambda *_: '#line 7 "dequantise.cu"\nint x = y;\n')
    with pytest.raises(CompileError) as caught:
        build(SPEC, CONFIG, FILE, "sm_90")
    message = str(caught.value)
    assert 'dequantise.cu(7): error: identifier "y" is undefined' in message
    source = Path(message.splitlines()[-1].removeprefix("source: "))
    assert source.read_text().endswith("int x = y;\n")
    assert source.is_relative_to(folder)


def test_an_architecture_that_the_compiler_does_not_know() -> None:
    with pytest.raises(CompileError, match=r"(?s)cannot compile k.cu for sm_20.*gpu-architecture"):
        compile_text("", "k.cu", "sm_20")


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    compiling._nvrtc.cache_clear()
    try:
        with pytest.raises(CompileError, match=r"no CUDA compiler.*pip install"):
            compiler_version()
    finally:
        compiling._nvrtc.cache_clear()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/given")
    assert cache_directory() == Path("/given")
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "alignedkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "alignedkv"
