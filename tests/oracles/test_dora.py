"""DoRA: by hand in float64, and against PEFT."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from helpers.oracles import (
    IDS,
    EveryKind,
    State,
    assert_drops_inputs,
    assert_formula,
    assert_near,
    attention,
    layers,
    net,
    peft_of,
    shaken,
    stored,
    weight_of,
)
from torch import Tensor, nn

import gift_func as gf
from gift_func import testing

METHOD = gf.DoRA(rank=2, alpha=3.0)


def by_hand(model: nn.Module, state: State, s: float, detach: bool = True) -> dict[str, Tensor]:
    found = {}
    for name in layers(model):
        a, b, m = (state[f"{name}.lora_{part}"] for part in ("A", "B", "magnitude_vector"))
        v = weight_of(model, name) + s * b.flatten(1) @ a.flatten(1)
        norm = v.square().sum(0 if name == "embed" else 1, keepdim=True).sqrt()
        found[name] = m.reshape(norm.shape) * v / (norm.detach() if detach else norm)
    return stored(model, found)


@pytest.mark.parametrize("detach", [True, False])
def test_formula(detach: bool) -> None:
    model = net(torch.float64)
    adapted = shaken(gf.adapt(model, {"*.weight": gf.DoRA(rank=2, alpha=3.0, detach_norm=detach)}))
    assert_formula(adapted, model, lambda state: by_hand(model, state, 1.5, detach), IDS)


def test_formula_of_stacks_and_attention() -> None:
    model, inputs = attention()
    adapted = shaken(gf.adapt(model, {"in_proj_weight": METHOD}))
    a, b, m = (adapted.adapter[f"in_proj_weight.lora_{part}"].detach() for part in ("A", "B", "magnitude_vector"))
    v = model.in_proj_weight.detach() + 1.5 * b @ a
    dense = {"in_proj_weight": m.unsqueeze(1) * v / v.norm(dim=1, keepdim=True)}
    assert_near(adapted(*inputs)[0], torch.func.functional_call(model, dense, inputs)[0], 1e-10)


def test_peft() -> None:
    model = net(torch.float32, partial(EveryKind, dilation=1))  # PEFT's DoRA forgets a dilation in its thin convolution
    theirs, tensors = peft_of(model, peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=layers(model)))
    assert_near(gf.adapt(model, {"*.weight": METHOD}).with_adapter(tensors)(IDS), theirs(IDS), 1e-5)


@pytest.mark.parametrize("model", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3), nn.ConvTranspose2d(6, 4, 3)], ids=str)
def test_dropout_acts_on_what_meets_the_change(model: nn.Module) -> None:
    assert_drops_inputs(gf.DoRA(rank=2, dropout=0.5), model.double(), torch.randn(2, 6, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_exactly_as_the_base(dtype: torch.dtype) -> None:
    model = nn.Linear(64, 48, bias=False).to(dtype)
    x = torch.randn(5, 64, dtype=dtype)
    for init in ("kaiming", "pissa", "olora"):
        assert torch.equal(gf.adapt(model, gf.DoRA(rank=4, init=init))(x), model(x))


def test_rows_that_vanish_do_no_harm() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[1] = 0
    for detach in (True, False):
        adapted = gf.adapt(model, gf.DoRA(rank=1, detach_norm=detach))
        x = torch.randn(2, 4)
        assert torch.equal(adapted(x), model(x))
        adapted(x).sum().backward()
        assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in adapted.trainable_parameters())
        # B·A = −W: the squared norm is rounding's remainder, which may be negative, and its root must not be NaN.
        full = gf.adapt(model, gf.DoRA(rank=4, detach_norm=detach))
        state = full.adapter_state_dict() | {"lora_B": -model.weight.detach(), "lora_A": torch.eye(4)}
        assert bool(full.with_adapter(state)(x).isfinite().all())


def test_norm_goes_through_a_layered_base() -> None:
    model = nn.Linear(6, 4).double()
    first = shaken(gf.adapt(model, gf.LoRA(rank=2)))
    second = gf.adapt(first, METHOD)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_near(second(x), first(x), 1e-12)
    state = shaken(second).adapter_state_dict()
    assert_near(second.with_adapter(state)(x), gf.adapt(first.merge(), METHOD).with_adapter(state)(x), 1e-10)


def test_lookup_of_padding_gives_no_gradient() -> None:
    model = nn.Embedding(5, 3, padding_idx=0).double()
    adapted = shaken(gf.adapt(model, {"weight": METHOD}))
    adapted(torch.zeros(4, dtype=torch.long)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in adapted.trainable_parameters())


def test_law_of_compilation() -> None:
    testing.check(METHOD, ["linear", "experts", "conv2d grouped"], ["one_compile_for_all", "vmap_is_loop", "loaded_is_saved"])


def test_autocast_keeps_the_element_type_of_the_base() -> None:
    model = nn.Linear(6, 4)
    adapted = shaken(gf.adapt(model, gf.DoRA(rank=2)))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(x).dtype == model(x).dtype == torch.bfloat16
