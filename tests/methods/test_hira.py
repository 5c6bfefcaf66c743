"""HiRA: by hand in float64, and against PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from common import State, assert_formula, assert_near, peft_of, shaken
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gift_func as gf


class Net(nn.Module):
    """A layer of every kind that PEFT's HiRA takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lin = nn.Linear(4, 6)
        self.gpt = Conv1D(5, 6)  # type: ignore[no-untyped-call]
        self.conv1 = nn.Conv1d(5, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3)
        self.conv3 = nn.Conv3d(1, 2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.gpt(torch.tanh(self.lin(self.embed(ids)))))
        x = torch.tanh(self.conv1(x.mT)).unsqueeze(1)
        x = torch.tanh(self.conv2(x)).unsqueeze(1)
        return self.conv3(x).flatten(1)  # type: ignore[no-any-return]


IDS = (torch.arange(10).reshape(2, 5) * 7) % 11
NAMES = ("embed", "lin", "gpt", "conv1", "conv2", "conv3")
SITES = {f"{name}.weight": gf.HiRA(rank=2) for name in NAMES}


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def by_hand(model: Net, state: State) -> dict[str, Tensor]:
    found = {}
    for name in NAMES:
        w = model.get_parameter(f"{name}.weight").detach()
        change = state[f"{name}.hira_B"].flatten(1) @ state[f"{name}.hira_A"].flatten(1)
        found[f"{name}.weight"] = w * (1 + (change.T if name == "gpt" else change.reshape(w.shape)))
    return found


def test_formula() -> None:
    model = net(torch.float64)
    assert_formula(shaken(gf.adapt(model, SITES)), model, lambda state: by_hand(model, state), IDS)


def test_formula_in_attention_and_groups() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2).double()
    query, key, value = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (3, 5, 5))
    adapted = shaken(gf.adapt(model, {"in_proj_weight": gf.HiRA(rank=2)}))
    change = adapted.adapter["in_proj_weight.hira_B"].detach() @ adapted.adapter["in_proj_weight.hira_A"].detach()
    dense = {"in_proj_weight": model.in_proj_weight.detach() * (1 + change)}
    wanted = torch.func.functional_call(model, dense, (query, key, value))[0]
    assert_near(adapted(query, key, value)[0], wanted, 1e-10)

    conv = nn.Conv2d(4, 6, 3, groups=2).double()

    def formula(state: State) -> dict[str, Tensor]:
        return {
            "weight": conv.weight.detach() * (1 + torch.einsum("or,rikl->oikl", state["hira_B"][..., 0, 0], state["hira_A"]))
        }

    assert_formula(shaken(gf.adapt(conv, gf.HiRA(rank=2))), conv, formula, torch.randn(2, 4, 5, 5, dtype=torch.float64))


def test_peft() -> None:
    model = net(torch.float32)
    theirs, tensors = peft_of(model, peft.HiraConfig(r=2, target_modules=list(NAMES)))
    state = {name: t for name, t in tensors.items() if "embedding" not in name}
    state["embed.hira_A"] = tensors["embed.hira_embedding_B"].T
    state["embed.hira_B"] = tensors["embed.hira_embedding_A"].T
    assert_near(gf.adapt(model, SITES).with_adapter(state)(IDS), theirs(IDS), 1e-5)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_dropout_acts_on_what_meets_the_change(name: str) -> None:
    model = (nn.Linear(6, 4) if name == "linear" else nn.Conv1d(6, 4, 2)).double()
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    adapted = shaken(gf.adapt(model, gf.HiRA(rank=2, dropout=0.5)))
    changed = adapted.merge()
    torch.manual_seed(5)
    found = adapted.train()(x)
    torch.manual_seed(5)
    thin = nn.functional.dropout(x, 0.5)
    assert_near(found, model(x) + changed(thin) - model(thin), 1e-10)
    assert_near(adapted.eval()(x), changed(x), 1e-10)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_starts_as_the_base(init: Any) -> None:
    model = net(torch.float32)
    assert torch.equal(gf.adapt(model, gf.HiRA(rank=2, init=init))(IDS), model(IDS))
    assert not torch.equal(gf.adapt(model, gf.HiRA(rank=2, init="random"))(IDS), model(IDS))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rank": 0}, "HiRA needs a whole rank"), ({"dropout": 1.0}, "probability"), ({"init": "x"}, "init")],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.AdaptError, match=said):
        gf.HiRA(**options)
    adapted = gf.adapt(nn.Bilinear(2, 3, 4), {"weight": gf.HiRA(rank=1, dropout=0.5)}).train()
    with pytest.raises(gf.AdaptError, match="reads the weight of shape"):
        adapted(torch.ones(1, 2), torch.ones(1, 3))
