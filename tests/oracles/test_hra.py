"""HRA: reflection by reflection, against PEFT, and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.multiplicative import SITES, TOKENS, check_by_hand, check_laws, check_peft, peft_net, shaken, zoo
from torch import Tensor, nn

import gift_func as gf

peft = pytest.importorskip("peft")


def dense(gs: bool, site: str, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    if site == "experts":
        return torch.stack([dense(gs, "", w[e], {"hra_u": t["hra_u"][e]}) for e in range(3)])
    if site == "hf.weight":
        return dense(gs, "", w.T, t).T
    found = w.flatten(1)
    before: list[Tensor] = []
    for u in t["hra_u"].T:
        if gs:
            for v in before:
                u = u - (v @ u) * v
        u = u / u.norm()
        before.append(u)
        found = found - 2 * torch.outer(found @ u, u)
    return found.reshape(w.shape)


@pytest.mark.parametrize("method", [gf.HRA(4), gf.HRA(3), gf.HRA(1), gf.HRA(3, apply_gs=True)], ids=str)
def test_formula(method: gf.HRA) -> None:
    model = zoo()
    adapted = gf.adapt(model, dict.fromkeys(SITES, method))
    if method.starts_as_base:
        torch.testing.assert_close(adapted(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    check_by_hand(shaken(adapted), model, SITES, partial(dense, method.apply_gs), TOKENS)
    assert gf.Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize("gs", [False, True])
@pytest.mark.parametrize("rank", [4, 1])
@pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed when r is odd!:UserWarning")
def test_peft(gs: bool, rank: int) -> None:
    config = peft.HRAConfig(r=rank, target_modules=["lin", "conv"], apply_GS=gs)
    ours = gf.HRA(rank, apply_gs=gs)
    check_peft(peft_net(), config, {"lin": ours, "conv": ours}, TOKENS)


@pytest.mark.parametrize("method", [gf.HRA(4), gf.HRA(3, apply_gs=True)], ids=str)
def test_laws(method: gf.HRA, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    check_laws(gf.adapt(model, method), model, tmp_path, torch.randn(20, 8).double())


def test_ranks_follow_patterns() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    adapted = gf.adapt(model, gf.HRA(2, rank_pattern={"1": 6}))
    assert [tuple(p.shape) for p in adapted.adapter.values()] == [(8, 2), (8, 6)]
    assert hash(gf.HRA(2, rank_pattern={"1": 6})) == hash(gf.HRA(2, rank_pattern={"1": 6}))


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match="a whole rank of at least 1, got rank=0"):
        gf.HRA(0)
    with pytest.raises(gf.AdaptError, match=r"got rank=-1 \(rank_pattern 'q'\)"):
        gf.HRA(rank_pattern={"q": -1})
    with pytest.raises(gf.AdaptError, match="a width of at least rank=8"):
        gf.adapt(nn.Linear(4, 2), gf.HRA(8, apply_gs=True))
    with pytest.raises(gf.AdaptError, match="at least 2 dimensions"):
        gf.adapt(nn.Linear(8, 2), {"bias": gf.HRA(2)})
