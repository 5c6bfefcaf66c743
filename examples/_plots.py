"""The smaller examples' pictures: a curve with its error bars, and a reliability diagram."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from _picture import DARK, GREY, INK, MIDDLE, MUTED, PALE, PAPER
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

OUT = Path(__file__).parent / "out"


@contextmanager
def page(name: str, title: str, subtitle: str, columns: int = 1) -> Iterator[list[Axes]]:
    """A row of empty axes under a title; `examples/out/<name>.png` when it is left."""
    style: Any = {"font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": PALE, "axes.labelcolor": MUTED}
    with plt.rc_context({**style, "xtick.color": MUTED, "ytick.color": MUTED}):
        figure = plt.figure(figsize=(10, 5.6), facecolor=PAPER)
        figure.text(0.07, 0.915, title, fontsize=18, weight="bold")
        figure.text(0.07, 0.862, subtitle, fontsize=11, color=MUTED)
        width = 0.89 / columns
        height = 0.65 if columns == 1 else 0.58
        made = [figure.add_axes((0.08 + i * width, 0.12, width - 0.05, height)) for i in range(columns)]
        for axes in made:
            axes.set_facecolor(PAPER)
            axes.tick_params(length=0)
            axes.spines[["top", "right"]].set_visible(False)
        yield made
        OUT.mkdir(exist_ok=True)
        figure.savefig(OUT / f"{name}.png", dpi=120)
        plt.close(figure)
    print(f"{OUT / name}.png drawn")


def bands(
    name: str, title: str, subtitle: str, curve: tuple[Tensor, Tensor, Tensor, Tensor], points: tuple[Tensor, Tensor]
) -> None:
    """A predicted curve with one and two standard deviations around it.

    Args:
        name: of the file.
        title: what the picture says.
        subtitle: what it shows.
        curve: places, predicted mean, its standard deviation, and the truth, n numbers each.
        points: the observations' places and values, m numbers each.
    """
    x, mean, deviation, truth = (part.flatten().numpy() for part in curve)
    with page(name, title, subtitle) as (axes,):
        axes.fill_between(x, mean - 2 * deviation, mean + 2 * deviation, color="#dcecf2", label="two standard deviations")
        axes.fill_between(x, mean - deviation, mean + deviation, color="#b9d5df", label="one")
        axes.plot(x, truth, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.5, label="the truth")
        axes.plot(x, mean, color=DARK, linewidth=2.2, label="prediction")
        axes.scatter(points[0].flatten().numpy(), points[1].flatten().numpy(), s=18, color=INK, zorder=3, label="observations")
        axes.set(xlim=(x.min(), x.max()), ylim=(-3.5, 3.5), xlabel="x")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=5, frameon=False, fontsize=10, handlelength=1.4)


class Calibration(NamedTuple):
    """How sure a network is against how often it is right, in bins of confidence that are equally wide.

    Attributes:
        confidence: mean confidence of each bin, `(bins,)`; of no meaning where a bin is empty.
        accuracy: share of right answers of each bin, `(bins,)`.
        share: share of all answers that fall into each bin, `(bins,)`.
        error: the expected calibration error, `Σ share·|accuracy − confidence|`.
    """

    confidence: Tensor
    accuracy: Tensor
    share: Tensor
    error: float

    @staticmethod
    def of(probabilities: Tensor, labels: Tensor, bins: int = 10) -> Calibration:
        """Measure it (Guo et al., 2017, arXiv:1706.04599) on bins from 1/K, the least confidence that there is, to 1.

        Args:
            probabilities: `(samples, K)`.
            labels: `(samples,)`.
            bins: how many.
        """
        confidence, said = probabilities.max(-1)
        least = 1 / probabilities.shape[-1]
        which = ((confidence - least) / (1 - least) * bins).long().clamp(0, bins - 1)
        members = F.one_hot(which, bins).to(confidence)
        size = members.sum(0).clamp(min=1)
        sure, right = confidence @ members / size, (said == labels).to(confidence) @ members / size
        share = members.mean(0)
        return Calibration(sure, right, share, float((share * (right - sure).abs()).sum()))


def reliability(name: str, title: str, subtitle: str, found: Mapping[str, tuple[Calibration, str]], least: float = 0.0) -> None:
    """Reliability diagrams side by side: a bar that ends below the diagonal is overconfidence.

    Args:
        name: of the file.
        title: what the picture says.
        subtitle: what it shows.
        found: what to call a network -> its calibration, and a note.
        least: where the bins start, 1/K.
    """
    with page(name, title, subtitle, len(found)) as row:
        for axes, (called, (one, note)) in zip(row, found.items(), strict=True):
            step = (1 - least) / len(one.share)
            for i, (sure, right, share) in enumerate(zip(*(part.tolist() for part in one[:3]), strict=True)):
                middle = least + (i + 0.5) * step
                axes.bar(middle, 0.25 * share, 0.9 * step, color=GREY, bottom=-0.25)
                if share:
                    axes.bar(middle, right, 0.9 * step, color=MIDDLE if axes is row[0] else DARK)
                    axes.plot(sure, right, "o", color=INK, markersize=4)
            axes.plot([least, 1], [least, 1], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.set(xlim=(least, 1), ylim=(-0.26, 1.02), xlabel="confidence", yticks=[0, 0.5, 1])
            axes.annotate(called, (0, 1), (0, 24), "axes fraction", "offset points", fontsize=13, weight="bold")
            axes.annotate(note, (0, 1), (0, 8), "axes fraction", "offset points", fontsize=10.5, color=MUTED)
        row[0].set_ylabel("how often it is right; grey: share of the answers")
