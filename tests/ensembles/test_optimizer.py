"""One optimizer for an ensemble: equal to one for each member, whatever the class, and resumable in fewer members."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import gift_func as gf

RATES = [0.003, 0.03, 0.01, 0.02]
DECAYS = [0.1, 0.0, 0.01, 0.3]


class Net(nn.Module):
    """With a layer whose output is not always used, so that gradients may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor, both: bool = False) -> Any:
        hidden = torch.tanh(self.up(x))
        return self.down(hidden) + self.unused(hidden) if both else self.down(hidden)


class Lion(Optimizer):
    """Chen et al., 2023 (arXiv:2302.06675): a user's own, by torch's public API."""

    def __init__(self, params: Any, lr: float = 1e-4, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.sub_(group["lr"] * (group["beta"] * m + (1 - group["beta"]) * p.grad).sign())
                    m.lerp_(p.grad, 0.01)


class WholeNorm(Optimizer):
    """Its step depends on all of a model's gradients and on what it kept of earlier ones: neither element- nor tensor-wise."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "seen": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen = self.param_groups[0]["seen"] + sum(float(p.grad.square().mean()) for p in found)
        for group in self.param_groups:
            group["seen"] = seen
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / (1e-8 + seen**0.5))


def members(method: type[gf.LoRA] = gf.LoRA) -> list[gf.AdaptedModel]:
    """Of several ranks and scales, one without one of the places."""
    torch.manual_seed(0)
    base = gf.FrozenBase.of(Net().double())
    draws = torch.Generator().manual_seed(1)
    made = [gf.adapt(base, method(rank=rank, alpha=2, init="random"), generator=draws) for rank in (2, 4, 3)]
    return [*made, gf.adapt(base, {"down": method(rank=2)}, generator=draws)]


def batch(step: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(step)
    return torch.randn(6, 5, generator=draws).double(), torch.randint(0, 3, (6,), generator=draws)


def losses_of(ens: gf.Ensemble, step: int) -> Tensor:
    x, y = batch(step)
    outputs = ens(x, both=step % 3 == 2)
    return torch.stack([F.cross_entropy(output, y) for output in outputs])


Each = dict[str, Sequence[Any]]


def separately(
    models: list[gf.AdaptedModel], kind: Any, each: Each, steps: range, clip: float | None = None
) -> list[Optimizer]:
    optimizers = []
    for index, model in enumerate(models):
        optimizer = kind(list(model.trainable_parameters()), **{name: values[index] for name, values in each.items()})
        optimizers.append(optimizer)
        for step in steps:
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x, both=step % 3 == 2), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.trainable_parameters(), clip)
            optimizer.step()
    return optimizers


def together(ens: gf.Ensemble, optimizer: Optimizer, steps: range, clip: float | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        losses_of(ens, step).sum().backward()
        if clip is not None:
            gf.optim.clip_grad_norm_per_member(ens, clip)
        optimizer.step()


def assert_equal(ens: gf.Ensemble, models: Sequence[gf.AdaptedModel], tolerance: float = 1e-9) -> None:
    for index, model in enumerate(models):
        found = ens[index].adapter_state_dict()
        assert found.keys() == model.adapter_state_dict().keys()
        for name, tensor in model.adapter_state_dict().items():
            off = (found[name] - tensor).abs().max().item()
            assert off <= tolerance, f"member {index}, {name}: off by {off}"


KINDS: dict[str, tuple[Any, Each]] = {
    "sgd": (SGD, {"lr": RATES, "weight_decay": DECAYS}),
    "momentum": (SGD, {"lr": RATES, "momentum": [0.9, 0.0, 0.5, 0.7], "weight_decay": DECAYS}),
    "nesterov": (partial(SGD, nesterov=True), {"lr": RATES, "momentum": [0.9, 0.3, 0.5, 0.7]}),
    "adam": (Adam, {"lr": RATES, "betas": [(0.9, 0.999), (0.8, 0.9), (0.5, 0.99), (0.9, 0.9)], "weight_decay": DECAYS}),
    "adamw": (AdamW, {"lr": RATES, "weight_decay": DECAYS}),
    "amsgrad": (AdamW, {"lr": RATES, "amsgrad": [True, False, True, False]}),
    "fused": (partial(AdamW, fused=True), {"lr": RATES, "weight_decay": DECAYS}),
    "rmsprop": (torch.optim.RMSprop, {"lr": RATES, "alpha": [0.9, 0.99, 0.5, 0.8], "momentum": DECAYS}),
    "adagrad": (torch.optim.Adagrad, {"lr": RATES, "lr_decay": DECAYS}),
    "adadelta": (torch.optim.Adadelta, {"lr": [1.0, 0.5, 2.0, 0.1], "rho": [0.9, 0.8, 0.95, 0.5]}),
    "nadam": (torch.optim.NAdam, {"lr": RATES, "weight_decay": DECAYS}),
    "radam": (torch.optim.RAdam, {"lr": RATES, "weight_decay": DECAYS}),
    "adamax": (torch.optim.Adamax, {"lr": RATES}),
    "rprop": (torch.optim.Rprop, {"lr": RATES}),
    "asgd": (torch.optim.ASGD, {"lr": RATES, "t0": [5, 1e6, 20, 10]}),
    "muon": (Muon, {"lr": RATES}),
    "adafactor": (Adafactor, {"lr": RATES, "weight_decay": DECAYS}),
    "lion": (Lion, {"lr": RATES}),
    "whole": (WholeNorm, {"lr": RATES}),
}


@pytest.mark.parametrize("name", KINDS)
def test_equals_separate_runs(name: str) -> None:
    kind, each = KINDS[name]
    models = members()
    ens = gf.stack(models)
    optimizer = gf.optim.per_member(kind, ens, **{name: list(values) for name, values in each.items()})
    together(ens, optimizer, range(50), clip=0.5)
    separately(models, kind, each, range(50), clip=0.5)
    # Muon computes in bfloat16, where the order of a product's terms shows.
    assert_equal(ens, models, 1e-9 if name != "muon" else 1e-3)
    assert not torch.equal(ens[1].adapter["up.lora_A"], members()[1].adapter["up.lora_A"])


@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad", "asgd"])
def test_a_gradient_that_goes_missing(name: str) -> None:
    """After a first step in which all parameters had one: what has none is left as it is, and keeps its state."""
    kind, each = KINDS[name]
    models = members()
    ens = gf.stack(models)
    together(ens, gf.optim.per_member(kind, ens, **each), range(2, 20))
    separately(models, kind, each, range(2, 20))
    assert_equal(ens, models)


def test_what_fills_a_smaller_rank_stays_zero() -> None:
    for kind in (partial(AdamW, weight_decay=0.1), Lion):
        ens = gf.stack(members())
        together(ens, gf.optim.per_member(kind, ens, lr=0.01), range(5))
        assert not ens.adapter["up.lora_A"][0, 2:].any()
        assert not ens.adapter["up.lora_B"][2, :, 3:].any()


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search: str | None) -> None:
    models = members()
    ens, (x, y) = gf.stack(models), batch(0)
    kind = partial(LBFGS, max_iter=6, line_search_fn=search)
    optimizer = gf.optim.per_member(kind, ens, lr=[0.1, 0.5, 1.0, 0.2])

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = torch.stack([F.cross_entropy(output, y) for output in ens(x)])
        losses.sum().backward()
        return losses

    for _ in range(3):
        first = optimizer.step(closure)
    assert first.shape == (4,)
    for model, lr in zip(models, [0.1, 0.5, 1.0, 0.2], strict=True):
        alone = kind(list(model.trainable_parameters()), lr=lr)

        def one(model: gf.AdaptedModel = model, alone: Optimizer = alone) -> Tensor:
            alone.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            alone.step(one)
    assert_equal(ens, models)
    with pytest.raises(gf.AdaptError, match=r"LBFGS needs each member's own loss: let the closure return the 4 losses"):
        optimizer.step(lambda: closure().sum())
    with pytest.raises(TypeError, match=r"LBFGS needs step\(closure\), which returns the members' losses"):
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lion", "whole"])
def test_members_that_finish_early(name: str) -> None:
    kind, each = KINDS[name]
    models = members()
    ens = gf.stack(models)
    optimizer = gf.optim.per_member(kind, ens, **each)
    together(ens, optimizer, range(10))
    before = {key: tensor.detach().clone() for key, tensor in ens.adapter.items()}
    few, fewer = optimizer.select([3, 0])
    together(few, fewer, range(10, 20))
    separately(models, kind, each, range(20))
    assert_equal(few, [models[3], models[0]])
    assert all(torch.equal(tensor, before[key]) for key, tensor in ens.adapter.items())
    with pytest.raises(IndexError, match="no member 4"):
        optimizer.select([4])


@pytest.mark.parametrize("name", ["adamw", "momentum", "lion", "whole", "fused"])
def test_resumes(name: str) -> None:
    """Also where the layout has changed: only the third batch gives all parameters a gradient."""
    kind, each = KINDS[name]
    ens = gf.stack(members())
    optimizer = gf.optim.per_member(kind, ens, **each)
    together(ens, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = deepcopy(ens)
    resumed = gf.optim.per_member(kind, again, lr=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    together(ens, optimizer, range(5, 12))
    together(again, resumed, range(5, 12))
    assert all(torch.equal(tensor, ens.adapter[key]) for key, tensor in again.adapter.items())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        gf.optim.per_member(kind, ens[:2], lr=1.0).load_state_dict(optimizer.state_dict())
    with pytest.raises(gf.StateError, match="not the state of a per_member optimizer of such an ensemble"):
        resumed.load_state_dict(AdamW(ens.parameters()).state_dict())
    other = Lion if name != "lion" else AdamW
    if name != "whole":
        with pytest.raises(gf.StateError, match=r"its parameters differ|of another class"):
            gf.optim.per_member(other, ens[:1], lr=1.0).load_state_dict({**optimizer.state_dict(), "blocks": [["up.lora_A"]]})
    with pytest.raises(TypeError, match="is not copied or pickled"):
        deepcopy(optimizer)


def decayed(speed: int, step: int) -> float:
    return 1 / (1 + speed * step)


def test_schedules_by_member() -> None:
    models = members()
    ens = gf.stack(models)
    schedules: list[Callable[[int], float]] = [partial(decayed, k) for k in range(4)]
    optimizer = gf.optim.per_member(AdamW, ens, lr=RATES)
    scheduler = LambdaLR(optimizer, schedules)
    for step in range(12):
        together(ens, optimizer, range(step, step + 1))
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [r * s(12) for r, s in zip(RATES, schedules, strict=True)]
    for model, rate, schedule in zip(models, RATES, schedules, strict=True):
        alone = AdamW(list(model.trainable_parameters()), lr=rate)
        by = LambdaLR(alone, schedule)
        for step in range(12):
            x, y = batch(step)
            alone.zero_grad()
            F.cross_entropy(model(x, both=step % 3 == 2), y).backward()
            alone.step()
            by.step()
    assert_equal(ens, models)
    # A schedule goes on in an ensemble of fewer.
    _, fewer = optimizer.select([2])
    assert LambdaLR(fewer, schedules[2], last_epoch=11).get_last_lr() == [RATES[2] * schedules[2](12)]
    one_cycle = OneCycleLR(gf.optim.per_member(AdamW, ens, lr=0.1), max_lr=RATES, total_steps=5, pct_start=0.5)
    assert max(one_cycle.get_last_lr()) < max(RATES)


def test_gradients_accumulate_and_reset() -> None:
    """The layout shares memory with the ensemble's gradients: neither may show."""
    models = members()
    ens = gf.stack(models)
    optimizer = gf.optim.per_member(SGD, ens, lr=RATES)
    for step in (2, 5, 8, 11):
        for half in (step, step + 12):
            losses_of(ens, half).sum().backward()
        expected = {name: p.grad.clone() for name, p in ens.named_trainable_parameters() if p.grad is not None}
        assert optimizer.param_groups[0]["params"][0].grad is not None
        optimizer.step()
        for name, p in ens.named_trainable_parameters():
            assert p.grad is not None
            assert torch.equal(p.grad, expected[name])
        optimizer.zero_grad(set_to_none=step == 5)
        assert all(p.grad is None if step == 5 else not p.grad.any() for p in ens.parameters())  # type: ignore[union-attr]
    alone = [SGD(list(model.trainable_parameters()), lr=lr) for model, lr in zip(models, RATES, strict=True)]
    for step in (2, 5, 8, 11):
        for model, optimizer_of in zip(models, alone, strict=True):
            optimizer_of.zero_grad()
            for half in (step, step + 12):
                x, y = batch(half)
                F.cross_entropy(model(x, both=True), y).backward()
            optimizer_of.step()
    assert_equal(ens, models)


@pytest.mark.parametrize("kind", [SGD, Lion])
def test_grad_scaler(kind: Any) -> None:
    plain, scaled = gf.stack(members()), gf.stack(members())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    one, other = gf.optim.per_member(kind, plain, lr=RATES), gf.optim.per_member(kind, scaled, lr=RATES)
    for step in range(6):
        together(plain, one, range(step, step + 1), clip=0.1)
        other.zero_grad()
        scaler.scale(losses_of(scaled, step).sum()).backward()
        scaler.unscale_(other)
        norms = gf.optim.clip_grad_norm_per_member(scaled, 0.1)
        assert norms.max() < 10
        scaler.step(other)
        scaler.update()
    for name, tensor in plain.adapter.items():
        torch.testing.assert_close(scaled.adapter[name], tensor, rtol=0, atol=1e-12)


def test_a_closure_is_called_once() -> None:
    ens, calls = gf.stack(members()), []
    optimizer = gf.optim.per_member(AdamW, ens, lr=RATES)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = losses_of(ens, 0).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == [True]


def test_follows_a_move_to_another_type() -> None:
    for kind in (SGD, Lion):
        ens = gf.stack(members())
        optimizer = gf.optim.per_member(kind, ens, lr=0.5)
        together(ens, optimizer, range(1))
        for parameter in ens.parameters():  # as `to()` does: new memory behind the same parameter
            parameter.data = parameter.data.clone()
        before = ens.adapter["down.lora_A"].detach().clone()
        together(ens, optimizer, range(1, 2))
        assert not torch.equal(ens.adapter["down.lora_A"], before)


def test_nan_stays_with_its_member() -> None:
    clean, ill = gf.stack(members()), gf.stack(members())
    with torch.no_grad():
        ill.adapter["down.lora_A"][1, 0, 0] = torch.nan
    for ens in (clean, ill):
        together(ens, gf.optim.per_member(AdamW, ens, lr=RATES), range(3), clip=0.1)
    assert ill.adapter["down.lora_A"][1, :, 0].isnan().any()
    assert_equal(ill[[0, 2, 3]], [clean[index] for index in (0, 2, 3)], 0)


def test_clipping() -> None:
    models, limits = members(), [0.1, 1.0, 100.0, 1e-3]
    ens = gf.stack(models)
    for norm_type in (1.0, 2.0, float("inf")):
        ens.zero_grad()
        losses_of(ens, 2).sum().backward()
        found = gf.optim.clip_grad_norm_per_member(ens, limits, norm_type)
        for index, model in enumerate(models):
            model.zero_grad()
            x, y = batch(2)
            F.cross_entropy(model(x, both=True), y).backward()
            expected = nn.utils.clip_grad_norm_(model.trainable_parameters(), limits[index], norm_type)
            torch.testing.assert_close(found[index], expected, rtol=1e-12, atol=0)
            for name, p in model.named_trainable_parameters():
                grad = ens.adapter[name].grad[index]
                torch.testing.assert_close(grad[tuple(map(slice, p.shape))], p.grad, rtol=0, atol=1e-12)
    with pytest.raises(gf.AdaptError, match=r"max_norm is one number or one for each of the 4 members, got shape \(3,\)"):
        gf.optim.clip_grad_norm_per_member(ens, limits[:3])
    before = ens.adapter["down.lora_A"].grad.clone()
    ens.adapter["down.lora_A"].grad[2, 0, 0] = torch.inf
    with pytest.raises(gf.AdaptError, match=r"the gradient's norm is not finite in members \[2\]"):
        gf.optim.clip_grad_norm_per_member(ens, 1e-9, error_if_nonfinite=True)
    assert torch.equal(ens.adapter["down.lora_A"].grad[:2], before[:2])


def test_refusals() -> None:
    ens = gf.stack(members())
    with pytest.raises(gf.AdaptError, match="lr has 3 values for an ensemble of 4 members: give one for each"):
        gf.optim.per_member(AdamW, ens, lr=RATES[:3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        gf.optim.per_member(AdamW, ens, learning_rate=RATES)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        gf.optim.per_member(AdamW, ens, lr=[1.0, -1.0, 1.0, 1.0])
    with pytest.raises(gf.AdaptError, match="differentiable=True is not for stacked members"):
        gf.optim.per_member(AdamW, ens, lr=0.1, differentiable=True)
    with pytest.raises(gf.AdaptError, match="makes several for a member"):
        gf.optim.per_member(lambda params: SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1), ens)
    with pytest.raises(gf.AdaptError, match="the groups are the ensemble's members"):
        gf.optim.per_member(AdamW, ens, lr=0.1).add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(gf.AdaptError, match="no parameter of the ensemble requires grad"):
        gf.optim.per_member(AdamW, deepcopy(ens).requires_grad_(False), lr=0.1)


def test_values_in_tensors_and_ranges() -> None:
    ens = gf.stack(members())
    optimizer = gf.optim.per_member(
        AdamW, ens, lr=torch.tensor(RATES, dtype=torch.float64), weight_decay=range(4), betas=(0.8, 0.9)
    )
    found = [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
    assert found == [(lr, decay, (0.8, 0.9)) for decay, lr in enumerate(RATES)]
    shared = gf.optim.per_member(AdamW, ens, lr=torch.tensor(0.1))
    rates = [group["lr"] for group in shared.param_groups]
    assert all(isinstance(rate, Tensor) for rate in rates)
    assert len({id(rate) for rate in rates}) == 4  # a schedule writes into them


def test_a_functional_optimizer() -> None:
    """AdamW as a pure function of dicts, vmapped over the members with a rate for each."""
    models, decay = members(), 0.1
    ens = gf.stack(models)

    def update(p: Any, g: Any, m: Any, v: Any, lr: Tensor, t: Tensor) -> Any:
        m = {k: 0.9 * m[k] + 0.1 * g[k] for k in p}
        v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in p}
        by = {k: (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.999**t)).sqrt() + 1e-8) for k in p}
        return {k: p[k] * (1 - lr * decay) - lr * by[k] for k in p}, m, v

    def total(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = gf.functional_call(ens, params, (x,), {"both": True})
        return torch.vmap(F.cross_entropy, (0, None))(outputs, y).sum()

    params = {name: p.detach() for name, p in ens.named_trainable_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for step in range(2, 152, 3):
        gradients = torch.func.grad(total)(params, *batch(step))
        t = torch.tensor(step // 3 + 1.0).double()
        params, m, v = torch.vmap(update, (0, 0, 0, 0, 0, None))(
            params, gradients, m, v, torch.tensor(RATES, dtype=torch.float64), t
        )
    separately(models, partial(AdamW, weight_decay=decay), {"lr": RATES}, range(2, 152, 3))
    ens.adapter.load_state_dict({f"{k}": t for k, t in params.items()}, strict=True)
    assert_equal(ens, models)
