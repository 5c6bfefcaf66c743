"""Which parameters torch's fused transformer kernels read."""

from __future__ import annotations

from torch import nn

from gift_func.network.fast_path import FastPath
from gift_func.network.frozen_base import FrozenBase


def test_fused_names_are_in_the_networks_order_whatever_order_they_are_given_in() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    base = FrozenBase.of(nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4)))
    inside = tuple(f"1.{name}" for name, _ in layer.named_parameters())
    names = [name for name in base.tree.places if name.startswith("1.")]
    assert sorted(inside) == sorted(names)
    for given in (list(base.tree.places), list(reversed(base.tree.places)), set(base.tree.places)):
        assert FastPath(base, base.tree, given).fused == tuple(names)
    assert FastPath(base, base.tree, ["0.weight"]).fused == ()
    plain = FrozenBase.of(nn.Linear(2, 2))
    assert FastPath(plain, plain.tree, ["weight"]).fused == ()
