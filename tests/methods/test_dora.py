"""DoRA: by hand in float64, and against PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from common import State, assert_formula, assert_near, peft_of, shaken
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gift_func as gf
from gift_func import testing

METHOD = gf.DoRA(rank=2, alpha=3.0)


class Net(nn.Module):
    """A layer of every kind that PEFT's DoRA takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lin = nn.Linear(4, 6)
        self.gpt = Conv1D(5, 6)  # type: ignore[no-untyped-call]
        self.conv1 = nn.Conv1d(5, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3)
        self.conv3 = nn.Conv3d(1, 2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.gpt(torch.tanh(self.lin(self.embed(ids)))))
        x = torch.tanh(self.conv1(x.mT)).unsqueeze(1)
        x = torch.tanh(self.conv2(x)).unsqueeze(1)
        return self.conv3(x).flatten(1)  # type: ignore[no-any-return]


IDS = (torch.arange(10).reshape(2, 5) * 7) % 11
SITES = {f"{name}.weight": METHOD for name in ("embed", "lin", "gpt", "conv1", "conv2", "conv3")}


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def by_hand(model: Net, state: State, s: float, detach: bool = True) -> dict[str, Tensor]:
    found = {}
    over: tuple[int, ...]
    for name in ("embed", "lin", "gpt", "conv1", "conv2", "conv3"):
        w = model.get_parameter(f"{name}.weight").detach()
        a, b, m = (state[f"{name}.lora_{part}"] for part in ("A", "B", "magnitude_vector"))
        if name == "gpt":
            v, over = w + s * (b @ a).T, (0,)
        elif name == "embed":
            v, over = w + s * b @ a, (0,)
        else:
            v, over = w + s * (b.flatten(1) @ a.flatten(1)).reshape(w.shape), tuple(range(1, w.ndim))
        norm = v.square().sum(over, keepdim=True).sqrt()
        found[f"{name}.weight"] = m.reshape(norm.shape) * v / (norm.detach() if detach else norm)
    return found


@pytest.mark.parametrize("detach", [True, False])
def test_formula(detach: bool) -> None:
    model = net(torch.float64)
    rules = {name: gf.DoRA(rank=2, alpha=3.0, detach_norm=detach) for name in SITES}
    adapted = shaken(gf.adapt(model, rules))
    assert_formula(adapted, model, lambda state: by_hand(model, state, 1.5, detach), IDS)


def test_formula_of_stacks_and_attention() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2).double()
    query, key, value = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (3, 5, 5))
    adapted = shaken(gf.adapt(model, {"in_proj_weight": METHOD}))
    a, b, m = (adapted.adapter[f"in_proj_weight.lora_{part}"].detach() for part in ("A", "B", "magnitude_vector"))
    v = model.in_proj_weight.detach() + 1.5 * b @ a
    dense = {"in_proj_weight": m.unsqueeze(1) * v / v.norm(dim=1, keepdim=True)}
    wanted = torch.func.functional_call(model, dense, (query, key, value))[0]
    assert_near(adapted(query, key, value)[0], wanted, 1e-10)  # key and value apart from query: rows are sliced


def test_peft() -> None:
    model = net(torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=[n.removesuffix(".weight") for n in SITES])
    theirs, tensors = peft_of(model, config)
    state = {name: t for name, t in tensors.items() if "embedding" not in name}
    state["embed.lora_A"] = tensors["embed.lora_embedding_B"].T
    state["embed.lora_B"] = tensors["embed.lora_embedding_A"].T
    assert_near(gf.adapt(model, SITES).with_adapter(state)(IDS), theirs(IDS), 1e-5)


def test_dropout_acts_on_what_meets_the_change() -> None:
    model = nn.Linear(6, 4).double()
    adapted = shaken(gf.adapt(model, gf.DoRA(rank=2, dropout=0.5), generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 6, dtype=torch.float64)
    change = adapted.merge().get_parameter("weight").detach() - model.weight.detach()
    torch.manual_seed(5)
    found = adapted.train()(x)
    torch.manual_seed(5)
    assert_near(found, model(x) + nn.functional.dropout(x, 0.5) @ change.T, 1e-10)
    assert_near(adapted.eval()(x), nn.functional.linear(x, model.weight + change, model.bias), 1e-10)


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)])
def test_dropout_in_convolutions(module: nn.Module) -> None:
    model = module.double()
    adapted = shaken(gf.adapt(model, {"weight": gf.DoRA(rank=2, dropout=0.5)}))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    changed = adapted.merge()
    torch.manual_seed(5)
    found = adapted.train()(x)
    torch.manual_seed(5)
    thin = nn.functional.dropout(x, 0.5)
    assert_near(found, model(x) + changed(thin) - model(thin), 1e-10)


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


@pytest.mark.parametrize(("options", "said"), [({"rank": 0}, "DoRA needs a whole rank"), ({"dropout": 1.0}, "probability")])
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.AdaptError, match=said):
        gf.DoRA(**options)


def test_law_of_compilation() -> None:
    testing.check(METHOD, ["linear", "experts", "conv2d grouped"], ["one_compile_for_all", "vmap_is_loop", "loaded_is_saved"])


def test_autocast_keeps_the_element_type_of_the_base() -> None:
    model = nn.Linear(6, 4)
    adapted = shaken(gf.adapt(model, gf.DoRA(rank=2)))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(x).dtype == model(x).dtype == torch.bfloat16
