"""HiRA: by hand in float64, and against PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from helpers.oracles import (
    IDS,
    State,
    assert_drops_inputs,
    assert_formula,
    assert_near,
    assert_starts,
    attention,
    layers,
    net,
    peft_of,
    shaken,
    stored,
    weight_of,
)
from torch import Tensor, nn

import gift_func as gf

METHOD = gf.HiRA(rank=2)


def by_hand(model: nn.Module, state: State) -> dict[str, Tensor]:
    found = {}
    for name in layers(model):
        change = state[f"{name}.hira_B"].flatten(1) @ state[f"{name}.hira_A"].flatten(1)
        found[name] = weight_of(model, name) * (1 + change)
    return stored(model, found)


def test_formula() -> None:
    model = net(torch.float64)
    assert_formula(shaken(gf.adapt(model, {"*.weight": METHOD})), model, lambda state: by_hand(model, state), IDS)


def test_formula_in_attention_and_groups() -> None:
    model, inputs = attention()
    adapted = shaken(gf.adapt(model, {"in_proj_weight": METHOD}))
    change = adapted.adapter["in_proj_weight.hira_B"].detach() @ adapted.adapter["in_proj_weight.hira_A"].detach()
    dense = {"in_proj_weight": model.in_proj_weight.detach() * (1 + change)}
    assert_near(adapted(*inputs)[0], torch.func.functional_call(model, dense, inputs)[0], 1e-10)

    conv = nn.Conv2d(4, 6, 3, groups=2).double()

    def formula(state: State) -> dict[str, Tensor]:
        return {
            "weight": conv.weight.detach() * (1 + torch.einsum("or,rikl->oikl", state["hira_B"][..., 0, 0], state["hira_A"]))
        }

    assert_formula(shaken(gf.adapt(conv, gf.HiRA(rank=2))), conv, formula, torch.randn(2, 4, 5, 5, dtype=torch.float64))


def test_peft() -> None:
    model = net(torch.float32)
    theirs, tensors = peft_of(model, peft.HiraConfig(r=2, target_modules=layers(model)))
    assert_near(gf.adapt(model, {"*.weight": METHOD}).with_adapter(tensors)(IDS), theirs(IDS), 1e-5)


@pytest.mark.parametrize("model", [nn.Linear(6, 4), nn.Conv1d(6, 4, 2)], ids=str)
def test_dropout_acts_on_what_meets_the_change(model: nn.Module) -> None:
    assert_drops_inputs(gf.HiRA(rank=2, dropout=0.5), model.double(), torch.randn(3, 6, 6, dtype=torch.float64))


def test_starts_as_the_base() -> None:
    inits = [METHOD, gf.HiRA(rank=2, init="gaussian")]
    assert_starts(net(torch.float32), inits, [gf.HiRA(rank=2, init="random")])


def test_refusals() -> None:
    adapted = gf.adapt(nn.Bilinear(2, 3, 4), {"weight": gf.HiRA(rank=1, dropout=0.5)}).train()
    with pytest.raises(gf.AdaptError, match="reads the weight of shape"):
        adapted(torch.ones(1, 2), torch.ones(1, 3))
