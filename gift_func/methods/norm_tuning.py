"""Norm tuning: the scales and shifts of norm layers are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..select import Site
from .full import Full

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
NAMES = ("LayerNorm", "RMSNorm")


@dataclass(frozen=True)
class NormTuning(Full):
    """`γ' = θ, β' = φ` for the scale γ and shift β of every norm layer, trained copies that start at their values.

    Each feature is rescaled and shifted between blocks that stay as they are, which steers them with very few numbers.
    Its usual sites are the parameters of LayerNorm, RMSNorm, GroupNorm, BatchNorm and InstanceNorm layers, and of classes
    with a base or name that ends in LayerNorm or RMSNorm, as those of transformers do.

    Shapes: the adapter holds each parameter under its own dotted name and with its shape.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> list(gf.adapt(model, gf.NormTuning()).adapter)
        ['1.weight', '1.bias']

    References:
        Zhao et al., Tuning LayerNorm in Attention, 2023 (arXiv:2312.11420); its base layers also get trained heads, which
        are a rule of their own here.
    """

    def is_default_site(self, site: Site) -> bool:
        return is_norm(site.module) and self.why_not(site) is None


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm layer: by its class, or by the name of one of its classes."""
    return isinstance(module, NORMS) or any(kind.__name__.endswith(NAMES) for kind in type(module).__mro__)
