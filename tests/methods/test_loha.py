"""LoHa: by hand in float64, against PEFT, and against LyCORIS."""

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
    """Layers that PEFT's LoHa takes, and two more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lin = nn.Linear(4, 6)
        self.gpt = Conv1D(6, 6)  # type: ignore[no-untyped-call]
        self.conv1 = nn.Conv1d(6, 4, 3, padding=2, dilation=2)
        self.point = nn.Conv1d(4, 4, 1)
        self.conv2 = nn.Conv2d(2, 4, 3, stride=2, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.gpt(torch.tanh(self.lin(self.embed(ids)))))
        x = torch.tanh(self.point(torch.tanh(self.conv1(x.mT)))).unflatten(1, (2, 2))
        return self.conv2(nn.functional.pad(x, (0, 0, 1, 1))).flatten(1)  # type: ignore[no-any-return]


IDS = (torch.arange(10).reshape(2, 5) * 7) % 11
NAMES = ("embed", "lin", "gpt", "conv1", "point", "conv2")
THEIRS = ("lin", "conv1", "point", "conv2")


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def by_hand(model: Net, state: State, s: float) -> dict[str, Tensor]:
    found = {}
    for name in NAMES:
        w = model.get_parameter(f"{name}.weight").detach()
        a1, b1, a2, b2 = (state[f"{name}.hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if f"{name}.hada_t1" in state:
            t1, t2 = (state[f"{name}.hada_t{i}"].flatten(2) for i in (1, 2))
            change = torch.einsum("ijk,io,jc->ock", t1, a1, b1) * torch.einsum("ijk,io,jc->ock", t2, a2, b2)
        else:
            change = (a1 @ b1) * (a2 @ b2)
        found[f"{name}.weight"] = w + s * (change.T if name == "gpt" else change.reshape(w.shape))
    return found


@pytest.mark.parametrize("tucker", [False, True])
def test_formula(tucker: bool) -> None:
    model = net(torch.float64)
    method = gf.LoHa(rank=2, alpha=3.0, use_effective_conv2d=tucker)
    adapted = shaken(gf.adapt(model, {f"{name}.weight": method for name in NAMES}))
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
    model = net(torch.float32)
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


@pytest.mark.parametrize("init", ["kaiming", "normal"])
def test_starts_as_the_base(init: Any) -> None:
    model = net(torch.float32)
    assert torch.equal(gf.adapt(model, gf.LoHa(rank=2, init=init))(IDS), model(IDS))
    assert not torch.equal(gf.adapt(model, gf.LoHa(rank=2, init="random"))(IDS), model(IDS))


def test_patterns_set_rank_and_alpha() -> None:
    adapted = gf.adapt(net(torch.float32), gf.LoHa(rank=2, rank_pattern={"lin": 3}, alpha_pattern={"lin": 6.0}))
    assert adapted.adapter["lin.hada_w1_a"].shape == (6, 3)
    assert adapted.adapter["gpt.hada_w1_a"].shape == (6, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "LoHa needs a whole rank"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern 'a'"),
        ({"init": "x"}, "init is one of"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.AdaptError, match=said):
        gf.LoHa(**options)
