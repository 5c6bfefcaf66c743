"""Torch's fused inference kernels for transformer encoders, which do not accept slots.

In eval and without gradients `nn.TransformerEncoderLayer` runs as one fused kernel, and
`nn.TransformerEncoder` packs a padded batch into a nested tensor that only these kernels accept
(its outputs at padded positions are zeros). Both look for tensors with overrides to decide, and
the encoder looks at its first layer only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from .._torch import is_transformed
from ..weights import Slot, Weight
from .frozen_base import FrozenBase
from .module_tree import ModuleTree, join


class FastPath:
    """Which tensors to bind in a network that may run by torch's fused kernels.

    Args:
        base: the frozen base.
        tree: the network.
        adapted: names of the adapted parameters.

    Attributes:
        fused: the names of the slots that a fused kernel would read, in the network's order.
        guards: the names of parameters that must be slots too, so that an encoder with adapted layers does not pack its batch.
    """

    def __init__(self, base: FrozenBase, tree: ModuleTree, adapted: Collection[str]) -> None:
        known = {*adapted, *base.slots}
        slots = [name for name in tree.places if name in known]  # in the network's order
        self._base = base
        self._tree = tree
        self.fused = _fused(tree, slots)
        self.guards = _guards(tree, slots)

    def is_taken(self, tensors: Iterable[Tensor] = ()) -> bool:
        """Whether a call that begins now, on these adapter tensors, would run the fused kernels if there were no slots."""
        return (
            bool(self.fused)
            and not torch.is_grad_enabled()
            and not self._tree.module.training
            and not any(map(is_transformed, tensors))
        )

    def guarded(self) -> dict[str, Tensor]:
        """Slots for the guards, by name."""
        return {name: Slot.of(self._base.weights[name]) for name in self.guards}

    def bindings(self, weights: Mapping[str, Weight], tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The tensors for the places of parameters in one call: slots, or dense tensors for the fused kernels.

        Args:
            weights: the structured weights, by the names of adapted parameters.
            tensors: the adapter tensors that they were made of.
        """
        bound = {**self.guarded(), **{name: Slot.of(weight) for name, weight in weights.items()}}
        if self.is_taken(tensors):
            for name in (*self.fused, *self.guards):
                bound[name] = (weights.get(name) or self._base.weights[name]).dense()
        return bound


def _fused(tree: ModuleTree, slots: Collection[str]) -> tuple[str, ...]:
    layers = [module for module in tree.modules.values() if isinstance(module, nn.TransformerEncoderLayer)]
    if not layers:
        return ()
    inside = {id(module) for layer in layers for module in layer.modules()}
    return tuple(name for name in slots if any(id(module) in inside for module, _ in tree.places[name]))


def _guards(tree: ModuleTree, slots: Collection[str]) -> tuple[str, ...]:
    found: list[str] = []
    for path, module in tree.modules.items():
        if isinstance(module, nn.TransformerEncoder):
            inside = [name for name in slots if name.startswith(join(path, "layers."))]
            first = join(path, "layers.0.")
            if inside and not any(name.startswith(first) for name in inside):
                found.extend(name for name in tree.places if name.startswith(first))
    return tuple(found)
