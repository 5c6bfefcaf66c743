"""A sweep: equal to training each trial alone, and to itself after an interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.census import unchanged
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gift_func as gf

STEPS = 20
GRID = {"lr": [3e-3, 3e-2], "rank": [1, 3], "weight_decay": 0.1, "seed": range(2)}
Strategy = Callable[[Any], gf.Method]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def points(seed: int = 5) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 4, generator=draws).double()
    return x, (x @ torch.randn(4, 3, generator=draws).double()).argmax(1)


DATA = [points(seed) for seed in range(3)]


def lora(trial: Any) -> gf.Method:
    return gf.LoRA(rank=trial["rank"], alpha=2)


def accuracy(ens: gf.Ensemble) -> Tensor:
    assert not ens.training
    x, y = points()
    right: Tensor = (ens(x).argmax(-1) == y).double().mean(-1)
    return right


sweep: Callable[..., gf.SweepResult] = partial(
    gf.sweep, data=DATA, loss=F.cross_entropy, steps=STEPS, every=5, progress=False
)  # fmt: skip


def alone(
    net: nn.Module, trial: dict[str, Any], strategy: Strategy = lora, kind: Any = torch.optim.AdamW, steps: int = STEPS
) -> tuple[gf.AdaptedModel, list[float]]:
    """One trial by the usual loop."""
    adapted = gf.adapt(net, strategy(trial), generator=torch.Generator().manual_seed(trial["seed"])).train()
    settings = {name: trial[name] for name in ("lr", "weight_decay", "momentum") if name in trial}
    optimizer = kind(adapted.trainable_parameters(), **settings)
    losses = []
    for step in range(steps):
        x, y = DATA[step % len(DATA)]
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return adapted.eval(), losses


def assert_same(found: gf.AdaptedModel, expected: gf.AdaptedModel, tolerance: float = 1e-9) -> None:
    states = found.adapter_state_dict(), expected.adapter_state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=0, atol=tolerance)
    torch.testing.assert_close(found(points()[0]), expected(points()[0]), rtol=0, atol=tolerance)


def test_equals_separate_runs() -> None:
    """Ranks and rates in one stack, BatchNorm's statistics included."""
    net = model()
    with unchanged(net):
        result = sweep(net, GRID, lora)
    assert len(result.trials) == 8
    assert result.status == ["finished"] * 8
    for index, trial in enumerate(result.trials):
        adapted, losses = alone(net, trial)
        assert_same(result.model(index), adapted)
        torch.testing.assert_close(
            result.curves["training"].values[index], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-9
        )
        torch.testing.assert_close(
            result.curves["loss"].values[index], torch.tensor(losses, dtype=torch.float64).view(4, 5).mean(1), rtol=0, atol=1e-9
        )
    scores = [result.score(index) for index in range(8)]
    assert result.best_index == scores.index(min(scores))
    assert_same(result.best, alone(net, result.best_trial)[0])


def test_methods_in_stacks_of_their_own() -> None:
    net = model()
    methods = [gf.LoRA(rank=2), gf.LoRA(rank=3), gf.IA3(), gf.LoRA(rank=2, dropout=0.5)]
    result = sweep(net, {"method": methods, "lr": [0.01, 0.1], "seed": 1}, lambda trial: trial["method"])
    for index, trial in enumerate(result.trials):
        if trial["method"] != methods[3]:
            assert_same(result.model(index), alone(net, trial, lambda trial: trial["method"])[0])
    assert [result.trials[i]["method"] for i in range(0, 8, 2)] == methods
    again = sweep(net, [{"lr": 0.1, "seed": 1}], methods[3]), sweep(net, [{"lr": 0.1, "seed": 1}], methods[3])
    assert_same(again[0].best, again[1].best, 0)  # dropout too is drawn from the step


def test_trials_with_other_keys_and_optimizers() -> None:
    net = model()
    trials = [{"lr": 0.1, "seed": 0, "rank": 2}, {"lr": 0.01, "momentum": 0.9, "seed": 3, "rank": 1}]
    result = sweep(net, trials, lora, optimizer=torch.optim.SGD, at_once=1)
    for index, trial in enumerate(trials):
        assert_same(result.model(index), alone(net, trial, kind=torch.optim.SGD)[0])
    with pytest.raises(gf.AdaptError, match="trial 0 lacks 'lr', which others have"):
        sweep(net, [{"rank": 1}, {"rank": 1, "lr": 0.1}], lora, optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr))


def test_schedule_and_clipping() -> None:
    net, trial = model(), {"lr": 0.1, "rank": 2, "warm": 4, "seed": 0}
    others = [{**trial, "warm": warm} for warm in (1, 4, 9)]
    result = sweep(net, others, lora, schedule=lambda step, t: min(1.0, (step + 1) / t["warm"]), max_norm=0.2)
    adapted = gf.adapt(net, lora(trial), generator=torch.Generator().manual_seed(0)).train()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    for step in range(STEPS):
        x, y = DATA[step % 3]
        optimizer.zero_grad()
        F.cross_entropy(adapted(x), y).backward()
        nn.utils.clip_grad_norm_(adapted.trainable_parameters(), 0.2)
        optimizer.step()
        schedule.step()
    assert_same(result.model(1), adapted.eval())


