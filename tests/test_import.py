"""``import alignedkv`` needs NumPy alone, and does nothing but define names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Runs in an interpreter of its own.  First come the modules that are none of our business, then the
# one in question, while every third-party package but NumPy is forbidden and what the import
# changes outside the process is noted.
PROBE = """
import importlib, importlib.abc, json, os, sys

module, *already = sys.argv[1:]
for name in already:
    importlib.import_module(name)

class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in sys.stdlib_module_names | {"alignedkv", "numpy"}:
            raise ModuleNotFoundError(f"forbidden: {fullname}", name=fullname)

CHANGES = {"socket.connect", "subprocess.Popen", "os.system", "os.mkdir", "os.putenv"}

def note(event, arguments):
    if event == "open":
        path, _, flags = arguments
        bytecode = "__pycache__" in str(path)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not bytecode:
            done.append(f"open {path}")
    elif event in CHANGES:
        done.append(event)

done = []
before = set(sys.modules)
sys.meta_path.insert(0, Forbid())
sys.addaudithook(note)
importlib.import_module(module)
print(json.dumps({"done": done, "loaded": sorted(set(sys.modules) - before)}))
"""

FOUNDATIONS = ("errors", "formats", "planes", "transform", "policy")
PACKAGE_FOLDER = Path(__file__).parents[1]


def probe(*modules: str, folder: Path = PACKAGE_FOLDER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, *modules],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_package_loads_nothing_but_itself() -> None:
    run = probe("alignedkv")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"done": [], "loaded": ["alignedkv"]}


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_the_foundations_need_numpy_alone(name: str) -> None:
    run = probe(f"alignedkv.{name}", "numpy")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["done"] == []


@pytest.mark.parametrize(
    ("code", "trace"),
    [
        ("import torch", "forbidden: torch"),
        ("import hypothesis.strategies", "forbidden: hypothesis"),
        ("open('written', 'w')", "open written"),
        ("import os; os.environ['A'] = 'B'", "os.putenv"),
    ],
)
def test_the_probe_sees_what_it_must(code: str, trace: str, tmp_path: Path) -> None:
    (tmp_path / "alignedkv.py").write_text(code)
    run = probe("alignedkv", folder=tmp_path)
    assert trace in run.stdout + run.stderr
