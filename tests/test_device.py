"""A network on another device: whatever a method makes is there too. `meta` is a device that every machine has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_laws import METHODS
from torch import Tensor, nn

import gift_func as gf

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
