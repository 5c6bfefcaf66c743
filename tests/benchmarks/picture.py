"""The picture: bars of each row's contenders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .measure import Result
from .report import UNITS, families, number, unit_of

INK, MUTED, PAPER = "#1b2733", "#64717f", "#fbfaf7"
COLOURS = {"floor": "#d9dee4", "base": "#d9dee4", "reading": "#d9dee4", "ours": "#0b4f7d", "PEFT": "#a7b1bc"}
OTHER = "#7fb2d0"
ORDER = ["floor", "base", "reading", "ours"]  # then what else there is, and PEFT last


def draw(path: Path, results: Sequence[Result], under: str) -> None:
    """Draw one panel of each family as a PNG."""
    panels = families(results)
    heights = [0.9 + 0.3 * sum(len(row.times) for row in rows) * 0.75 + 0.2 * len(rows) for rows in panels.values()]
    style: Any = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(11, sum(heights) + 0.6), height_ratios=heights, squeeze=False, facecolor=PAPER,
            layout="constrained",
        )  # fmt: skip
        figure.suptitle(under, fontsize=9, color=MUTED, x=0.01, ha="left")
        for panel, (family, rows) in zip(axes[:, 0], panels.items(), strict=True):
            bars(panel, family, rows)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def bars(axes: Axes, family: str, rows: Sequence[Result]) -> None:
    unit = unit_of(rows)
    longest = [max(time.median for time in row.times.values()) / UNITS[unit] for row in rows]
    limit = min(max(longest), 3 * median(longest))  # one slow row must not flatten the rest: its bar is cut
    place, ticks, seen = 0.0, [], set()
    for row in rows:
        start = place
        for key in sorted(row.times, key=lambda key: (key == "PEFT", ORDER.index(key) if key in ORDER else len(ORDER))):
            low, value, high = (time / UNITS[unit] for time in row.times[key])
            label = "_" if key in seen else key
            seen.add(key)
            axes.barh(place, min(value, limit), 0.86, color=COLOURS.get(key, OTHER), label=label)
            if high < limit:
                axes.plot([low, high], [place, place], color=INK, linewidth=1, alpha=0.6)
            cut = " →" if value > limit else ""
            beside = f"  ({row.ratios[f'ours/{key}'].median:.2f}x)" if f"ours/{key}" in row.ratios else ""
            at = min(max(value, high), limit)
            axes.text(at + 0.006 * limit, place, f"{number(value)}{beside}{cut}", va="center", fontsize=7.5, color=MUTED)
            place += 1
        ticks.append((start + place - 1) / 2)
        place += 0.7
    axes.set_yticks(ticks, [row.row for row in rows], fontsize=10)
    axes.set_ylim(place - 0.9, -0.8)
    axes.set_xlim(0, 1.17 * limit)
    axes.set_title(f"{family}, {unit} (in brackets: ours over it; lines: quartiles)", loc="left", fontsize=11, weight="bold")
    axes.set_facecolor(PAPER)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0.7, 1.0), ncol=4, frameon=False, fontsize=9, handlelength=1)
