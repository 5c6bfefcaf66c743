"""The table in README.md, written by the run that measured it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .measure import Result
from .report import bound, found, value, verdict

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"


def rewrite(path: Path, results: Sequence[Result], under: str) -> None:
    """Replace what stands between the two markers.

    Raises:
        ValueError: if the file lacks a marker.
    """
    text = path.read_text(encoding="utf8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path} has no place for the table: a line {START} and below it a line {END}")
    path.write_text(f"{before}{START}\n{markdown(results, under)}\n{END}{after}", encoding="utf8")


def markdown(results: Sequence[Result], under: str) -> str:
    """The rows that have a target, then the others, which only ours, PEFT's and the floor's times are told of."""
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
