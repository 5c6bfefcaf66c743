"""Which modules of a network are in training mode: one whose BatchNorm is frozen is in no single mode."""

from __future__ import annotations

from .module_tree import ModuleTree
from .runner import Runner

Modes = frozenset[str]
"""The dotted names of the modules in training mode."""


def modes_of(structure: ModuleTree) -> Modes:
    """The modes that a structure's modules are in."""
    return frozenset(name for name, module in structure.modules.items() if module.training)


def modes_in(body: Runner) -> Modes | bool:
    """The modes in which a model runs the modules of its base; or that which all are yet to be put in."""
    if body.is_undecided:
        return body.modes[-1]
    return frozenset(name for name in body.base.structure.modules if name in body.outline.modules and body.trains(name))


def put(structure: ModuleTree, modes: Modes | bool) -> None:
    """Put a structure's modules in modes, or all of them in one as their own `train` has it."""
    if isinstance(modes, bool):
        structure.module.train(modes)
        return
    for name, module in structure.modules.items():
        module.training = name in modes
