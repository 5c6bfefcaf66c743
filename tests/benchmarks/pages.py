"""The tables of RESULTS.md, and those of their rows that decide in README.md, written by the run that measured them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .measure import Result
from .report import bound, found, read_json, value, verdict

HERE = Path(__file__).parent
README, RESULTS, DEVICES = HERE.parents[1] / "README.md", HERE / "RESULTS.md", HERE / "results"
DECISIVE = (
    "step/LoRA",
    "step/DoRA",
    "together/32 adapters x 32 tokens",
    "mixed/inference",
    "mixed/training",
    "mixed/decode, SmolLM2",
    "resident/switch and call",
    "memory/LoRA step",
    "compile/LoRA step",
    "adapt/Llama 70B on meta",
)
"""The rows that README.md shows."""


def write(results: Sequence[Result], under: str) -> None:
    """Write the table of a full run to RESULTS.md, and the decisive rows to README.md."""
    rewrite(RESULTS, "benchmarks", markdown(results, under))
    rewrite(README, "benchmarks", markdown([row for row in results if row.name in DECISIVE], under))


def write_devices() -> None:
    """Write the tables of the files in `results/` to RESULTS.md, and a picture beside each file."""
    from .picture import draw

    for path in DEVICES.glob("*.json"):
        draw(path.with_suffix(".png"), *read_json(path))
    rewrite(RESULTS, "devices", devices())


def rewrite(path: Path, what: str, text: str) -> None:
    """Replace what stands between two markers.

    Raises:
        ValueError: if the file lacks a marker.
    """
    start, end = (f"<!-- {what}: {which} -->" for which in ("start", "end"))
    before, found_start, rest = path.read_text(encoding="utf8").partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"{path} has no place for the table: a line {start} and below it a line {end}")
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf8")


def markdown(results: Sequence[Result], under: str) -> str:
    """The rows that have a target, then the others, of which only the times of ours, PEFT's and the floor are shown."""
    aimed = [row for row in results if row.targets]
    others = [row for row in results if not row.targets and {"ours", "PEFT", "floor"} <= row.times.keys()]
    lines = ["| what | medians | ratio or difference | target | |", "|---|---|---|---|---|"]
    for row in aimed:
        medians = ", ".join(f"{key} {value(time.median, row.unit)}" for key, time in row.times.items())
        for index, key in enumerate(row.targets):
            first = (row.name.replace("/", ": ", 1), medians) if index == 0 else ("", "")
            lines.append(f"| {first[0]} | {first[1]} | {key}: {found(row, key)} | {bound(row, key)} | {verdict(row, key)} |")
    if others:
        lines += ["", "| other methods | ours | PEFT | floor | ours/PEFT | ours/floor |", "|---|---|---|---|---|---|"]
    for row in others:
        times = " | ".join(value(row.times[key].median, row.unit) for key in ("ours", "PEFT", "floor"))
        ratios = " | ".join(found(row, f"ours/{key}") for key in ("PEFT", "floor"))
        lines.append(f"| {row.name.replace('/', ': ', 1)} | {times} | {ratios} |")
    return "\n".join([*lines, "", under])


def devices() -> str:
    """A picture and a table for each file that a run with `--device cuda --json` left in `results/`."""
    return "\n\n".join(
        f"![The times below as bars]({path.relative_to(HERE).with_suffix('.png')})\n\n{device_table(*read_json(path))}"
        for path in sorted(DEVICES.glob("*.json"))
    )


def device_table(results: Sequence[Result], under: str) -> str:
    """One run on a device: a line for each way in which ours computes a row."""
    lines = ["| what | ours | PEFT | floor or base | ours/PEFT | ours/floor or base |", "|---|---|---|---|---|---|"]
    for row in results:
        alone = "floor" if "floor" in row.times else "base"
        for ours in (key for key in row.times if key not in ("PEFT", alone)):
            name = ", ".join([row.name.replace("/", ": ", 1), *ours.split(", ")[1:]])
            times = " | ".join(value(row.times[key].median, "s") for key in (ours, "PEFT", alone))
            lines.append(f"| {name} | {times} | {' | '.join(found(row, f'{ours}/{key}') for key in ('PEFT', alone))} |")
    return "\n".join([*lines, "", under])