def test_halving() -> None:
    """Of 8 trials 4 stop after 2 of 20 steps, 2 after 5, 1 after 10: as they are when trained so far alone."""
    net = model()
    result = sweep(net, GRID, lora, halving=2, evaluate=accuracy, maximize=True)
    assert sorted(result.steps) == [2, 2, 2, 2, 5, 5, 10, 20]
    for index, trial in enumerate(result.trials):
        assert_same(result.model(index), alone(net, trial, steps=result.steps[index])[0])
    values, steps = result.curves["score"].values, result.curves["score"].steps.tolist()
    for rung, left in ((2, 4), (5, 2), (10, 1)):
        column = values[:, steps.index(rung)]
        stays = [column[i] for i in range(8) if result.steps[i] > rung]
        goes = [column[i] for i in range(8) if result.steps[i] == rung]
        assert len(stays) == left
        assert min(stays) >= max(goes)
    assert [row["steps"] for row in result.table()] == sorted(result.steps, reverse=True)
    by_hand = sweep(net, GRID, lora, halving={5: 0.5, 11: 0.3}, at_once=3)
    assert sorted(by_hand.steps) == [5, 5, 5, 5, 11, 11, 20, 20]
    assert [status == "finished" for status in by_hand.status] == [steps == 20 for steps in by_hand.steps]


def test_divergence_ends_a_trial_alone() -> None:
    net = model()
    trials = [{"lr": lr, "rank": 2, "seed": 0} for lr in (0.1, 1e200, 0.05)]
    result = sweep(net, trials, lora, optimizer=torch.optim.SGD)
    assert result.status == ["finished", "diverged", "finished"]
    assert result.steps == [20, 5, 20]
    for index in (0, 2):
        assert_same(result.model(index), alone(net, trials[index], kind=torch.optim.SGD)[0])
    assert result.table()[-1]["status"] == "diverged"
    ill = sweep(net, [trials[1]], lora, optimizer=torch.optim.SGD)
    with pytest.raises(gf.AdaptError, match="no trial was finished: diverged"):
        _ = ill.best


def shuffling() -> Any:
    return DataLoader(TensorDataset(*points()), batch_size=8, shuffle=True, drop_last=True)


