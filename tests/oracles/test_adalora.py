"""AdaLoRA: by hand in float64, and against PEFT's layers and its rank allocator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from helpers.oracles import (
    IDS,
    State,
    assert_formula,
    assert_near,
    assert_starts,
    layers,
    net,
    peft_of,
    shaken,
    stored,
    weight_of,
)
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

import gift_func as gf
from gift_func.methods.adalora import Importance, allocate, budget_at, importance, orthogonality_loss, triplet_scores

METHOD = gf.AdaLoRA(rank=3, alpha=2.0)


def by_hand(model: nn.Module, state: State) -> dict[str, Tensor]:
    found = {}
    for name in layers(model):
        q, p, values = (state[f"{name}.lora_{part}"] for part in "ABE")
        found[name] = weight_of(model, name) + 2 / 3 * p @ torch.diag(values[:, 0]) @ q
    return stored(model, found)


def adapted_net(dtype: torch.dtype) -> gf.AdaptedModel:
    return shaken(gf.adapt(net(dtype), {"*.weight": METHOD}))


def test_formula() -> None:
    assert_formula(adapted_net(torch.float64), net(torch.float64), lambda s: by_hand(net(torch.float64), s), IDS)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("names", [["lin", "conv2"], ["gpt"]])
def test_peft(names: list[str]) -> None:
    model = net(torch.float32)
    config = peft.AdaLoraConfig(init_r=3, lora_alpha=2, target_modules=names, total_step=10)
    theirs, tensors = peft_of(model, config)
    state = {name: t for name, t in tensors.items() if "ranknum" not in name}
    ours = gf.adapt(model, {f"{name}.weight": METHOD for name in names}).with_adapter(state)
    assert_near(ours(IDS), theirs(IDS), 1e-5)


def test_orthogonality_loss() -> None:
    state = {**adapted_net(torch.float64).adapter_state_dict(), "other.lora_A": torch.ones(2, 2)}
    total, norms = torch.zeros((), dtype=torch.float64), []
    for name in layers(net(torch.float64)):
        for gram in (
            state[f"{name}.lora_B"].T @ state[f"{name}.lora_B"],
            state[f"{name}.lora_A"] @ state[f"{name}.lora_A"].T,
        ):
            off = (gram - torch.eye(3)).square().sum()
            total = total + off
            norms.append(off.sqrt())
    assert_near(orthogonality_loss(state), total, 1e-10)
    assert_near(orthogonality_loss(state, squared=False), torch.stack(norms).mean(), 1e-10)
    q = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    assert orthogonality_loss({"lora_A": q.T, "lora_B": q, "lora_E": q[:3, :1]}) < 1e-20


class Named(nn.Module):
    """Parameters under the names that PEFT's allocator looks for."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.by_name = {f"{name}.default": nn.Parameter(tensor.clone()) for name, tensor in state.items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.by_name.items())


def test_allocation_is_pefts() -> None:
    state: dict[str, Tensor] = adapted_net(torch.float64).adapter_state_dict()
    theirs = Named(state)
    config = SimpleNamespace(beta1=0.85, beta2=0.7, target_r=1, tinit=2, tfinal=3, total_step=12, deltaT=1)
    allocator: Any = RankAllocator(theirs, config, "default")  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    scores: Importance | None = None
    for step in range(12):
        gradients = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in state.items()}
        for name, gradient in gradients.items():
            theirs.by_name[f"{name}.default"].grad = gradient
        if step < 9:
            scores = importance(state, gradients, scores, beta1=0.85, beta2=0.7)
        assert scores is not None
        budget = budget_at(step, 12, initial=18, target=6, warmup=2, final=3)
        assert allocator.update_and_allocate(theirs, step)[0] == budget
        if step > 2:
            state = allocate(state, scores, budget)
            assert sum(int((t != 0).sum()) for n, t in state.items() if n.endswith("lora_E")) <= budget
        for name, tensor in state.items():
            assert_near(tensor, theirs.by_name[f"{name}.default"].detach(), 1e-10, f"{name} at {step}")


def test_scores_by_hand() -> None:
    state = {"x.lora_A": torch.tensor([[1.0, 2.0]]), "x.lora_B": torch.tensor([[3.0]]), "x.lora_E": torch.tensor([[4.0]])}
    gradients = {name: torch.full_like(t, -1.0) for name, t in state.items()}
    scores = triplet_scores(importance(state, gradients, beta1=0.5, beta2=0.5))
    # I = |θ·g|, Ī = I/2, Ū = |I − Ī|/2 = I/4, s = I²/8: A gives (1 + 4)/16, B 9/8, λ 16/8.
    assert_near(scores["x.lora_E"], torch.tensor([[5 / 16 + 9 / 8 + 2.0]]), 1e-6)


def test_allocation_is_pure_and_keeps_exactly_the_budget() -> None:
    state = adapted_net(torch.float64).adapter_state_dict()
    before = {name: t.clone() for name, t in state.items()}
    nothing = Importance({n: torch.zeros_like(t) for n, t in state.items()}, {n: torch.zeros_like(t) for n, t in state.items()})
    for budget in (0, 5, 18, 99):  # all scores are equal: the number is still right
        made = allocate(state, nothing, budget)
        assert sum(int((t != 0).sum()) for n, t in made.items() if n.endswith("lora_E")) == min(budget, 18)
    assert all(torch.equal(t, before[name]) for name, t in state.items())
    assert torch.equal(gf.adapt(net(torch.float64), {"*.weight": METHOD}).with_adapter(allocate(state, nothing, 0))(IDS),
                       net(torch.float64)(IDS))  # fmt: skip


def test_starts_as_the_base() -> None:
    assert_starts(net(torch.float32), [METHOD], [gf.AdaLoRA(rank=2, init="random")])


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match="no AdaLoRA tensor"):
        orthogonality_loss({"a.lora_A": torch.ones(1, 1)})
