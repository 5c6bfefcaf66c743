"""(IA)³: by hand, against PEFT, and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.multiplicative import SITES, TOKENS, check_by_hand, check_laws, peft_net, peft_oracle, shaken, zoo
from torch import Tensor, nn

import gift_func as gf

peft = pytest.importorskip("peft")


def dense(side: str, site: str, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    factor = t["ia3_l"]
    if site.endswith("bias"):
        return w * factor.flatten()
    if site == "conv.weight":
        if side == "output":
            return torch.stack([w[i] * factor[0, i] for i in range(6)])
        return torch.stack([w[i] * factor[0, 2 * (i // 3) : 2 * (i // 3) + 2] for i in range(6)])
    if site in ("embed.weight", "hf.weight"):
        return w * factor.mT
    return w * factor


@pytest.mark.parametrize("side", ["output", "input"])
def test_formula(side: Any) -> None:
    model = zoo()
    adapted = gf.adapt(model, {s: gf.IA3(side=side) for s in SITES})
    torch.testing.assert_close(adapted(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    # On the output side the bias goes along: by the weight's own tensor, and there is no other.
    assert len(adapted.adapter) == len(SITES)
    biases = ["lin.bias", "hf.bias", "conv.bias", "mha.in_proj_bias"] if side == "output" else []
    check_by_hand(shaken(adapted), model, [*SITES, *biases], lambda *a: dense(side, *a), TOKENS)


@pytest.mark.parametrize("groups", [1, 2])
def test_peft(groups: int) -> None:
    model = peft_net(groups)
    names = ["lin", "hf", "conv"]
    for side, feedforward in (("output", []), ("input", names)):
        config = peft.IA3Config(target_modules=names, feedforward_modules=feedforward)
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            oracle, state = peft_oracle(model, config)
        adapted = gf.adapt(model, {name: gf.IA3(side=side) for name in names})  # type: ignore[arg-type]
        torch.testing.assert_close(adapted.with_adapter(state)(TOKENS), oracle(TOKENS), rtol=1e-5, atol=1e-5)


def test_laws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    adapted = gf.adapt(model, {"0": gf.IA3(), "2": gf.IA3(side="input")})
    check_laws(adapted, model, tmp_path, torch.randn(20, 5))
    assert gf.Method.from_dict(gf.IA3(side="input").to_dict()) == gf.IA3(side="input")


def test_usual_sites_are_those_of_lora() -> None:
    assert set(gf.adapt(zoo(), gf.IA3(side="input")).adapter) == {
        f"{m}.ia3_l" for m in ("lin", "hf", "conv", "mha.in_proj_weight", "mha.out_proj", "head")
    }


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match=r"side is one of output, input, got side='both'"):
        gf.IA3(side="both")  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="at least 2 dimensions"):
        gf.adapt(zoo(), {"lin.bias": gf.IA3()})
    with pytest.raises(gf.AdaptError, match="one row for each output channel"):
        gf.adapt(nn.ConvTranspose2d(2, 3, 3), {"weight": gf.IA3()})
    with pytest.raises(gf.AdaptError, match="side='input', or a bias of its own"):
        gf.adapt(nn.MultiheadAttention(8, 2, kdim=4, vdim=4), {"q_proj_weight": gf.IA3()})
