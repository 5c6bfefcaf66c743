"""`sweep`: trains trials of many hyper-parameters as one run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapt import adapt, base_of
from ..ensembles.optimizer import MakeOptimizer
from ..network.frozen_base import FrozenBase
from .batches import Data
from .checkpoint import describe, load_checkpoint, save_checkpoint
from .progress import Progress
from .result import SweepResult
from .training import Evaluate, Loss, Schedule, SweepConfig, SweepRun
from .trials import RecordedTrial, Trial, check_all_read, grouped_trials, settings_of, trials_of


def sweep(
    model: nn.Module | FrozenBase,
    trials: Trial | Iterable[Trial],
    strategy: Any,
    *,
    data: Data,
    loss: Loss,
    steps: int,
    optimizer: MakeOptimizer = torch.optim.AdamW,
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
    """Train trials of many hyper-parameters as one run, and rank them.

    Trial i is `adapt(model, strategy(trial_i))`, initialised from `trial_i["seed"]` and trained by `optimizer` with those of
    its values that are the optimizer's arguments. The result is that of training it alone, up to rounding; dropout draws other
    numbers. Trials of one method (whose ranks, alphas, seeds, learning rates and weight decays may differ) are trained as one
    ensemble; those that cannot be stacked with them form further ensembles, which are trained after it.

    A trial whose loss is no longer finite ends when scores are next taken. With `halving`, the worst trials end early too.
    Trials that ended take no more time.

    Args:
        model: the model; it is not touched.
        trials: the values of a grid, `{"lr": [1e-3, 1e-2], "rank": [4, 8], "seed": range(3)}`: lists and ranges are combined,
            anything else is one value; or the trials themselves, as dicts. The adapter is initialised from "seed", by
            default 0.
        strategy: a function of the trial that returns what `adapt` takes, or one strategy for all trials.
        data: batches `(inputs, target)`: an iterable, which is iterated over repeatedly, or a function of the step. The inputs
            are a tensor, a tuple, or a dict of keyword arguments. torch's generator, from which it may draw, is seeded by the
            step.
        loss: `loss(output, target)`, a scalar, as for one model.
        steps: how many steps each trial is trained.
        optimizer: an optimizer class, or a `functools.partial` of one with further arguments.
        schedule: `schedule(step, trial)`, the factor of the learning rate at a step, counted from 0.
        max_norm: the norm to which each trial's gradient is clipped; None for no clipping.
        own_order: every trial has its own batches, drawn by its seed, instead of the same ones as the others. A sequence of
            batches is then shuffled; an iterable or a function has to draw from torch's generator (`DataLoader(shuffle=True)`).
        evaluate: `evaluate(ensemble)` returns each member's score, `(N,)`, or a dict of several, of which trials are ranked by
            the first. It is called in evaluation mode, without gradients. None to rank by the training loss.
        maximize: whether a higher score is better.
        every: after how many steps each time scores are taken and a checkpoint is written; None for a tenth of them.
        halving: a whole number η: of all trials the best 1/η go on after `steps/η^k`, ..., `steps/η` steps, down to the last
            that η leaves (successive halving); or a dict from steps to the fraction that goes on.
        at_once: how many trials may be one ensemble at most, to limit memory.
        chunk_size: as of `stack`.
        checkpoint: a file from which the sweep resumes if it exists, and which is written, atomically, whenever scores were
            taken.
        progress: whether to show a progress bar; without tqdm, plain lines are printed.

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
        (arXiv:1502.07943), of whose rungs `halving` has the last, which trains the best to the end.
    """
    config = SweepConfig(steps, every, loss, schedule, max_norm, own_order, evaluate, maximize, halving)
    recorded = [RecordedTrial(trial) for trial in trials_of(trials)]
    settings = settings_of(recorded, optimizer)
    base = base_of(model)
    strategies = [strategy(trial) if callable(strategy) else strategy for trial in recorded]
    if schedule is not None:
        for trial in recorded:
            schedule(0, trial)
    check_all_read(recorded, settings[0])
    models = []
    for trial, rules in zip(recorded, strategies, strict=True):
        models.append(adapt(base, rules, generator=torch.Generator().manual_seed(int(trial.get("seed", 0)))))
    given = [trial.given_values for trial in recorded]
    groups = grouped_trials(models, at_once)
    run = SweepRun(config, given, models, groups, settings, optimizer, data, chunk_size)
    path = None if checkpoint is None else Path(checkpoint)
    description = describe(base, given, strategies, groups, config, optimizer)
    if path is not None and path.exists():
        load_checkpoint(path, description, run)
    del models
    with Progress(run.steps_left(), progress) as bar:
        run.run(bar, lambda: save_checkpoint(path, description, run) if path is not None else None)
    return SweepResult(given, run.status, run.steps, run.metric, maximize, run.curves(), run.states, strategies, base)
