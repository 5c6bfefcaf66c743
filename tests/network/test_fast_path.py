"""Which parameters torch's fused transformer kernels read."""

from __future__ import annotations

from torch import nn

from gift_func.network.fast_path import fused_names
from gift_func.network.frozen_base import FrozenBase


def test_fused_names_are_in_the_networks_order_whatever_order_they_are_asked_in() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    structure = FrozenBase.of(nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))).structure
    inside = tuple(f"1.{name}" for name, _ in layer.named_parameters())
    names = [name for name in structure.places if name.startswith("1.")]
    assert sorted(inside) == sorted(names)
    for asked in (list(structure.places), list(reversed(structure.places)), set(structure.places)):
        assert fused_names(structure, asked) == tuple(names)
    assert fused_names(structure, ["0.weight"]) == ()
    assert fused_names(FrozenBase.of(nn.Linear(2, 2)).structure, ["weight"]) == ()
