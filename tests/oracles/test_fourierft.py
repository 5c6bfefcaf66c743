"""FourierFT: cosines by hand, against PEFT, and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import pi
from pathlib import Path

import pytest
import torch
from helpers.multiplicative import SITES, TOKENS, check_by_hand, check_laws, check_peft, peft_net, shaken, zoo
from torch import Tensor, nn

import gift_func as gf

peft = pytest.importorskip("peft")


def dense(scale: float, site: str, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    if site == "experts":
        parts = [dense(scale, "", w[e], {**t, "fourierft_spectrum": t["fourierft_spectrum"][e]}) for e in range(3)]
        return torch.stack(parts)
    if site in ("hf.weight", "embed.weight"):
        return dense(scale, "", w.T, t).T
    rows, columns = w.flatten(1).shape
    j, k = torch.arange(rows).unsqueeze(1).to(w.dtype), torch.arange(columns).to(w.dtype)
    change = torch.zeros(rows, columns, dtype=w.dtype)
    for value, p, q in zip(t["fourierft_spectrum"], *t["fourierft_indices"], strict=True):
        change = change + value * torch.cos(2 * pi * (j * p / rows + k * q / columns)) / (rows * columns)
    return w + scale * change.reshape(w.shape)


@pytest.mark.parametrize("method", [gf.FourierFT(7), gf.FourierFT(31, scaling=2.0, init="zeros")], ids=str)
def test_formula(method: gf.FourierFT) -> None:
    model = zoo()
    adapted = gf.adapt(model, dict.fromkeys(SITES, method))
    if method.init == "zeros":
        torch.testing.assert_close(adapted(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    check_by_hand(shaken(adapted), model, SITES, partial(dense, method.scaling), TOKENS)
    assert gf.Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("shape", [(16, 16), (15, 7), (8, 1), (1, 6)])
def test_formula_at_every_size(shape: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(*shape).double()
    adapted = gf.adapt(model, gf.FourierFT(5))
    check_by_hand(shaken(adapted), model, ["weight"], partial(dense, 150.0), torch.randn(tokens, shape[0]).double())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_peft() -> None:
    config = peft.FourierFTConfig(target_modules=["lin", "hf"], n_frequency=20, scaling=20.0)
    # The places are not in PEFT's file: ours are drawn as its are.
    ours = gf.FourierFT(20, scaling=20.0)
    check_peft(peft_net(), config, {"lin": ours, "hf": ours}, TOKENS)


def test_laws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    check_laws(gf.adapt(model, gf.FourierFT(5, random_loc_seed=None)), model, tmp_path, torch.randn(20, 8).double())


def test_places() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapted = gf.adapt(model, gf.FourierFT(5, n_frequency_pattern={"1": 6}))
    assert adapted.adapter["0.fourierft_indices"].shape == (2, 5)
    assert adapted.adapter["1.fourierft_indices"].shape == (2, 6)
    assert torch.equal(adapted.adapter["0.fourierft_indices"], adapted.adapter["1.fourierft_indices"][:, :5])
    anew = gf.adapt(model, gf.FourierFT(5, random_loc_seed=None), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(anew.adapter["0.fourierft_indices"], anew.adapter["1.fourierft_indices"])
    assert [n for n, _ in anew.named_trainable_parameters()] == ["0.fourierft_spectrum", "1.fourierft_spectrum"]


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match="a whole n_frequency of at least 1, got n_frequency=0"):
        gf.FourierFT(0)
    with pytest.raises(gf.AdaptError, match="init is one of normal, zeros, got init='ones'"):
        gf.FourierFT(init="ones")  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="at least n_frequency=1000 elements"):
        gf.adapt(nn.Linear(8, 2), gf.FourierFT())
    with pytest.raises(gf.AdaptError, match="at least 2 dimensions"):
        gf.adapt(nn.Linear(8, 2), {"bias": gf.FourierFT(2)})
