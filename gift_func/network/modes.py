"""Which modules of a network are in training mode: one whose BatchNorm is frozen is in no single mode."""

from __future__ import annotations

from .module_tree import ModuleTree

Modes = frozenset[str]
"""The dotted names of the modules in training mode."""


def modes_of(tree: ModuleTree) -> Modes:
    """The modes that a tree's modules are in."""
    return frozenset(name for name, module in tree.modules.items() if module.training)


def set_modes(tree: ModuleTree, modes: Modes | bool) -> None:
    """Put each of a tree's modules in its mode, or all of them in one by the network's own `train`."""
    if isinstance(modes, bool):
        tree.module.train(modes)
        return
    for name, module in tree.modules.items():
        module.training = name in modes
