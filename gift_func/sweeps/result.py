"""The result of a sweep: a table, curves, a picture, and the trials' models."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapt import readapt
from ..adapted_model import AdaptedModel
from ..errors import AdaptError
from ..network.frozen_base import FrozenBase


class Curve(NamedTuple):
    """A score of every trial over the steps.

    Attributes:
        steps: after how many steps it was taken, `(K,)`.
        values: of every trial, `(trials, K)`; NaN for steps that the trial was not trained for.
    """

    steps: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The result of `gf.sweep`; `print(result)` shows it as a table, the best trial first.

    Attributes:
        trials: the trials' values, in the given order.
        status: of each trial: "finished", "stopped" (by halving) or "diverged".
        steps: how many steps each trial was trained.
        metric: the name of the score that trials are ranked by.
        maximize: whether a higher score is better.
        curves: "training" is the loss of every step. The others are of the steps after which scores were taken: the scores of
            `evaluate`, and "loss", the mean of the training loss since scores were last taken.
    """

    trials: list[dict[str, Any]]
    status: list[str]
    steps: list[int]
    metric: str
    maximize: bool
    curves: dict[str, Curve]
    states: list[Mapping[str, Tensor]] = field(repr=False)
    strategies: list[Any] = field(repr=False)
    base: FrozenBase = field(repr=False)

    @property
    def ranking(self) -> list[int]:
        """The trials' indices, the best first: finished ones by their score, then stopped ones, then diverged ones."""

        def key(index: int) -> tuple[int, int, float]:
            score = self.score(index)
            rank = ("finished", "stopped", "diverged").index(self.status[index])
            worse = math.inf if math.isnan(score) else -score if self.maximize else score
            return rank, -self.steps[index], worse

        return sorted(range(len(self.trials)), key=key)

    def score(self, index: int, name: str | None = None) -> float:
        """The last value of a trial's curve, by default that of `metric`; NaN if it has none."""
        row = self.curves[name or self.metric].values[index]
        seen = row[~row.isnan()]
        return float(seen[-1]) if len(seen) else math.nan

    @property
    def best_index(self) -> int:
        """The index of the best trial.

        Raises:
            AdaptError: if none was finished.
        """
        first = self.ranking[0]
        if self.status[first] != "finished":
            raise AdaptError(f"no trial was finished: {', '.join(sorted(set(self.status)))}. Are the rates too high?")
        return first

    @property
    def best_trial(self) -> dict[str, Any]:
        """The values of the best trial."""
        return dict(self.trials[self.best_index])

    @property
    def best(self) -> AdaptedModel:
        """The adapted model of the best trial, in evaluation mode."""
        return self.model(self.best_index)

    def model(self, index: int) -> AdaptedModel:
        """The adapted model of a trial after its last step, in evaluation mode."""
        return readapt(self.base, self.strategies[index], self.states[index]).eval()

    def table(self) -> list[dict[str, Any]]:
        """A dict for each trial, the best first: its index, its values, its scores, its steps and its status."""
        names = [name for name in self.curves if name != "training"]
        return [
            {
                "trial": index,
                **self.trials[index],
                **{name: self.score(index, name) for name in names},
                "steps": self.steps[index],
                "status": self.status[index],
            }
            for index in self.ranking
        ]

    def __str__(self) -> str:
        rows = self.table()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        columns = [*(name for name in columns if name not in ("steps", "status")), "steps", "status"]
        cells = [columns, *([_text(row.get(name, "")) for name in columns] for row in rows)]
        widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
        words = [any(isinstance(row.get(name, 0), str) for row in rows) for name in columns]
        lines = []
        for line in cells:
            aligned = zip(line, widths, words, strict=True)
            lines.append("  ".join(cell.ljust(w) if word else cell.rjust(w) for cell, w, word in aligned).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str], *, by: str | None = None) -> None:
        """Draw the curves, one panel for each, and save the figure.

        Args:
            path: the file, in the format of its extension.
            by: the name of the value that the colours show; None for the first that differs between trials.

        Raises:
            ImportError: if matplotlib is not installed.
            AdaptError: if no trial has such a value.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib, which gift_func does not install: pip install matplotlib") from error
        by = by or next((key for key in self._keys() if len(self._choices(key)) > 1), self._keys()[0])
        if by not in self._keys():
            raise AdaptError(f"no trial has a value {by!r} to colour by; there are {', '.join(self._keys())}")
        choices = self._choices(by)
        shades = [colormaps["viridis"](0.88 * i / max(len(choices) - 1, 1)) for i in range(len(choices))]
        names = [name for name in self.curves if name != "training"]
        figure = Figure(figsize=(5.6 * len(names), 4.2), layout="constrained")
        best = self.ranking[0]
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            curve = self.curves[name]
            for index in [*(i for i in range(len(self.trials)) if i != best), best]:
                values = curve.values[index]
                ran = values.isfinite()
                shade = shades[choices.index(_text(self.trials[index].get(by, "")))]
                style = {"linewidth": 3.0, "marker": "o"} if index == best else {"linewidth": 1.0, "alpha": 0.75, "marker": "."}
                axes.plot(curve.steps[ran], values[ran], color=shade, markersize=4, **style)
            seen = curve.values[curve.values.isfinite()]
            if len(seen) and bool((seen > 0).all()) and float(seen.max() / seen.min()) > 30:
                axes.set_yscale("log")
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_xlabel("step")
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        for choice, shade in zip(choices, shades, strict=True):
            figure.axes[0].plot([], [], color=shade, linewidth=2, label=choice)
        figure.axes[0].legend(title=by, frameon=False, fontsize=9)
        of_best = ", ".join(f"{key} {_text(value)}" for key, value in self.trials[best].items())
        figure.suptitle(f"{len(self.trials)} trials; thick: the best ({of_best})", fontsize=10)
        figure.savefig(path, dpi=130)

    def _keys(self) -> list[str]:
        return list(dict.fromkeys(key for trial in self.trials for key in trial)) or ["trial"]

    def _choices(self, key: str) -> list[str]:
        return list(dict.fromkeys(_text(trial.get(key, "")) for trial in self.trials))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def means_up_to(losses: Tensor, steps: Sequence[int]) -> Tensor:
    """The mean loss from each of these steps back to the one before, `(trials, steps)`; NaN if one of the losses is."""
    edges = [0, *steps]
    return torch.stack([losses[:, edges[i] : edges[i + 1]].mean(1) for i in range(len(steps))], 1)
