"""The README's blocks and the docstrings' examples run, and the package shows the names, the map and the version it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gift_func

ROOT = Path(__file__).parent.parent
PACKAGE = Path(gift_func.__file__).parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
MODULES = ["gift_func", *(info.name for info in pkgutil.walk_packages(gift_func.__path__, "gift_func."))]
IMPORTED = {
    alias.asname: node.module
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
    if isinstance(node, ast.ImportFrom) and node.level
    for alias in node.names
}
"""Every name that `gift_func` imports from a file of its own -> the file; None for a module as such."""


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in order, in one namespace, as somebody would who reads from the top."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert BLOCKS
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "tests/benchmarks/RESULTS.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", prose) if not link.startswith("http")]
    named = re.findall(r"`((?:examples|tests)/[\w./]+\.\w+)`", text)
    for path in [*((ROOT / page).parent / link for link in links), *(ROOT / name for name in named)]:
        assert path.exists(), path


def test_the_gallery_has_every_example() -> None:
    gallery = (ROOT / "examples" / "README.md").read_text()
    listed = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \|", gallery, flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_public_names_have_docstrings() -> None:
    for name, value in vars(gift_func).items():
        if callable(value) and not name.startswith("_"):
            assert value.__doc__, name


def test_completion_offers_the_public_names_only() -> None:
    """In a process of its own, with every file imported, or what other tests import would decide."""
    code = f"import importlib\nfor name in {MODULES}: importlib.import_module(name)\nimport gift_func; print(*dir(gift_func))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    offered = {name for name in found if not name.startswith("__")}
    assert offered == {*IMPORTED, "factories", "strategies", "testing", "utils"}
    assert "__version__" in found
    assert {"adapted_model", "strategy", "stores", "sweeps", "banks"}.isdisjoint(found)


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    code = (
        "import gift_func.adapt, gift_func.eva, gift_func.ensembles.stack, gift_func.sweeps.sweep, gift_func.sweeps, sys\n"
        "import gift_func as gf\n"
        "from gift_func import adapt, eva, stack, sweep\n"
        "from gift_func.adapt import adapt as same\n"
        "assert adapt is gf.adapt is gift_func.adapt is same is sys.modules['gift_func.adapt'].adapt\n"
        "print(*(type(value).__name__ for value in (adapt, eva, stack, sweep)), type(gf.sweeps).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["function"] * 4 + ["module"]


def test_the_version_is_the_projects() -> None:
    assert gift_func.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_version_where_nothing_is_installed() -> None:
    code = (
        "from importlib import metadata\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: missing(name) if name == 'gift_func' else real(name)\n"
        "import gift_func; print(gift_func.__version__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "0+unknown"


def test_importing_the_package_imports_little() -> None:
    """Not Dynamo, which takes as long as torch, and no other library than the three that the core needs."""
    code = (
        "import sys, torch, einops, safetensors; before = {*sys.modules}; import gift_func; print(*sys.modules.keys() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    roots = {name.split(".")[0] for name in ran.stdout.split()} - set(sys.stdlib_module_names)
    assert roots <= {"gift_func", "torch", "safetensors", "einops"}, roots
    assert not [name for name in ran.stdout.split() if name.startswith(("torch._dynamo", "torch._inductor"))]
