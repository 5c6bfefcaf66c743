"""The course of a sweep: its ensembles, trained from mark to mark, and the trials that leave them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..adapted_model import AdaptedModel
from ..ensembles.clipping import clip_grad_norm_per_member
from ..ensembles.ensemble import Ensemble
from ..ensembles.optimizer import Kind, PerMember, per_member
from ..ensembles.stack import stack
from ..errors import AdaptError
from .batches import Batches, Data, called, side_by_side
from .progress import Progress
from .result import Curve, at_marks
from .trials import Trial

Loss = Callable[[Any, Any], Tensor]
Schedule = Callable[[int, Trial], float]
Evaluate = Callable[[Ensemble], Any]
_DRAWS = 1_000_003


@dataclass(frozen=True)
class SweepConfig:
    """What `sweep` was told of training; see there."""

    steps: int
    every: int | None
    loss: Loss
    schedule: Schedule | None
    max_norm: float | None
    own_order: bool
    evaluate: Evaluate | None
    maximize: bool
    halving: int | Mapping[int, float] | None

    def __post_init__(self) -> None:
        for name, value in [("steps", self.steps), ("every", self.every)]:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise AdaptError(f"{name} is a whole number of at least 1, got {name}={value!r}")
        if isinstance(self.halving, Mapping):
            wrong = [(s, f) for s, f in self.halving.items() if not (0 < s < self.steps and 0 < f < 1)]
            if wrong:
                raise AdaptError(f"halving keeps a fraction between 0 and 1 at a step before {self.steps}, got {wrong[0]}")
        elif self.halving is not None and (not isinstance(self.halving, int) or self.halving < 2):
            raise AdaptError(
                f"halving is a whole number of at least 2, or a dict from steps to fractions, got {self.halving!r}"
            )

    def rungs(self, trials: int) -> dict[int, int]:
        """After which steps how many trials go on."""
        if self.halving is None:
            return {}
        if isinstance(self.halving, Mapping):
            found, left = {}, trials
            for step, fraction in sorted(self.halving.items()):
                left = found[step] = max(1, math.ceil(left * fraction))
            return found
        depth = 0
        while self.halving ** (depth + 1) <= trials:
            depth += 1
        steps = [round(self.steps / self.halving ** (depth - rung)) for rung in range(depth)]
        return {step: max(1, trials // self.halving ** (rung + 1)) for rung, step in enumerate(steps) if step >= 1}

    def marks(self, trials: int) -> list[int]:
        """After which steps scores are taken."""
        every = self.every or max(1, self.steps // 10)
        return sorted({*range(every, self.steps, every), *self.rungs(trials), self.steps})


class TrialGroup:
    """One ensemble of trials.

    Attributes:
        members: the trials' indices.
        step: how many steps are done.
    """

    def __init__(self, members: Sequence[int], optimizer: PerMember) -> None:
        self.members, self.optimizer, self.step = list(members), optimizer, 0

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble as it is now."""
        return self.optimizer.ensemble

    def keep(self, members: Sequence[int]) -> None:
        """Go on with some of the trials only."""
        if list(members) != self.members:
            _, self.optimizer = self.optimizer.select([self.members.index(index) for index in members])
            self.members = list(members)


