"""MiSS: element by element, against PEFT in every mode, and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.multiplicative import SITES, TOKENS, check_by_hand, check_laws, check_peft, peft_net, shaken, zoo
from torch import Tensor, nn

import gift_func as gf

peft = pytest.importorskip("peft")


def dense(mode: str, site: str, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    if site == "experts":
        return torch.stack([dense(mode, "", w[e], {"miss_block": t["miss_block"][e]}) for e in range(3)])
    if site in ("hf.weight", "embed.weight"):
        return dense(mode, "", w.T, t).T
    matrix, d = w.flatten(1), t["miss_block"]
    rows, columns = matrix.shape
    if mode == "bat":
        r = d.shape[-1]
        changes = [
            torch.cat([matrix[i : i + r, j : j + r] @ d[i // r] + d[i // r] for j in range(0, columns, r)], dim=1)
            for i in range(0, rows, r)
        ]
        return w + torch.cat(changes).reshape(w.shape)
    r, width = d.shape
    change = torch.stack([torch.stack([d[i % r, o % width] for i in range(columns)]) for o in range(rows)])
    return w + change.reshape(w.shape)


@pytest.mark.parametrize(
    ("method", "sites"),
    [
        (gf.MiSS(4), SITES),
        (gf.MiSS(3), SITES),
        (gf.MiSS(3, mode="mini", mini_rank=2), SITES),
        (gf.MiSS(2, mode="bat"), SITES),
        (gf.MiSS(4, mode="bat"), ["embed.weight", "lin.weight", "hf.weight", "mha.in_proj_weight", "experts", "head.weight"]),
    ],
    ids=str,
)
def test_formula(method: gf.MiSS, sites: list[str]) -> None:
    model = zoo()
    adapted = gf.adapt(model, dict.fromkeys(sites, method))
    torch.testing.assert_close(adapted(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    check_by_hand(shaken(adapted), model, sites, partial(dense, method.mode), TOKENS)
    assert gf.Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gf.MiSS(4), {"r": 4}),
        (gf.MiSS(5), {"r": 5}),
        (gf.MiSS(4, mode="mini", mini_rank=2), {"r": 4, "mini_r": 2, "init_weights": "mini"}),
        (gf.MiSS(4, mode="bat"), {"r": 4, "init_weights": "bat"}),
    ],
    ids=str,
)
def test_peft(ours: gf.MiSS, theirs: dict[str, Any]) -> None:
    check_peft(peft_net(), peft.MissConfig(target_modules=["lin"], **theirs), {"lin": ours}, TOKENS)


@pytest.mark.parametrize("method", [gf.MiSS(3), gf.MiSS(2, mode="mini", mini_rank=2), gf.MiSS(4, mode="bat")], ids=str)
def test_laws(method: gf.MiSS, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    check_laws(gf.adapt(model, method), model, tmp_path, torch.randn(20, 8).double())


@pytest.mark.parametrize("method", [gf.MiSS(4, dropout=0.5), gf.MiSS(3, dropout=0.5, mode="mini", mini_rank=2)], ids=str)
def test_dropout_acts_in_training_only(method: gf.MiSS) -> None:
    model = zoo()
    sites = ["lin.weight", "hf.weight", "mha.in_proj_weight", "experts"]
    adapted = shaken(gf.adapt(model, dict.fromkeys(sites, method)))
    adapted.train()
    outputs = torch.stack([adapted(TOKENS) for _ in range(20)])
    assert outputs.std(0).min() > 1e-4
    adapted.eval()
    torch.testing.assert_close(adapted(TOKENS), adapted.merge()(TOKENS))
    with pytest.raises(gf.AdaptError, match="dropout=0 on a Embedding"):
        gf.adapt(model, {"embed.weight": method})
    with pytest.raises(gf.AdaptError, match="dropout=0 on a Conv2d"):
        gf.adapt(model, {"conv.weight": method})


def test_dropout_is_unbiased() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    adapted = shaken(gf.adapt(model, gf.MiSS(2, dropout=0.25))).train()
    x = torch.randn(6).double()
    mean = adapted(x.expand(200_000, 6)).mean(0)
    torch.testing.assert_close(mean, adapted.eval()(x), rtol=0, atol=2e-2)


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match="a whole rank of at least 1, got rank=0"):
        gf.MiSS(0)
    with pytest.raises(gf.AdaptError, match="mode is one of default, mini, bat, got mode='bone'"):
        gf.MiSS(mode="bone")  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="MiSS needs a whole mini_rank of at least 1, got mini_rank=0"):
        gf.MiSS(mini_rank=0)
    with pytest.raises(gf.AdaptError, match=r"dropout is a probability in \[0, 1\), got dropout=1.0"):
        gf.MiSS(dropout=1.0)
    with pytest.raises(gf.AdaptError, match="dropout is 0 in the mode 'bat'"):
        gf.MiSS(mode="bat", dropout=0.1)
    with pytest.raises(gf.AdaptError, match="at least rank=64 inputs"):
        gf.adapt(nn.Linear(8, 2), gf.MiSS())
    with pytest.raises(gf.AdaptError, match="a rank=4 that divides its 6 outputs and 8 inputs"):
        gf.adapt(nn.Linear(8, 6), gf.MiSS(4, mode="bat"))
    with pytest.raises(gf.AdaptError, match="a mini_rank=4 that divides its 6 outputs"):
        gf.adapt(nn.Linear(8, 6), gf.MiSS(4, mode="mini", mini_rank=4))
    with pytest.raises(gf.AdaptError, match="at least 2 dimensions"):
        gf.adapt(nn.Linear(8, 2), {"bias": gf.MiSS(2)})
