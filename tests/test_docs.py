"""The README's blocks and the docstrings' examples run, and the README shows what it prints."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gift_func

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
MODULES = ["gift_func", *(info.name for info in pkgutil.walk_packages(gift_func.__path__, "gift_func."))]


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in order, in one namespace, as somebody would who reads from the top."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert BLOCKS
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_public_names_have_docstrings() -> None:
    for name, value in vars(gift_func).items():
        if callable(value) and not name.startswith("_"):
            assert value.__doc__, name
