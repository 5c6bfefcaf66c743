"""The pictures: bars of each row's contenders, and lines over the number of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .measure import Result, Spread
from .report import LARGER, families, fitting, number, value

INK, MUTED, PAPER = "#1b2733", "#64717f", "#fbfaf7"
COLOURS = {"floor": "#d9dee4", "base": "#d9dee4", "reading": "#d9dee4", "ours": "#0b4f7d", "PEFT": "#a7b1bc"}
OTHER = "#7fb2d0"
ORDER = ["floor", "base", "reading", "ours"]  # then what else there is, and PEFT last


GROWTH = ("growth", "memory growth")


def draw(path: Path, results: Sequence[Result], under: str) -> None:
    """Draw one panel of bars for each family as a PNG, and the growth beside it, where it was measured."""
    growing = [row for row in results if row.family in GROWTH]
    if growing:
        draw_growth(path.with_name(f"{path.stem}-growth{path.suffix}"), growing, under)
    rest = [row for row in results if row.family not in GROWTH]
    if rest:
        draw_bars(path, rest, under)


def draw_bars(path: Path, results: Sequence[Result], under: str) -> None:
    """Draw one panel of bars for each family."""
    panels = families(results)
    heights = [0.9 + 0.3 * sum(len(row.times) for row in rows) * 0.75 + 0.2 * len(rows) for rows in panels.values()]
    style: Any = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(11, sum(heights) + 0.6), height_ratios=heights, squeeze=False, facecolor=PAPER,
            layout="constrained",
        )  # fmt: skip
        figure.suptitle(f"{under}\nIn brackets: ours over it. Lines: quartiles.", fontsize=7, color=MUTED, x=0.01, ha="left")
        for panel, (family, rows) in zip(axes[:, 0], panels.items(), strict=True):
            bars(panel, family, rows)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def draw_growth(path: Path, results: Sequence[Result], under: str) -> None:
    """Draw one panel for each row: its contenders over the number of adapters."""
    style: Any = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            -(-len(results) // 2), 2, figsize=(11, 3.4 * -(-len(results) // 2) + 0.5), squeeze=False, facecolor=PAPER,
            layout="constrained",
        )  # fmt: skip
        figure.suptitle(under, fontsize=7, color=MUTED, x=0.01, ha="left")
        for panel, row in zip(axes.flat, results, strict=False):
            lines(panel, row)
        for panel in list(axes.flat)[len(results) :]:
            panel.set_axis_off()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def lines(axes: Axes, row: Result) -> None:
    """Of contenders called "ours, 8" a line of each kind; others, like the floor, are level lines."""
    unit = fitting(max(time.median for time in row.times.values()), row.unit)
    size = LARGER[row.unit][unit]
    known: dict[str, dict[int, Spread]] = {}
    for key, time in row.times.items():
        kind, _, count = key.partition(", ")
        if count:
            known.setdefault(kind, {})[int(count)] = time
        else:
            axes.axhline(time.median / size, color=INK, linewidth=1, linestyle=":", label=key)
    for kind, points in known.items():
        colour, values = COLOURS.get(kind, OTHER), [point.median / size for point in points.values()]
        axes.plot(list(points), values, marker="o", markersize=4, color=colour, label=kind)
        low, high = ([point[end] / size for point in points.values()] for end in (0, 2))
        axes.fill_between(list(points), low, high, color=colour, alpha=0.2, linewidth=0)
        axes.annotate(
            number(values[-1]), (list(points)[-1], values[-1]), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    counts = list(known["ours"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlim(counts[0] / 1.15, counts[-1] * 1.5)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{row.name.replace('/', ': ', 1)}, {unit}", loc="left", fontsize=10, weight="bold")
    axes.set_xlabel("adapters", fontsize=9)
    axes.set_facecolor(PAPER)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def bars(axes: Axes, family: str, rows: Sequence[Result]) -> None:
    """Bars of one scale for the steps, which are alike; elsewhere each row fills the panel."""
    common = family == "step"
    longest = [max(time.median for time in row.times.values()) for row in rows]
    limit = min(max(longest), 3 * median(longest))  # one slow row must not flatten the rest: its bar is cut
    place, ticks, seen = 0.0, [], set()
    for row, most in zip(rows, longest, strict=True):
        start, full = place, limit if common else most
        for key in sorted(row.times, key=order):
            low, middle, high = (time / full for time in row.times[key])
            kind, _, count = key.partition(", ")
            name = kind if count.isdigit() else key
            label = "_" if name in seen or name not in COLOURS else name
            seen.add(name)
            axes.barh(place, min(middle, 1), 0.86, color=COLOURS.get(name, OTHER), label=label)
            if high < 1.1:
                axes.plot([low, high], [place, place], color=INK, linewidth=1, alpha=0.6)
            shown = [value(row.times[key].median, row.unit)]
            shown += [f"({row.ratios[f'ours/{key}'].median:.2f}x)"] if f"ours/{key}" in row.ratios else []
            shown += [] if name in COLOURS and not count.isdigit() else [key]
            at = max(min(middle, 1), high if high < 1.1 else 0)
            cut = " →" if middle > 1 else ""
            axes.text(at + 0.006, place, f"{'  '.join(shown)}{cut}", va="center", fontsize=7.5, color=MUTED)
            place += 1
        ticks.append((start + place - 1) / 2)
        place += 0.7
    axes.set_yticks(ticks, [row.row for row in rows], fontsize=10)
    axes.set_ylim(place - 0.9, -0.8)
    axes.set_xlim(0, 1.3)
    axes.set_xticks([])
    axes.set_title(family, loc="left", fontsize=11, weight="bold")
    axes.set_facecolor(PAPER)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=5, frameon=False, fontsize=9, handlelength=1)


def order(key: str) -> tuple[bool, int]:
    return key.startswith("PEFT"), ORDER.index(key) if key in ORDER else len(ORDER)
