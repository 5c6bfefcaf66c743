"""The run of a sweep: its ensembles are trained until scores are due, and trials that diverged or fell behind leave them."""

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
from ..ensembles.optimizer import MakeOptimizer, PerMember, per_member
from ..ensembles.stack import stack
from ..errors import AdaptError
from .batches import Batches, Data, call_with, stack_batches
from .progress import Progress
from .result import Curve, means_up_to
from .trials import Trial

Loss = Callable[[Any, Any], Tensor]
Schedule = Callable[[int, Trial], float]
Evaluate = Callable[[Ensemble], Any]
_DROPOUT_SEED = 1_000_003


@dataclass(frozen=True)
class SweepConfig:
    """The arguments of `sweep` that concern training; see there."""

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
        """The steps at which trials are dropped, and how many of them go on."""
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

    def score_steps(self, trials: int) -> list[int]:
        """The steps after which scores are taken."""
        every = self.every or max(1, self.steps // 10)
        return sorted({*range(every, self.steps, every), *self.rungs(trials), self.steps})


class TrialGroup:
    """Trials that are trained as one ensemble.

    Attributes:
        members: the trials' indices.
        step: how many steps are done.
    """

    def __init__(self, members: Sequence[int], optimizer: PerMember) -> None:
        self.members, self.optimizer, self.step = list(members), optimizer, 0

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble of the trials that are still trained."""
        return self.optimizer.ensemble

    def select(self, members: Sequence[int]) -> None:
        """Go on with these trials only."""
        if list(members) != self.members:
            _, self.optimizer = self.optimizer.select([self.members.index(index) for index in members])
            self.members = list(members)


class SweepRun:
    """All that changes while a sweep runs.

    Attributes:
        status: of each trial: "running", "finished", "stopped" or "diverged".
        steps: how many steps each trial was trained.
        states: the adapters of the trials that ended.
        losses: the loss of every step, `(trials, steps)`; NaN for steps that were not run.
        scores: name -> what `evaluate` returned at the score steps, `(trials, score steps)`.
        groups: the groups that are still trained.
    """

    def __init__(
        self,
        config: SweepConfig,
        trials: Sequence[Trial],
        models: Sequence[AdaptedModel],
        groups: Sequence[Sequence[int]],
        settings: Sequence[Mapping[str, Any]],
        optimizer: MakeOptimizer,
        data: Data,
        chunk_size: int | None,
    ) -> None:
        self.config, self.trials = config, trials
        size = len(trials)
        self.rungs, self.score_steps = config.rungs(size), config.score_steps(size)
        self.status, self.steps = ["running"] * size, [0] * size
        self.states: list[Mapping[str, Tensor]] = [{} for _ in trials]
        self.losses = torch.full((size, config.steps), math.nan, dtype=torch.float64)
        self.scores: dict[str, Tensor] = {}
        self.groups: list[TrialGroup] = []
        for members in groups:
            ensemble = stack([models[i] for i in members], chunk_size=chunk_size, generator=torch.Generator()).train()
            made = per_member(optimizer, ensemble, **{k: [settings[i][k] for i in members] for k in settings[0]})
            for own in made.param_groups:
                own["initial_lr"] = own.get("lr")
            self.groups.append(TrialGroup(members, made))
        seeds = [int(trial.get("seed", 0)) for trial in trials]
        self._own_batches = [Batches(data, seed, shuffled=True) for seed in seeds] if config.own_order else []
        self._batches = Batches(data, 0)
        self._loops = False

    @property
    def metric(self) -> str:
        """The name of the score that trials are ranked by."""
        return next(iter(self.scores), "loss")

    def steps_left(self) -> int:
        """How many steps the groups have left, if no trial leaves."""
        return sum(self.config.steps - group.step for group in self.groups)

    def curves(self) -> dict[str, Curve]:
        """All curves so far."""
        steps = torch.tensor(self.score_steps)
        found = {name: Curve(steps, values) for name, values in self.scores.items()}
        found.setdefault("loss", Curve(steps, means_up_to(self.losses, self.score_steps)))
        return {**found, "training": Curve(torch.arange(1, self.config.steps + 1), self.losses)}

    def run(self, bar: Progress, save: Callable[[], None]) -> None:
        """Train to the end; `save` is called whenever scores were taken or trials dropped."""
        for stop in [*sorted(self.rungs), self.config.steps]:
            for group in list(self.groups):
                for step in [step for step in self.score_steps if group.step < step <= stop]:
                    before = group.step
                    self._train_to(group, step)
                    self._take_scores(group, before)
                    bar.update(step - before, self._progress(group))
                    save()
                    if not group.members:
                        break
            if stop in self.rungs and all(group.step == stop for group in self.groups):
                self._drop_worst(self.rungs[stop])
                save()

    def _train_to(self, group: TrialGroup, stop: int) -> None:
        """Train a group until so many steps are done."""
        ensemble, optimizer, config = group.ensemble, group.optimizer, self.config
        found = []
        for step in range(group.step, stop):
            if ensemble.generator is not None:
                ensemble.generator.manual_seed(_DROPOUT_SEED * 2**31 + step)
            optimizer.zero_grad()
            losses = self._losses(group, step)
            losses.sum().backward()
            if config.max_norm is not None:
                clip_grad_norm_per_member(ensemble, config.max_norm)
            if config.schedule is not None:
                for index, own in zip(group.members, optimizer.param_groups, strict=True):
                    own["lr"] = own["initial_lr"] * config.schedule(step, self.trials[index])
            optimizer.step()
            found.append(losses.detach())
        self.losses[group.members, group.step : stop] = torch.stack(found, 1).to(self.losses)
        group.step = stop

    def _losses(self, group: TrialGroup, step: int) -> Tensor:
        if self.config.own_order:
            own = [self._own_batches[index].at(step) for index in group.members]
            inputs, target = stack_batches([batch[0] for batch in own]), stack_batches([batch[1] for batch in own])
            output = call_with(group.ensemble.map, inputs)
        else:
            inputs, target = self._batches.at(step)
            output = call_with(group.ensemble, inputs)
        losses = self._member_losses(output, target, len(group.members))
        if losses.shape != (len(group.members),):
            raise AdaptError(f"loss(output, target) gives one number for a model, got shape {tuple(losses.shape[1:])}")
        return losses

    def _member_losses(self, output: Any, target: Any, size: int) -> Tensor:
        """The members' losses by one call under `vmap`, or one by one if the loss has no batching rule."""
        own = self.config.own_order
        if not self._loops:
            try:
                made: Tensor = torch.vmap(self.config.loss, (0, 0 if own else None), randomness="different")(output, target)
                return made
            except (RuntimeError, ValueError):
                self._loops = True  # an error of the loss itself is raised again below

        def member(tree: Any, index: int) -> Any:
            return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)

        return torch.stack([self.config.loss(member(output, i), member(target, i) if own else target) for i in range(size)])

    def _take_scores(self, group: TrialGroup, before: int) -> None:
        """Take a group's scores, and end its trials that diverged since a step, or all after the last step."""
        place = self.score_steps.index(group.step)
        if self.config.evaluate is not None:
            for name, values in self._evaluated(group, self.config.evaluate).items():
                row = self.scores.setdefault(name, torch.full((len(self.trials), len(self.score_steps)), math.nan).double())
                row[group.members, place] = values.to(row)
        finite = self.losses[group.members, before : group.step].isfinite().all(1).tolist()
        self._end(group, [index for index, good in zip(group.members, finite, strict=True) if not good], "diverged")
        if group.step == self.config.steps:
            self._end(group, list(group.members), "finished")

    @torch.no_grad()
    def _evaluated(self, group: TrialGroup, evaluate: Evaluate) -> dict[str, Tensor]:
        group.ensemble.eval()
        found = evaluate(group.ensemble)
        group.ensemble.train()
        scores = {name: torch.as_tensor(v) for name, v in (found if isinstance(found, Mapping) else {"score": found}).items()}
        for name, values in scores.items():
            if values.shape != (len(group.members),):
                raise AdaptError(
                    f"evaluate(ensemble) gives one number for each of the {len(group.members)} members, got shape "
                    f"{tuple(values.shape)} for {name!r}"
                )
            if name == "training":
                raise AdaptError("evaluate's score cannot be called 'training', the name of the loss of every step")
        return scores

    def _end(self, group: TrialGroup, ended: Sequence[int], status: str) -> None:
        """Take trials out of a group, which ends with its last one, and keep their adapters."""
        for index in ended:
            self.status[index], self.steps[index] = status, group.step
            self.states[index] = group.ensemble[group.members.index(index)].adapter_state_dict()
        left = [index for index in group.members if index not in ended]
        if left:
            group.select(left)
        elif group.members:
            group.members = []
            self.groups.remove(group)

    def _drop_worst(self, most: int) -> None:
        """End the worst trials, so that at most so many go on."""
        running = [index for group in self.groups for index in group.members]
        place = self.score_steps.index(self.groups[0].step) if self.groups else 0
        scores = (self.scores[self.metric] if self.scores else means_up_to(self.losses, self.score_steps))[:, place]
        worst = -math.inf if self.config.maximize else math.inf
        scores = scores.nan_to_num(nan=worst, posinf=math.inf, neginf=-math.inf)
        order = sorted(running, key=lambda index: float(scores[index]), reverse=self.config.maximize)
        for group in list(self.groups):
            self._end(group, [index for index in group.members if index in order[most:]], "stopped")

    def _progress(self, group: TrialGroup) -> str:
        going = sum(status == "running" for status in self.status)
        last = self.losses[:, max(group.step - 1, 0)]
        seen = last[last.isfinite()]
        return f"{going} trials go on, lowest loss {float(seen.min()) if len(seen) else math.nan:.3g}"
