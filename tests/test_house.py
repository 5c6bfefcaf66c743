"""The house: folders import from folders below them only, and files in no circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gift_func

ROOT = Path(gift_func.__file__).parent
ROWS = [re.findall(r"`(\w+)(?:/|\.py)`", line.split("|")[1]) for line in (gift_func.__doc__ or "").split("\n") if "| `" in line]
"""The map in the package's docstring, from the top down. What stands in one row may import from each other, in no circle."""

HEIGHT = {name: -depth for depth, row in enumerate(ROWS) for name in row}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The dotted names, inside the package, of the files that a file imports."""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            module = ".".join(filter(None, above))
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                found.add(inner if inner in FILES else module)
    return found - {name}


GRAPH = {name: imports(name) for name in FILES}


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_go_down(name: str) -> None:
    home = name.split(".")[0]
    assert home in HEIGHT, f"{home} is missing in the map, which stands in gift_func/__init__.py"
    for other in GRAPH[name]:
        assert other, f"{name} imports the package's own __init__, which imports everything"
        assert HEIGHT[other.split(".")[0]] <= HEIGHT[home], f"{name} imports {other}, which the map has above it"


def test_there_is_no_circle() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, with the circle


def test_folders_form_no_circle() -> None:
    homes: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        home = name.split(".")[0]
        homes.setdefault(home, set()).update({other.split(".")[0] for other in others} - {home})
    TopologicalSorter(homes).prepare()


@pytest.mark.parametrize("name", FILES)
def test_files_are_one_idea_long(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 450


def test_a_name_means_one_thing() -> None:
    """What one file defines at its top level no other one defines, but for the verbs of a format."""
    homes: dict[str, list[str]] = {}
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            found: list[str] = []
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found = [node.name]
            elif isinstance(node, ast.Assign):
                found = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found = [node.target.id]
            for one in found:
                homes.setdefault(one, []).append(name)
    assert {name: files for name, files in homes.items() if len(files) > 1}.keys() == {"load", "save"}