@pytest.mark.parametrize("own_order", [False, True])
def test_order_of_the_data(own_order: bool) -> None:
    """It is that of the trial alone, whatever else is swept; and it differs by seed only where it was asked for."""
    seen: list[Tensor] = []

    def noted(step: int) -> tuple[Tensor, Tensor]:
        x, y = points()
        picked = torch.randperm(len(x))[:8]
        seen.append(picked)
        return x[picked], y[picked]

    net, trials = model(), [{"lr": 0.01, "rank": 2, "seed": seed} for seed in (0, 1)]
    for data in (shuffling(), noted, [(x[:8], y[:8]) for x, y in DATA]):
        both = sweep(net, trials, lora, data=data, own_order=own_order)
        split = sweep(net, trials, lora, data=data, own_order=own_order, at_once=1)
        single = sweep(net, trials[1:], lora, data=data, own_order=own_order)
        assert_same(both.model(1), single.model(0))
        assert_same(both.model(1), split.model(1))
    same_start = [{"lr": 0.01, "rank": 2, "seed": 0}, {"lr": 0.01, "rank": 2, "seed": 0}]
    first, second = (sweep(net, same_start, lora, data=shuffling(), own_order=own_order).model(i) for i in (0, 1))
    assert_same(first, second, 1e-12)
    # The function drew at each step, and for each trial where they have an order of their own.
    drawn = seen[: STEPS * 2] if own_order else seen[:STEPS]
    assert len({tuple(picked.tolist()) for picked in drawn}) == len(drawn)


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop", [4, 6, 12, 19, 30])
def test_interrupted_and_resumed(tmp_path: Path, stop: int) -> None:
    """Stopped anywhere, it goes on to the same bits: in either of two ensembles, before and after trials have left."""
    net, calls = model(), 0

    def counting(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise StopError("stopped here")
        return F.cross_entropy(output, target)

    methods = [gf.LoRA(rank=2, dropout=0.3), gf.LoRA(rank=4, dropout=0.3, init="gaussian"), gf.IA3()]
    grid = {"method": methods, "lr": [0.01, 0.1], "seed": range(2)}
    options: Any = {"halving": {6: 0.7, 12: 0.5}, "data": shuffling(), "evaluate": accuracy, "maximize": True}
    whole = sweep(net, grid, lambda trial: trial["method"], **options)
    path = tmp_path / "sweep.safetensors"
    with pytest.raises(StopError, match="stopped here"):
        sweep(net, grid, lambda trial: trial["method"], **{**options, "loss": counting}, checkpoint=path)
    assert path.exists() == (stop > 5)
    resumed = sweep(net, grid, lambda trial: trial["method"], **options, checkpoint=path)
    finished = sweep(net, grid, lambda trial: trial["method"], **options, checkpoint=path)  # nothing is left to do
    for result in (resumed, finished):
        assert str(result) == str(whole)
        assert result.steps == whole.steps
        for name, curve in whole.curves.items():
            torch.testing.assert_close(result.curves[name].values, curve.values, rtol=0, atol=0, equal_nan=True)
        for index in range(len(whole.trials)):
            assert_same(result.model(index), whole.model(index), 0)


def doubled(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.mul_(2)


def test_foreign_and_damaged_checkpoints(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "sweep.safetensors"
    sweep(net, GRID, lora, checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(gf.FileError, match="checkpoint of another sweep: its trials differ"):
        sweep(net, {**GRID, "lr": [1e-3, 1e-2]}, lora, checkpoint=path)
    with pytest.raises(gf.FileError, match="checkpoint of another sweep: its base differ"):
        sweep(model().requires_grad_(False).apply(doubled), GRID, lora, checkpoint=path)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(gf.FileError, match="not the checkpoint of a sweep"):
        sweep(net, GRID, lora, checkpoint=path)
    save_file(tensors, path, {"gift_func.sweep": json.dumps({"version": 99})})
    with pytest.raises(gf.FileError, match="format version 99, this release reads version 1"):
        sweep(net, GRID, lora, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(gf.FileError, match="is damaged or is no safetensors file"):
        sweep(net, GRID, lora, checkpoint=path)


def test_losses_and_outputs_of_other_kinds() -> None:
    """A loss without a batching rule, a network with keywords, several scores."""
    net, trials = model(), [{"lr": lr, "rank": 2, "seed": 0} for lr in (0.1, 0.01)]

    def branching(output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        return loss * 2 / 2 if loss.item() > 0 else loss

    data = [({"input": x}, y) for x, y in DATA]
    found = sweep(net, trials, lora, loss=branching, data=data, evaluate=lambda ens: {"a": accuracy(ens), "b": [1.0, 2.0]})
    plain = sweep(net, trials, lora)
    for index in range(2):
        assert_same(found.model(index), plain.model(index))
    assert (found.metric, found.score(1, "b")) == ("a", 2.0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        sweep(net, trials, lora, loss=lambda output, target: output.sum() * (1 / 0))


def test_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = sweep(model(), GRID, lora, evaluate=accuracy, maximize=True)
    lines = str(result).splitlines()
    assert lines[0].split() == ["trial", "lr", "rank", "weight_decay", "seed", "score", "loss", "steps", "status"]
    assert len(lines) == 10
    assert int(lines[2].split()[0]) == result.best_index
    assert result.table()[0]["score"] == max(result.score(index) for index in range(8))
    result.plot(tmp_path / "sweep.png", by="rank")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(gf.AdaptError, match="no trial has a value 'alpha' to colour by; there are lr, rank"):
        result.plot(tmp_path / "sweep.png", by="alpha")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot needs matplotlib, which gift_func does not install"):
        result.plot(tmp_path / "sweep.png")


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(model(), GRID, lora, progress=True)
    assert "20/20" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sweep(model(), GRID, lora, progress=True)
    said = capsys.readouterr().err
    assert "a progress bar needs tqdm: pip install tqdm" in said
    assert "step 20 of 20" in said


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"trials": {**GRID, "learning_rate": [0.1]}}, "nothing reads 'learning_rate' of trial 0"),
    ({"trials": {**GRID, "lr": []}}, "at least one trial"),
    ({"trials": [{"lr": 0.1}]}, "the trial has no 'rank'"),
    ({"steps": 0}, "steps is a whole number of at least 1, got steps=0"),
    ({"every": 0.5}, "every is a whole number of at least 1, got every=0.5"),
    ({"halving": 1}, "halving is a whole number of at least 2"),
    ({"halving": {30: 0.5}}, r"halving keeps a fraction between 0 and 1 at a step before 20, got \(30, 0.5\)"),
    ({"data": DATA[0]}, "a batch is a pair"),
    ({"data": []}, "the data has no batch"),
    ({"data": iter(DATA)}, "gone through several times, which an iterator cannot be"),
    ({"data": 3}, "data is an iterable of batches or a function of the step, got a int"),
    ({"loss": lambda output, target: output}, r"loss\(output, target\) gives one number for a model, got shape \(24, 3\)"),
    ({"evaluate": lambda ens: torch.zeros(3)}, r"one number for each of the 8 members, got shape \(3,\)"),
    ({"evaluate": lambda ens: {"training": torch.zeros(8)}}, "cannot be called 'training'"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED, ids=[words[:24] for _, words in REFUSED])
def test_refusals(changed: dict[str, Any], words: str) -> None:
    net = model()
    with unchanged(net), pytest.raises((gf.AdaptError, TypeError, KeyError), match=words):
        sweep(net, **{"trials": GRID, "strategy": lora, **changed})


def test_own_batches_of_one_shape() -> None:
    def ragged(step: int) -> tuple[Tensor, Tensor]:
        x, y = points()
        size = int(torch.randint(1, 20, ()))
        return x[:size], y[:size]

    with pytest.raises(gf.AdaptError, match="the members' batches of a step are stacked, so they need one structure and shape"):
        sweep(model(), GRID, lora, data=ragged, own_order=True)
