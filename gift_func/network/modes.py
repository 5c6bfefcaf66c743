"""Which modules of a network are in training mode; they may differ, as where a BatchNorm is frozen."""

from __future__ import annotations

from .module_tree import ModuleTree

Modes = frozenset[str]
"""The dotted names of the modules in training mode."""


def modes_of(tree: ModuleTree) -> Modes:
    """The modules of a tree that are in training mode."""
    return frozenset(name for name, module in tree.modules.items() if module.training)


def set_modes(tree: ModuleTree, modes: Modes | bool) -> None:
    """Set the mode of each of a tree's modules, or one for all by the network's own `train`."""
    if isinstance(modes, bool):
        tree.module.train(modes)
        return
    for name, module in tree.modules.items():
        module.training = name in modes
