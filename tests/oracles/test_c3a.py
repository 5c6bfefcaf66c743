"""C3A: element by element, against PEFT, and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers.multiplicative import SITES, TOKENS, check_by_hand, check_laws, check_peft, peft_net, shaken, zoo
from torch import Tensor, nn

import gift_func as gf

peft = pytest.importorskip("peft")


def dense(site: str, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    if site == "experts":
        return torch.stack([dense("", w[e], {"c3a_kernel": t["c3a_kernel"][e]}) for e in range(3)])
    if site in ("hf.weight", "embed.weight"):
        return dense("", w.T, t).T
    kernel, (rows, columns) = t["c3a_kernel"], w.flatten(1).shape
    b = kernel.shape[-1]
    change = [[kernel[i // b, j // b, (j - i) % b] for j in range(columns)] for i in range(rows)]
    return w + torch.stack([torch.stack(row) for row in change]).reshape(w.shape) / columns


@pytest.mark.parametrize(
    ("method", "sites"),
    [
        (gf.C3A(4), [s for s in SITES if s != "conv.weight"]),
        (gf.C3A(2, init="zeros"), SITES),
        (gf.C3A(1, init="gaussian"), ["lin.weight"]),
        (gf.C3A(3, init="kaiming_uniform"), ["conv.weight"]),
    ],
    ids=str,
)
def test_formula(method: gf.C3A, sites: list[str]) -> None:
    model = zoo()
    adapted = gf.adapt(model, dict.fromkeys(sites, method))
    if method.init == "zeros":
        torch.testing.assert_close(adapted(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    check_by_hand(shaken(adapted, by=1.0), model, sites, dense, TOKENS)
    assert gf.Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("size", [5, 10])
def test_formula_for_few_and_many_tokens(size: int, tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 10).double()
    check_by_hand(shaken(gf.adapt(model, gf.C3A(size))), model, ["weight"], dense, torch.randn(tokens, 20).double())


@pytest.mark.parametrize("size", [8, 4])
def test_peft(size: int) -> None:
    config = peft.C3AConfig(target_modules=["lin"], block_size=size)
    check_peft(peft_net(), config, {"lin": gf.C3A(size)}, TOKENS)


@pytest.mark.parametrize("init", ["xavier_uniform", "kaiming_uniform", "gaussian"])
def test_initial_values_are_spread_as_those_of_peft(init: str) -> None:
    model = nn.Sequential(nn.Linear(128, 64))
    oracle = peft.get_peft_model(
        nn.Sequential(nn.Linear(128, 64)), peft.C3AConfig(target_modules=["0"], block_size=16, init_weights=init)
    )
    theirs = oracle.base_model.model[0].c3a_kernel["default"]
    ours = gf.adapt(model, gf.C3A(16, init=init)).adapter["0.c3a_kernel"]  # type: ignore[arg-type]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.2, atol=0)
    torch.testing.assert_close(ours.abs().max(), theirs.abs().max(), rtol=0.4, atol=0)


def test_laws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    adapted = gf.adapt(model, gf.C3A(8, block_size_pattern={"2": 2}))
    assert [tuple(p.shape) for p in adapted.adapter.values()] == [(1, 1, 8), (2, 4, 2)]
    check_laws(adapted, model, tmp_path, torch.randn(20, 8).double())
    check_laws(adapted, model, tmp_path, torch.randn(1, 8).double())


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match="a whole block_size of at least 1, got block_size=0"):
        gf.C3A(0)
    with pytest.raises(gf.AdaptError, match=r"init is one of xavier_uniform, .* got init='ones'"):
        gf.C3A(init="ones")  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="a block_size=4 that divides its 6 outputs and 8 inputs"):
        gf.adapt(nn.Linear(8, 6), gf.C3A(4))
    with pytest.raises(gf.AdaptError, match="at least 2 dimensions"):
        gf.adapt(nn.Linear(8, 2), {"bias": gf.C3A(2)})
