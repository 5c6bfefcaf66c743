"""A sweep: many trials of hyper-parameters trained as one run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapt import adapt, base_of
from ..ensembles.optimizer import Kind
from ..network.frozen_base import FrozenBase
from .batches import Data
from .checkpoint import describe, read, write
from .progress import Progress
from .result import SweepResult
from .training import Evaluate, Loss, Schedule, SweepConfig, SweepRun
from .trials import Trial, Watched, check_read, grouped, settings_of, trials_of


def sweep(
    model: nn.Module | FrozenBase,
    trials: Trial | Iterable[Trial],
    strategy: Any,
    *,
    data: Data,
    loss: Loss,
    steps: int,
    optimizer: Kind = torch.optim.AdamW,
    schedule: Schedule | None = None,
    max_norm: float | None = None,
    own_order: bool = False,
    evaluate: Evaluate | None = None,
    maximize: bool = False,
    every: int | None = None,
    halving: int | Mapping[int, float] | None = None,
    at_once: int | None = None,
    chunk_size: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SweepResult:
    """Train many trials of hyper-parameters as one run, and say which is best.

    Trial i is `adapt(model, strategy(trial_i))`, started from `trial_i["seed"]` and trained by `optimizer` with those of its
    values that are the optimizer's arguments: what comes out is what training it alone would give, up to rounding. Trials
    that can share a stack (of one method; ranks, alphas, seeds, rates and decays may differ) are one ensemble, and one pass
    trains them all; the others follow in ensembles of their own. Networks with dropout draw other numbers than alone.

    A trial whose loss is no longer finite is ended at the next mark, and so are, with `halving`, those that fall behind;
    from then on they cost nothing.

    Args:
        model: the model; it is not touched.
        trials: the values of a grid, `{"lr": [1e-3, 1e-2], "rank": [4, 8], "seed": range(3)}`: lists and ranges are combined,
            anything else is one value; or the trials themselves, as dicts. "seed" (0 if it is not given) is what the
            adapter starts from.
        strategy: a function of the trial that gives what `adapt` takes, or the strategy of all.
        data: batches `(inputs, target)`: an iterable, gone through again and again, or a function of the step. The inputs
            are a tensor, a tuple, or a dict of keyword arguments. What it draws from torch's generator is seeded by the step.
        loss: `loss(output, target)`, a scalar, as for one model.
        steps: how many steps each trial is trained.
        optimizer: an optimizer class; `functools.partial` gives it further arguments.
        schedule: `schedule(step, trial)`, the factor of the learning rate at a step, from 0.
        max_norm: each trial's gradient is scaled down to this norm; None to leave it as it is.
        own_order: every trial has batches of its own, drawn by its seed, instead of all the same. A sequence of batches is
            then shuffled; an iterable or a function has to draw from torch's generator (`DataLoader(shuffle=True)`).
        evaluate: `evaluate(ensemble)` gives each member's score, `(N,)`, or a dict of several, of which the first ranks. It is
            called in evaluation mode, without gradients. None to rank by the training loss.
        maximize: whether more of the score is better.
        every: a mark is set after so many steps: there scores are taken, and a checkpoint is written; None for a tenth.
        halving: a whole number η: of all trials the best 1/η go on after `steps/η^k`, ..., `steps/η` steps, down to the last
            that η leaves (successive halving); or a dict from steps to the fraction that goes on.
        at_once: how many trials may share a stack at most, where memory is short.
        chunk_size: as of `stack`.
        checkpoint: a file that the sweep goes on from if it is there, and that is written, whole or not at all, at every mark.
        progress: whether a progress bar is shown; it needs tqdm, without which plain lines are.

    Returns:
        The table, the curves and the models.

    Raises:
        AdaptError: if a trial has a value that nothing reads, a strategy does not fit, or an argument is out of its range.
        FileError: if the checkpoint is damaged or that of another sweep.

    Example:
        >>> import torch, gift_func as gf
        >>> model, x = torch.nn.Linear(4, 1), torch.randn(32, 4)
        >>> grid = {"lr": [1e-3, 1e-1], "rank": [1, 2], "seed": range(2)}
        >>> result = gf.sweep(model, grid, lambda trial: gf.LoRA(rank=trial["rank"]), data=[(x, x.sum(1, keepdim=True))],
        ...                   loss=torch.nn.functional.mse_loss, steps=30, progress=False)
        >>> len(result.trials), result.best_trial["lr"], type(result.best).__name__
        (8, 0.1, 'AdaptedModel')

    References:
        Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, 2016
        (arXiv:1502.07943), of whose rungs `halving` has the last, that trains the best to the end.
    """
    plan = SweepConfig(steps, every, loss, schedule, max_norm, own_order, evaluate, maximize, halving)
    watched = [Watched(trial) for trial in trials_of(trials)]
    settings = settings_of(watched, optimizer)
    base = base_of(model)
    strategies = [strategy(trial) if callable(strategy) else strategy for trial in watched]
    if schedule is not None:
        for trial in watched:
            schedule(0, trial)
    check_read(watched, settings[0])
    models = []
    for trial, rules in zip(watched, strategies, strict=True):
        models.append(adapt(base, rules, generator=torch.Generator().manual_seed(int(trial.get("seed", 0)))))
    given = [trial.values_given for trial in watched]
    groups = grouped(models, at_once)
    course = SweepRun(plan, given, models, groups, settings, optimizer, data, chunk_size)
    path = None if checkpoint is None else Path(checkpoint)
    description = describe(base, given, strategies, groups, plan, optimizer)
    if path is not None and path.exists():
        read(path, description, course)
    del models
    with Progress(course.left(), progress) as bar:
        course.run(bar, None if path is None else lambda: write(path, description, course))
    return SweepResult(
        given, course.status, course.steps, course.metric, maximize, course.curves(), course.states, strategies, base
    )
