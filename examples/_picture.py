"""The quickstart's picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

# One hue that goes from light to dark reads the same to every eye, and in grey.
INK, MUTED, PAPER = "#1b2733", "#64717f", "#fbfaf7"
PALE, GREY, MIDDLE, DARK = "#d9dee4", "#a7b1bc", "#7fb2d0", "#0b4f7d"
SHADES = LinearSegmentedColormap.from_list("shades", ["#f3f1ea", "#b9d5df", "#5b9cc0", "#0b4f7d", "#082f4e"])


class Result(NamedTuple):
    """What the quickstart found: accuracies in [0, 1] by language, `matrix[adapter][language]`, bytes of model and adapter."""

    languages: list[str]
    majority: dict[str, float]
    before: dict[str, float]
    head_only: dict[str, float]
    after: dict[str, float]
    matrix: list[list[float]]
    sizes: tuple[int, int]


def draw(path: Path, result: Result) -> None:
    """Draw the result as a PNG."""
    style: Any = {
        "font.family": "DejaVu Sans",
        "text.color": INK,
        "axes.edgecolor": PALE,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(14, 8), facecolor=PAPER)
        figure.text(0.05, 0.925, "One frozen encoder, one small adapter per language", fontsize=23, weight="bold")
        subtitle = "Asked or answered? all-MiniLM-L6-v2, an English encoder, on held-out sentences without case and punctuation"
        figure.text(0.05, 0.883, subtitle, fontsize=12.5, color=MUTED)
        heat_map(figure.add_axes((0.115, 0.09, 0.365, 0.62)), result)
        bars(figure.add_axes((0.57, 0.43, 0.385, 0.28)), result)
        sizes(figure.add_axes((0.57, 0.09, 0.385, 0.15)), result.sizes)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def headline(axes: Axes, text: str, under: str, height: float) -> None:
    axes.annotate(text, (0, 1), (0, height), "axes fraction", "offset points", fontsize=14, weight="bold")
    axes.annotate(under, (0, 1), (0, height - 18), "axes fraction", "offset points", fontsize=10.5, color=MUTED)
    axes.set_facecolor(PAPER)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def heat_map(axes: Axes, result: Result) -> None:
    names = [name.capitalize() for name in result.languages]
    axes.imshow(result.matrix, cmap=SHADES, vmin=0.45, vmax=0.95, aspect="auto")
    for i, row in enumerate(result.matrix):
        for j, value in enumerate(row):
            shade = "white" if value > 0.7 else INK
            weight = "bold" if i == j else "normal"
            axes.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=18, color=shade, weight=weight)
    axes.set_xticks(range(len(names)), names, fontsize=12)
    axes.set_yticks(range(len(names)), names, fontsize=12)
    axes.xaxis.tick_top()
    axes.set_ylabel("adapter", fontsize=11, color=MUTED, labelpad=8)
    headline(
        axes,
        "Swap the adapter, swap the skill",
        "rows: the adapter bound to the base, columns: the language of the sentences",
        52,
    )
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color=PAPER, linewidth=4)
        axes.axvline(edge - 0.5, color=PAPER, linewidth=4)


def bars(axes: Axes, result: Result) -> None:
    kinds = [
        ("untrained", PALE, result.before),
        ("commoner kind", GREY, result.majority),
        ("head only", MIDDLE, result.head_only),
        ("adapter + head", DARK, result.after),
    ]
    for k, (label, colour, values) in enumerate(kinds):
        places = [i + 0.215 * (k - 1.5) for i in range(len(values))]
        heights = [values[name] for name in result.languages]
        axes.bar(places, heights, 0.2, color=colour, label=label)
        for x, height in zip(places, heights, strict=True):
            weight = "bold" if k == 3 else "normal"
            axes.text(x, height + 0.015, f"{100 * height:.0f}", ha="center", va="bottom", fontsize=11, weight=weight)
    axes.set_xticks(range(len(result.languages)), [name.capitalize() for name in result.languages], fontsize=12)
    axes.set_yticks([])
    axes.set_ylim(0, 1.12)
    axes.axhline(0, color=MUTED, linewidth=1)
    headline(axes, "Before and after", "accuracy in %, each adapter on its own language", 52)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.94), ncol=4, frameon=False, fontsize=10.5, handlelength=1, columnspacing=1.0
    )


def sizes(axes: Axes, sizes: tuple[int, int]) -> None:
    whole, adapter = (size / 1e6 for size in sizes)
    axes.barh([1, 0], [whole, adapter], 0.56, color=[PALE, DARK])
    axes.text(whole * 0.985, 1, f"{whole:.0f} MB, stays as it is", va="center", ha="right", fontsize=11.5)
    axes.text(
        adapter + whole * 0.012, 0, f"{adapter:.1f} MB ({adapter / whole:.1%})", va="center", fontsize=11.5, weight="bold"
    )
    axes.set_yticks([1, 0], ["the model", "one adapter"], fontsize=12)
    axes.set_xticks([])
    axes.set_ylim(-0.5, 1.5)
    headline(axes, "What a language costs on disk", "one file: LoRA of rank 8 in every layer, and a head", 32)
