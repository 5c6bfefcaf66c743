"""A network on another device: whatever a method makes is there too. `meta` is a device that every machine has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers.methods import METHODS
from torch import Tensor, nn

import gift_func as gf
from gift_func import testing

HOSTS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], tuple[Any, ...]]]] = {
    "linear": (lambda: nn.Linear(8, 8), "inner.weight", lambda: (torch.randn(5, 8),)),
    "conv": (lambda: nn.Conv2d(8, 8, 3), "inner.weight", lambda: (torch.randn(2, 8, 6, 6),)),
    "embedding": (lambda: nn.Embedding(8, 8), "inner.weight", lambda: (torch.zeros(4, dtype=torch.long),)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "inner.in_proj_weight", lambda: (torch.randn(4, 2, 8),) * 3),
    "norm": (lambda: nn.LayerNorm(8), "inner.weight", lambda: (torch.randn(5, 8),)),
}


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        found = self.inner(*args)
        made: Tensor = found[0] if isinstance(found, tuple) else found
        return made


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_everything_is_where_the_network_is(method: str, host: str) -> None:
    make, name, inputs = HOSTS[host]
    with torch.device("meta"):
        model, args = Holder(make()), inputs()
    try:
        adapted = gf.adapt(model, {name: METHODS[method]})
    except gf.AdaptError:
        return  # a method that refuses this host, which the laws look at
    assert {tensor.device.type for tensor in adapted.adapter_state_dict().values()} == {"meta"}
    out = adapted(*args)
    assert out.device.type == "meta"
    out.sum().backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in adapted.trainable_parameters())
    assert {tensor.device.type for tensor in adapted.merge().parameters()} == {"meta"}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""An accelerator where there is one; without it the test below tries its own steps."""


@pytest.mark.parametrize("host", testing.HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_an_accelerator_computes_what_the_processor_does(method: str, host: str) -> None:
    """One adapter, an ensemble of two, and a bank's mixed batch: outputs and gradients in float64."""
    try:
        case = testing.Case(METHODS[method], testing.HOSTS[host])
    except gf.AdaptError:
        return
    there = gf.adapt(copy.deepcopy(case.model).to(DEVICE), case.rules)
    for here, moved in zip(_members(case.start, case.states), _members(there, case.states), strict=True):
        for route in (_alone, _stacked, _banked):
            found, grads = route(moved, case.x.to(DEVICE))
            wanted, expected = route(here, case.x)
            assert found.device.type == DEVICE
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-9, atol=1e-9)
            for got, want in zip(grads, expected, strict=True):
                torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-8)


def _members(start: gf.AdaptedModel, states: Sequence[Mapping[str, Tensor]]) -> list[list[gf.AdaptedModel]]:
    """The adapted models of some states, in both orders."""
    device = next(iter(start.adapter_state_dict().values())).device
    made = [start.with_adapter({name: tensor.to(device) for name, tensor in state.items()}) for state in states]
    return [made, made[::-1]]


Found = tuple[Tensor, Sequence[Tensor]]


def _alone(members: Sequence[gf.AdaptedModel], x: Tensor) -> Found:
    out = members[0](x)
    return out, torch.autograd.grad(out.square().sum(), list(members[0].trainable_parameters()))


def _stacked(members: Sequence[gf.AdaptedModel], x: Tensor) -> Found:
    ens = gf.stack(list(members))
    out = ens(x)
    return out, torch.autograd.grad(out.square().sum(), list(ens.trainable_parameters()))


def _banked(members: Sequence[gf.AdaptedModel], x: Tensor) -> Found:
    bank = gf.AdapterBank({"a": members[0], "b": members[1]})
    out = bank(x, adapters=["a", "b", "b", None][: len(x)])
    return out, torch.autograd.grad(out.square().sum(), list(bank.trainable_parameters()))
