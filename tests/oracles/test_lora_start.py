"""LoRA's residual initialisations: by hand in float64, and against PEFT, which writes to the base."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from helpers.oracles import IDS, State, assert_formula, assert_near, layers, net, shaken, stored, weight_of
from torch import Tensor, nn

import gift_func as gf

INITS = ("pissa", "pissa_niter_16", "olora")
NAMES = ("embed", "lin", "gpt", "conv1", "conv2", "conv3")


def by_hand(model: nn.Module, state: State, s: float) -> dict[str, Tensor]:
    found = {}
    for name in layers(model):
        b, a, b0, a0 = (state[f"{name}.lora_{part}"].flatten(1) for part in ("B", "A", "B0", "A0"))
        found[name] = weight_of(model, name) + s * (b @ a - b0 @ a0)
    return stored(model, found)


@pytest.mark.parametrize("init", INITS)
def test_formula(init: str) -> None:
    model = net(torch.float64)
    adapted = gf.adapt(model, {"*.weight": gf.LoRA(rank=2, alpha=3.0, init=init)})
    assert_near(adapted(IDS), model(IDS), 0.0)
    assert all(not parameter.requires_grad for name, parameter in adapted.adapter.items() if name.endswith("0"))
    assert_formula(shaken(adapted), model, lambda state: by_hand(model, state, 1.5), IDS)


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_the_papers(name: str) -> None:
    matrix = weight_of(net(torch.float64), name)

    def part(init: str) -> tuple[Tensor, Tensor]:
        adapted = gf.adapt(net(torch.float64), {f"{name}.weight": gf.LoRA(rank=2, alpha=3.0, init=init)})
        return tuple(adapted.adapter[f"{name}.lora_{x}0"].detach().flatten(1) for x in "BA")

    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    for init, tolerance in (("pissa", 1e-10), ("pissa_niter_60", 1e-6)):
        b, a = part(init)
        assert_near(1.5 * b @ a, (u[:, :2] * sigma[:2]) @ vh[:2], tolerance)
        assert_near((b.T @ b).diagonal(), sigma[:2] / 1.5, tolerance)  # either factor has the root of σ/s
        assert_near((a @ a.T).diagonal(), sigma[:2] / 1.5, tolerance)
    q, r = torch.linalg.qr(matrix)
    assert_near(part("olora")[0], q[:, :2], 1e-10)
    assert_near(part("olora")[1], r[:2], 1e-10)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_peft(init: Any) -> None:
    model = net(torch.float32)
    names = ["lin"] if init == "olora" else ["lin", "gpt"]  # PEFT's OLoRA takes a Conv1D untransposed, which cannot fit
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=names)
    theirs: Any = peft.get_peft_model(net(torch.float32), config).eval()
    start = {
        name.removeprefix("base_model.model.").replace(".default.weight", "0"): parameter.detach().clone()
        for name, parameter in theirs.named_parameters()
        if ".default" in name
    }
    generator = torch.Generator().manual_seed(0)
    now = {}
    for name, parameter in theirs.named_parameters():
        if ".default" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            now[name.removeprefix("base_model.model.").replace(".default.weight", "")] = parameter.detach().clone()
    method = gf.LoRA(rank=2, alpha=3.0, init=init)
    ours = gf.adapt(model, {f"{name}.weight": method for name in names}).with_adapter(start | now)
    assert_near(ours(IDS), theirs(IDS), 1e-5)


def test_dropout_leaves_the_start_alone() -> None:
    model = nn.Linear(6, 4)
    adapted = gf.adapt(model, gf.LoRA(rank=2, init="pissa", dropout=0.5)).train()
    x = torch.randn(3, 6)
    assert torch.equal(adapted(x), model(x))
    assert not torch.equal(shaken(adapted)(x), shaken(adapted)(x))
    assert torch.equal(shaken(adapted).eval()(x), shaken(adapted).eval()(x))


def test_rank_above_the_weights_own_starts_as_lora() -> None:
    model = nn.Linear(3, 6).double()
    for init in INITS:
        adapted = gf.adapt(model, gf.LoRA(rank=5, alpha=5.0, init=init))
        b, a = adapted.adapter["lora_B"].detach(), adapted.adapter["lora_A"].detach()
        assert_near(b @ a, model.weight.detach(), 1e-10)
        assert a[3:].abs().min() > 0
        assert not b[:, 3:].any()


def test_randomised_decomposition_draws_from_the_generator_alone() -> None:
    model = nn.Linear(9, 8)
    before = torch.get_rng_state()
    one, two = (
        gf.adapt(model, gf.LoRA(rank=2, init="pissa_niter_1"), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.adapter["lora_A0"], two.adapter["lora_A0"])


@pytest.mark.parametrize("init", ["pissa_niter_", "pissa_niter_x", "svd"])
def test_refusals(init: str) -> None:
    with pytest.raises(gf.AdaptError, match="init is one of kaiming"):
        gf.LoRA(init=init)
