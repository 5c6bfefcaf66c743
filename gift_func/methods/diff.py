"""Diff: a change of a parameter's own size beside the frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..select import Site
from ..weights import Delta, Weight
from .weight_method import WeightMethod


@dataclass(frozen=True)
class Diff(WeightMethod):
    """`W' = W + s·D` with D of W's shape, starting at zero.

    What `Full` is, seen from the base: the change is held, not the result. So changes of several adapters can be added
    and scaled, and the change can be held in a wider type than a half-precision weight, whose rounding would swallow it.

    Shapes: diff, that of the parameter.

    Args:
        scale: s.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), {"bias": gf.Diff()})
        >>> list(adapted.adapter)
        ['bias.diff']

    References:
        The `diff` and `diff_b` of LyCORIS' files; the bias of PEFT's `lora_bias`.
    """

    scale: float = 1.0

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"diff": torch.zeros_like(site.parameter)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return Delta(base, tensors["diff"], self.scale)
