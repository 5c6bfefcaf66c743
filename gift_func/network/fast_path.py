"""Torch's fused inference kernels for transformer encoders, which take no slots.

In eval and without gradients `nn.TransformerEncoderLayer` runs as one fused kernel, and
`nn.TransformerEncoder` packs a padded batch into a nested tensor that only these kernels accept
(its padded positions come out as zeros). Both are decided by looking for tensors with overrides,
the encoder looking at its first layer alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from .._torch import is_transformed
from .module_tree import ModuleTree, join


def fused_names(body: ModuleTree, adapted: Collection[str]) -> tuple[str, ...]:
    """The adapted parameters that a fused kernel would read, in the network's order."""
    layers = [module for module in body.modules.values() if isinstance(module, nn.TransformerEncoderLayer)]
    if not layers:
        return ()
    inside = {id(module) for layer in layers for module in layer.modules()}
    wanted = set(adapted)
    return tuple(
        name for name, places in body.places.items() if name in wanted and any(id(module) in inside for module, _ in places)
    )


def runs_fused(body: ModuleTree, tensors: Collection[Tensor]) -> bool:
    """Whether a call under way would take the fused kernels if there were no slots."""
    return not torch.is_grad_enabled() and not body.module.training and not any(map(is_transformed, tensors))


def guards(body: ModuleTree, adapted: Collection[str]) -> list[str]:
    """Parameters that must be slots too, lest an encoder with adapted layers packs its batch for unadapted ones."""
    found: list[str] = []
    for path, module in body.modules.items():
        if not isinstance(module, nn.TransformerEncoder):
            continue
        if not any(f"{name}.".startswith(join(path, "layers.")) for name in adapted):
            continue
        first = join(path, "layers.0.")
        if not any(name.startswith(first) for name in adapted):
            found.extend(name for name in body.places if name.startswith(first))
    return found
