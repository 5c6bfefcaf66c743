"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure import Result, Spread

UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


def machine() -> dict[str, Any]:
    """Where it was measured, and how busy it is."""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo() if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    return {
        "platform": platform.platform(),
        "processor": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        **versions,
    }


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def families(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.family, []).append(result)
    return found


def table(results: Sequence[Result]) -> str:
    """One aligned table of each family: medians, and ratios with their quartiles."""
    parts = []
    for family, rows in families(results).items():
        unit = unit_of(rows)
        times, ratios, facts = (
            list(dict.fromkeys(key for row in rows for key in getattr(row, kind))) for kind in ("times", "ratios", "facts")
        )
        noted = any(row.note for row in rows)
        head = [family, *(f"{key} {unit}" for key in times), *ratios, *facts, "rounds", *(["note"] if noted else [])]
        lines = [head]
        for row in rows:
            cells = [row.row]
            cells += [number(row.times[key].median / UNITS[unit]) if key in row.times else "-" for key in times]
            cells += [ratio(row.ratios[key]) if key in row.ratios else "-" for key in ratios]
            cells += [f"{fact:,}" if isinstance(fact := row.facts.get(key, "-"), int) else fact for key in facts]
            cells += [str(row.rounds), *([row.note] if noted else [])]
            lines.append(cells)
        parts.append(aligned(lines))
    return "\n\n".join(parts)


def unit_of(rows: Sequence[Result]) -> str:
    least = min(time.median for row in rows for time in row.times.values())
    return next((unit for unit, size in UNITS.items() if least >= size), "µs")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: Spread) -> str:
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, len(widths) - 1} if lines[0][-1] == "note" else {0}
    shown = [
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [shown[0], "  ".join("-" * width for width in widths), *shown[1:]])


def write_json(path: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    rows = [
        {
            "name": result.name,
            "rounds": result.rounds,
            "seconds": {key: time._asdict() for key, time in result.times.items()},
            "ratios": {key: value._asdict() for key, value in result.ratios.items()},
            **result.facts,
            **({"note": result.note} if result.note else {}),
        }
        for result in results
    ]
    path.write_text(json.dumps({**about, "rows": rows}, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