class SweepRun:
    """All that changes while a sweep runs.

    Attributes:
        status: of each trial: "running", "finished", "stopped" or "diverged".
        steps: how many steps each trial was trained.
        states: the adapters of the trials that ended.
        losses: the loss of every step, `(trials, steps)`; NaN where none was.
        scores: name -> what `evaluate` found at the marks, `(trials, marks)`.
        runs: the ensembles that are still trained.
    """

    def __init__(
        self,
        plan: SweepConfig,
        trials: Sequence[Trial],
        models: Sequence[AdaptedModel],
        groups: Sequence[Sequence[int]],
        settings: Sequence[Mapping[str, Any]],
        optimizer: Kind,
        data: Data,
        chunk_size: int | None,
    ) -> None:
        self.plan, self.trials = plan, trials
        size = len(trials)
        self.rungs, self.marks = plan.rungs(size), plan.marks(size)
        self.status, self.steps = ["running"] * size, [0] * size
        self.states: list[Mapping[str, Tensor]] = [{} for _ in trials]
        self.losses = torch.full((size, plan.steps), math.nan, dtype=torch.float64)
        self.scores: dict[str, Tensor] = {}
        self.runs: list[TrialGroup] = []
        for group in groups:
            ensemble = stack([models[i] for i in group], chunk_size=chunk_size, generator=torch.Generator()).train()
            made = per_member(optimizer, ensemble, **{k: [settings[i][k] for i in group] for k in settings[0]})
            for own in made.param_groups:
                own["initial_lr"] = own.get("lr")
            self.runs.append(TrialGroup(group, made))
        seeds = [int(trial.get("seed", 0)) for trial in trials]
        self._own = [Batches(data, seed, shuffled=True) for seed in seeds] if plan.own_order else []
        self._shared = Batches(data, 0)
        self._loops = False

    @property
    def metric(self) -> str:
        """What trials are ranked by."""
        return next(iter(self.scores), "loss")

    def left(self) -> int:
        """How many steps of ensembles are to be done, if none leaves."""
        return sum(self.plan.steps - run.step for run in self.runs)

    def curves(self) -> dict[str, Curve]:
        """All curves so far."""
        marks = torch.tensor(self.marks)
        found = {name: Curve(marks, values) for name, values in self.scores.items()}
        found.setdefault("loss", Curve(marks, at_marks(self.losses, self.marks)))
        return {**found, "training": Curve(torch.arange(1, self.plan.steps + 1), self.losses)}

    def run(self, bar: Progress, save: Callable[[], None] | None) -> None:
        """Train to the end.

        Args:
            bar: is told of every mark.
            save: is called after every mark.
        """
        for stop in [*sorted(self.rungs), self.plan.steps]:
            for run in list(self.runs):
                for mark in [mark for mark in self.marks if run.step < mark <= stop]:
                    before = run.step
                    self._advance(run, mark)
                    self._look(run, before)
                    bar.update(mark - before, self._said(run))
                    if not run.members:
                        self.runs.remove(run)
                    if save is not None:
                        save()
                    if not run.members:
                        break
            if stop in self.rungs and all(run.step == stop for run in self.runs):
                self._drop(self.rungs[stop])
                if save is not None:
                    save()

    def _advance(self, run: TrialGroup, mark: int) -> None:
        """Train an ensemble up to a mark."""
        ensemble, optimizer, plan = run.ensemble, run.optimizer, self.plan
        found = []
        for step in range(run.step, mark):
            if ensemble.generator is not None:
                ensemble.generator.manual_seed(_DRAWS * 2**31 + step)
            optimizer.zero_grad()
            losses = self._losses(run, step)
            losses.sum().backward()
            if plan.max_norm is not None:
                clip_grad_norm_per_member(ensemble, plan.max_norm)
            if plan.schedule is not None:
                for index, group in zip(run.members, optimizer.param_groups, strict=True):
                    group["lr"] = group["initial_lr"] * plan.schedule(step, self.trials[index])
            optimizer.step()
            found.append(losses.detach())
        self.losses[run.members, run.step : mark] = torch.stack(found, 1).to(self.losses)
        run.step = mark

    def _losses(self, run: TrialGroup, step: int) -> Tensor:
        if self.plan.own_order:
            own = [self._own[index].at(step) for index in run.members]
            inputs, target = side_by_side([batch[0] for batch in own]), side_by_side([batch[1] for batch in own])
            output = called(run.ensemble.map, inputs)
        else:
            inputs, target = self._shared.at(step)
            output = called(run.ensemble, inputs)
        losses = self._each(output, target, len(run.members))
        if losses.shape != (len(run.members),):
            raise AdaptError(f"loss(output, target) gives one number for a model, got shape {tuple(losses.shape[1:])}")
        return losses

    def _each(self, output: Any, target: Any, size: int) -> Tensor:
        """The members' losses: at once, or one by one where the loss has no batching rule."""
        own = self.plan.own_order
        if not self._loops:
            try:
                made: Tensor = torch.vmap(self.plan.loss, (0, 0 if own else None), randomness="different")(output, target)
                return made
            except (RuntimeError, ValueError):
                self._loops = True  # an error of the loss's own comes again below

        def share(tree: Any, index: int) -> Any:
            return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)

        return torch.stack([self.plan.loss(share(output, i), share(target, i) if own else target) for i in range(size)])

    def _look(self, run: TrialGroup, before: int) -> None:
        """Take scores at a mark; let those go that diverged, and all at the end."""
        place = self.marks.index(run.step)
        if self.plan.evaluate is not None:
            for name, values in self._evaluated(run, self.plan.evaluate).items():
                row = self.scores.setdefault(name, torch.full((len(self.trials), len(self.marks)), math.nan).double())
                row[run.members, place] = values.to(row)
        fine = self.losses[run.members, before : run.step].isfinite().all(1).tolist()
        self._end(run, [index for index, good in zip(run.members, fine, strict=True) if not good], "diverged")
        if run.step == self.plan.steps:
            self._end(run, list(run.members), "finished")

    @torch.no_grad()
    def _evaluated(self, run: TrialGroup, evaluate: Evaluate) -> dict[str, Tensor]:
        run.ensemble.eval()
        found = evaluate(run.ensemble)
        run.ensemble.train()
        scores = {name: torch.as_tensor(v) for name, v in (found if isinstance(found, Mapping) else {"score": found}).items()}
        for name, values in scores.items():
            if values.shape != (len(run.members),):
                raise AdaptError(
                    f"evaluate(ensemble) gives one number for each of the {len(run.members)} members, got shape "
                    f"{tuple(values.shape)} for {name!r}"
                )
            if name == "training":
                raise AdaptError("evaluate's score cannot be called 'training', the name of the loss of every step")
        return scores

    def _end(self, run: TrialGroup, gone: Sequence[int], status: str) -> None:
        for index in gone:
            self.status[index], self.steps[index] = status, run.step
            self.states[index] = run.ensemble[run.members.index(index)].adapter_state_dict()
        left = [index for index in run.members if index not in gone]
        if left:
            run.keep(left)
        else:
            run.members = []

    def _drop(self, most: int) -> None:
        """Let the worst go, so that `most` stay."""
        alive = [index for run in self.runs for index in run.members]
        place = self.marks.index(self.runs[0].step) if self.runs else 0
        scores = (self.scores[self.metric] if self.scores else at_marks(self.losses, self.marks))[:, place]
        worst = -math.inf if self.plan.maximize else math.inf
        scores = scores.nan_to_num(nan=worst, posinf=math.inf, neginf=-math.inf)
        order = sorted(alive, key=lambda index: float(scores[index]), reverse=self.plan.maximize)
        for run in list(self.runs):
            self._end(run, [index for index in run.members if index in order[most:]], "stopped")
            if not run.members:
                self.runs.remove(run)

    def _said(self, run: TrialGroup) -> str:
        going = sum(status == "running" for status in self.status)
        mean = self.losses[:, max(run.step - 1, 0)]
        seen = mean[mean.isfinite()]
        return f"{going} trials go on, lowest loss {float(seen.min()) if len(seen) else math.nan:.3g}"
