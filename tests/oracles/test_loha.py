"""LoHa: by hand in float64, against PEFT, and against LyCORIS."""

from __future__ import annotations

import peft
import pytest
import torch
from helpers.oracles import (
    IDS,
    Products,
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
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gift_func as gf

THEIRS = ("lin", "conv1", "point", "conv2")


def by_hand(model: nn.Module, state: State, s: float) -> dict[str, Tensor]:
    found = {}
    for name in layers(model):
        a1, b1, a2, b2 = (state[f"{name}.hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if f"{name}.hada_t1" in state:
            t1, t2 = (state[f"{name}.hada_t{i}"].flatten(2) for i in (1, 2))
            change = torch.einsum("ijk,io,jc->ock", t1, a1, b1) * torch.einsum("ijk,io,jc->ock", t2, a2, b2)
        else:
            change = (a1 @ b1) * (a2 @ b2)
        found[name] = weight_of(model, name) + s * change.flatten(1)
    return stored(model, found)


@pytest.mark.parametrize("tucker", [False, True])
def test_formula(tucker: bool) -> None:
    model = net(torch.float64, Products)
    method = gf.LoHa(rank=2, alpha=3.0, use_effective_conv2d=tucker)
    adapted = shaken(gf.adapt(model, {"*.weight": method}))
    assert sum("hada_t" in name for name in adapted.adapter) == 4 * tucker
    assert_formula(adapted, model, lambda state: by_hand(model, state, 1.5), IDS)


@pytest.mark.parametrize("tokens", [1, 500])
def test_few_tokens_go_another_way(tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30).double()
    adapted = shaken(gf.adapt(model, gf.LoHa(rank=2)))

    def formula(state: State) -> dict[str, Tensor]:
        a1, b1, a2, b2 = (state[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return {"weight": model.weight.detach() + (a1 @ b1) * (a2 @ b2)}

    assert_formula(adapted, model, formula, torch.randn(tokens, 40, dtype=torch.float64))


@pytest.mark.parametrize("tucker", [False, True])
def test_peft(tucker: bool) -> None:
    model = net(torch.float32, Products)
    config = peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=tucker, target_modules=list(THEIRS))
    theirs, tensors = peft_of(model, config)
    method = gf.LoHa(rank=2, alpha=3.0, use_effective_conv2d=tucker)
    ours = gf.adapt(model, {f"{name}.weight": method for name in THEIRS}).with_adapter(tensors)
    assert_near(ours(IDS), theirs(IDS), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tucker", [False, True])
def test_lycoris(tucker: bool) -> None:
    loha = pytest.importorskip("lycoris.functional.loha")
    model = nn.Conv2d(3, 5, 3).double()
    adapted = shaken(gf.adapt(model, gf.LoHa(rank=2, alpha=3.0, use_effective_conv2d=tucker)))
    a1, b1, a2, b2 = (adapted.adapter[f"hada_{part}"].detach() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    t1, t2 = (adapted.adapter[f"hada_{part}"].detach() if tucker else None for part in ("t1", "t2"))
    change = loha.diff_weight(b1, a1, b2, a2, t1, t2, gamma=torch.tensor(1.5), backend="torch")
    assert_near(adapted.merge().get_parameter("weight").detach(), model.weight + change.reshape(model.weight.shape), 1e-10)


def test_starts_as_the_base() -> None:
    inits = [gf.LoHa(rank=2), gf.LoHa(rank=2, init="normal")]
    assert_starts(net(torch.float32, Products), inits, [gf.LoHa(rank=2, init="random")])
    for method, factor in zip(inits, ("hada_w2_b", "hada_w1_a"), strict=True):
        assert [name for name, tensor in gf.adapt(nn.Linear(4, 3), method).adapter.items() if not tensor.any()] == [factor]


def test_a_square_weight_of_transformers_conv1d_used_as_a_linear_layers() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = Conv1D(16, 16)  # type: ignore[no-untyped-call]

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.gpt.weight)

    adapted = shaken(gf.adapt(Turned().double(), {"gpt.weight": gf.LoHa(rank=1)}))
    x = torch.randn(2, 16, dtype=torch.float64)
    assert_near(adapted(x), adapted.merge()(x), 1e-10)


def test_patterns_set_rank_and_alpha() -> None:
    adapted = gf.adapt(net(torch.float32, Products), gf.LoHa(rank=2, rank_pattern={"lin": 3}, alpha_pattern={"lin": 6.0}))
    assert adapted.adapter["lin.hada_w1_a"].shape == (36, 3)
    assert adapted.adapter["gpt.hada_w1_a"].shape == (16, 2)
