"""Full: the parameter itself is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..select import Site
from ..weights import Dense, Weight
from .weight_method import WeightMethod


@dataclass(frozen=True)
class Full(WeightMethod):
    """`W' = θ`, a trained copy of the parameter, starting at its value.

    The adapter holds θ under the parameter's own dotted name and with its shape: `"layers.0.bias"`.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), {"bias": gf.Full()})
        >>> list(adapted.adapter)
        ['bias']
    """

    def why_not(self, site: Site) -> str | None:
        return None if site.parameter.dtype.is_complex else super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"": site.parameter.detach().clone()}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return Dense(tensors[""])
