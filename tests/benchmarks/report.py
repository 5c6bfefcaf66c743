"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure import Result, Spread

UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
LARGER = {
    "s": UNITS,
    "B": {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0},
    "FLOP": {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "FLOP": 1.0},
}


def machine(device: str | None = None) -> dict[str, Any]:
    """Where it was measured, and how busy it is."""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo() if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    return {
        "platform": platform.platform(),
        "processor": names[0] if names else platform.processor(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        **({"device": torch.cuda.get_device_name()} if device == "cuda" else {}),
        **versions,
    }


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def caption(mode: str, host: Mapping[str, Any]) -> str:
    """How it was measured, and where."""
    return (
        f"Medians of runs in turns; ratios with quartiles. {mode.capitalize()} run on {host.get('device', host['processor'])}, "
        f"{counted(host['cpus'], 'core')}, {counted(host['threads'], 'thread')}, torch {host['torch']}, peft {host['peft']}, "
        f"transformers {host['transformers']}; load {host['load'][0]} before, {host['load after'][0]} after; "
        f"{host['seconds']} s."
    )


def counted(many: int, what: str) -> str:
    return f"{many} {what}{'' if many == 1 else 's'}"


def families(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.family, []).append(result)
    return found


def table(results: Sequence[Result]) -> str:
    """One aligned table of each family: medians, ratios and differences with their quartiles, targets met or missed."""
    parts = []
    for family, rows in families(results).items():
        times, ratios, differences, facts = (
            list(dict.fromkeys(key for row in rows for key in getattr(row, kind)))
            for kind in ("times", "ratios", "differences", "facts")
        )
        units = {row.unit for row in rows}
        unit = unit_of(rows) if len(units) == 1 and alike(rows) else ""  # no unit in the head: each cell has its own
        last = [
            name for name in ("target", "note") if any(getattr(row, "targets" if name == "target" else name) for row in rows)
        ]
        head = [family, *(f"{key} {unit}".rstrip() for key in times), *ratios, *differences, *facts, "rounds", *last]
        lines = [head]
        for row in rows:
            cells = [row.row]
            cells += [value(row.times[key].median, row.unit, unit) if key in row.times else "-" for key in times]
            cells += [ratio(row.ratios[key]) if key in row.ratios else "-" for key in ratios]
            cells += [difference(row.differences[key]) if key in row.differences else "-" for key in differences]
            cells += [f"{fact:,}" if isinstance(fact := row.facts.get(key, "-"), int) else fact for key in facts]
            cells += [str(row.rounds), *(targets(row) if name == "target" else row.note for name in last)]
            lines.append(cells)
        parts.append(aligned(lines, len(last)))
    return "\n\n".join(parts)


def targets(row: Result) -> str:
    """Each target of a row, and whether it is met; a quick run is too small to say."""
    return "; ".join(f"{key} <= {bound(row, key)}{' ' + verdict(row, key) if row.judged else ''}" for key in row.targets)


def bound(row: Result, key: str) -> str:
    return value(row.targets[key], "s") if key in row.differences else f"{row.targets[key]:g}"


def found(row: Result, key: str) -> str:
    """What was measured where a target is, with quartiles."""
    return difference(row.differences[key]) if key in row.differences else ratio(row.ratios[key])


def verdict(row: Result, key: str) -> str:
    return "met" if row.met(key) else "MISSED"


def unit_of(rows: Sequence[Result]) -> str:
    """The unit in which the least of the rows' values is not below 1."""
    if rows[0].unit not in LARGER:
        return rows[0].unit
    return fitting(min(time.median for row in rows for time in row.times.values()), rows[0].unit)


def alike(rows: Sequence[Result]) -> bool:
    """Whether one unit suits all values."""
    found = [time.median for row in rows for time in row.times.values()]
    return max(found) < 5000 * min(found)


def fitting(number: float, unit: str) -> str:
    sizes = LARGER.get(unit, {unit: 1.0})
    return next((name for name, size in sizes.items() if abs(number) >= size), list(sizes)[-1])


def value(found: float, unit: str, shown: str = "") -> str:
    """A number with its unit, or in the unit that is shown elsewhere."""
    chosen = shown or fitting(found, unit)
    size = LARGER[unit][chosen] if unit in LARGER else 1.0
    return number(found / size) if shown else f"{number(found / size)} {chosen}"


def number(found: float) -> str:
    if found == round(found) and abs(found) < 1e6:
        return f"{found:,.0f}"
    return f"{found:,.0f}" if abs(found) >= 1000 else f"{found:.1f}" if abs(found) >= 10 else f"{found:.2f}"


def ratio(found: Spread) -> str:
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def difference(found: Spread) -> str:
    unit = fitting(found.median, "s")
    low, median, high = (number(part / UNITS[unit]) for part in found)
    return f"{median} {unit} ({low}-{high})"


def aligned(lines: Sequence[Sequence[str]], words: int = 0) -> str:
    """A table whose first column and last `words` columns are text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, *range(len(widths) - words, len(widths))}
    shown = [
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [shown[0], "  ".join("-" * width for width in widths), *shown[1:]])


def verdicts(result: Result) -> dict[str, dict[str, float | bool]]:
    return {
        key: {"most": most, "found": result.found(key).median, **({"met": result.met(key)} if result.judged else {})}
        for key, most in result.targets.items()
    }


def write_json(path: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    rows = [
        {
            "name": result.name,
            "rounds": result.rounds,
            ("seconds" if result.unit == "s" else result.unit): {key: time._asdict() for key, time in result.times.items()},
            "ratios": {key: value._asdict() for key, value in result.ratios.items()},
            **(
                {"differences": {key: found._asdict() for key, found in result.differences.items()}}
                if result.differences
                else {}
            ),
            **({"targets": verdicts(result)} if result.targets else {}),
            **result.facts,
            **({"note": result.note} if result.note else {}),
        }
        for result in results
    ]
    path.write_text(json.dumps({**about, "rows": rows}, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def read_json(path: Path) -> tuple[list[Result], str]:
    """The timed rows of a file that `write_json` wrote, and their caption."""
    run = json.loads(path.read_text(encoding="utf8"))

    def spreads(found: Mapping[str, Any]) -> dict[str, Spread]:
        return {key: Spread(**one) for key, one in found.items()}

    rows = [row for row in run["rows"] if "seconds" in row]
    results = [Result(row["name"], spreads(row["seconds"]), spreads(row["ratios"]), row["rounds"], {}, "") for row in rows]
    return results, caption(run["mode"], run["machine"])
