"""Imports between the package's modules go one way: their graph has no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(package: Path) -> dict[str, Path]:
    """Files of a package's modules, by their dotted names."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def executed(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run some day: functions' own too, but none for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from executed(ast.Module(body=[other], type_ignores=[]))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from executed(child)


def imported(statement: ast.Import | ast.ImportFrom, known: Mapping[str, Path]) -> Iterator[str]:
    """The known modules that a statement names."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        assert statement.level == 0, "imports are absolute"
        base = statement.module or ""
        whole = (f"{base}.{alias.name}" for alias in statement.names)
        names = [name if name in known else base for name in whole]
    yield from (name for name in names if name in known)


def arrows(package: Path) -> dict[str, set[str]]:
    """What each module of a package imports of it."""
    known = modules(package)
    return {
        name: {
            other
            for statement in executed(ast.parse(path.read_text()))
            for other in imported(statement, known)
        }
        for name, path in known.items()
    }


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, from a module back to itself; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def test_no_module_imports_itself_by_others() -> None:
    assert " -> ".join(circle(arrows(ROOT / "alignedkv"))) == ""


@pytest.mark.parametrize(
    "back", ["from p import a", "import p.a", "from p.a import x", "def f():\n    from p import a"]
)
def test_a_circle_is_seen(back: str, tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    for name, text in {"__init__": "", "a": "from p.b import y", "b": back}.items():
        (package / f"{name}.py").write_text(text)
    assert circle(arrows(package)) in (["p.a", "p.b", "p.a"], ["p.b", "p.a", "p.b"])


def test_what_is_for_type_checkers_alone_makes_no_circle(tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    (package / "a.py").write_text("from p.b import y")
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import x\n"
    (package / "b.py").write_text(text)
    assert circle(arrows(package)) == []
