"""LoKr: by hand in float64, against PEFT, and against LyCORIS."""

from __future__ import annotations

from typing import Any

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

import gift_func as gf
from gift_func.methods.lokr import two_divisors

OPTIONS: list[dict[str, Any]] = [
    {"rank": 1},
    {"rank": 8},
    {"rank": 1, "decompose_both": True},
    {"rank": 1, "use_effective_conv2d": True},
    {"rank": 2, "decompose_factor": 2},
]


def factor(state: State, name: str, number: int) -> Tensor:
    whole = state.get(f"{name}.lokr_w{number}")
    if whole is not None:
        return whole
    a, b = (state[f"{name}.lokr_w{number}_{part}"] for part in "ab")
    core = state.get(f"{name}.lokr_t2")
    return a @ b if core is None else torch.einsum("ijk,ib,jd->bdk", core.flatten(2), a, b)


def by_hand(model: nn.Module, state: State, s: float) -> dict[str, Tensor]:
    found = {}
    for name in layers(model):
        c, d = (factor(state, name, number) for number in (1, 2))
        found[name] = weight_of(model, name) + s * torch.kron(c, d.flatten(1))
    return stored(model, found)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_formula(options: dict[str, Any]) -> None:
    model = net(torch.float64, Products)
    method = gf.LoKr(alpha=3.0, **options)
    adapted = shaken(gf.adapt(model, {"*.weight": method}))
    assert_formula(adapted, model, lambda state: by_hand(model, state, 3 / options["rank"]), IDS)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_peft(options: dict[str, Any]) -> None:
    model = net(torch.float32, Products)
    # PEFT pads C on the wrong side where a Conv1d's D is whole, and so scrambles it; its Tucker form for kernels with a
    # side of one element ends in torch.kron's view error. The formula is the oracle there.
    left_out = {"conv1", "point"} if options["rank"] >= 2 else {"conv1"} if "use_effective_conv2d" in options else set()
    theirs_only = [name for name in ("lin", "conv1", "point", "conv2") if name not in left_out]
    named = {**options}
    config = peft.LoKrConfig(r=named.pop("rank"), alpha=3, target_modules=theirs_only, **named)
    theirs, tensors = peft_of(model, config)
    ours = gf.adapt(model, {f"{name}.weight": gf.LoKr(alpha=3.0, **options) for name in theirs_only})
    assert_near(ours.with_adapter(tensors)(IDS), theirs(IDS), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lycoris(options: dict[str, Any]) -> None:
    lokr = pytest.importorskip("lycoris.functional.lokr")
    model = nn.Conv2d(8, 24, 3).double()
    adapted = shaken(gf.adapt(model, gf.LoKr(alpha=3.0, **options)))
    state = {name.removeprefix("lokr_"): t.detach() for name, t in adapted.adapter.items()}
    parts = [state.get(name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    # LyCORIS divides by what it takes for the rank (b in the Tucker form, nothing where both are whole): undone here.
    rank = next((t.shape[1] for t in (parts[1], parts[4]) if t is not None), 1)
    change = lokr.diff_weight(*parts, gamma=rank, backend="torch") * (3 / options["rank"])
    assert_near(adapted.merge().get_parameter("weight").detach(), model.weight + change.reshape(model.weight.shape), 1e-10)


def test_linear_through_the_factors_and_through_the_matrix() -> None:
    torch.manual_seed(0)
    for d_in, d_out in ((64, 96), (7, 97)):  # a prime splits into 1 and itself: no factors to go through
        model = nn.Linear(d_in, d_out).double()
        adapted = shaken(gf.adapt(model, gf.LoKr(rank=2)))

        def formula(state: State, model: nn.Linear = model) -> dict[str, Tensor]:
            c, d = (factor({f"x.{k}": v for k, v in state.items()}, "x", number) for number in (1, 2))
            return {"weight": model.weight.detach() + torch.kron(c, d)}

        for tokens in (1, 40):
            assert_formula(adapted, model, formula, torch.randn(tokens, d_in, dtype=torch.float64))


def test_splits_as_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        for limit in (-1, 1, 2, 4, 9, 16):
            assert two_divisors(size, limit) == factorization(size, limit), (size, limit)


@pytest.mark.parametrize("both", [False, True])
def test_starts_as_the_base(both: bool) -> None:
    inits = [gf.LoKr(rank=1, decompose_both=both), gf.LoKr(rank=1, init="lycoris", decompose_both=both)]
    assert_starts(net(torch.float32, Products), inits, [gf.LoKr(rank=1, init="random")])
