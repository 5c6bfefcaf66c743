"""LoRA of a grouped convolution as PEFT has it: the thin convolution sees every channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..select import Site
from ..weights import Mixing, Weight
from .factored import uniform
from .lora import LoRA
from .matrix import CONVOLUTIONS


@dataclass(frozen=True)
class MixingLoRA(LoRA):
    """`y = W ∗ x + s·B ∗ (A ∗ x)` beside a grouped W, with A over all channels of x and B grouped.

    The groups of the convolution meet in A, so the change is none of the weight, which has no entries between groups: it
    cannot be merged. With one group it is `LoRA`. It is here because PEFT's files of grouped convolutions mean this.

    Shapes, for g groups: lora_A `(r, in, k, ...)`, lora_B `(out, r/g, 1, ...)`; r is a multiple of g.

    Args:
        rank, alpha, rslora, dropout, rank_pattern, alpha_pattern, dtype: as in `LoRA`.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Conv1d(4, 6, 3, groups=2), gf.MixingLoRA(rank=2))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'lora_B': (6, 1, 1), 'lora_A': (2, 4, 3)}

    References:
        PEFT's LoRA for convolutions. There A knows no dilation and no padding mode; here it has the convolution's.
    """

    def is_default_site(self, site: Site) -> bool:
        return isinstance(site.module, CONVOLUTIONS) and site.param_name == "weight" and self.why_not(site) is None

    def why_not(self, site: Site) -> str | None:
        if not isinstance(site.module, CONVOLUTIONS) or site.param_name != "weight":
            return "the weight of a Conv1d, Conv2d or Conv3d"
        if self.for_site(site).rank % site.module.groups:
            return f"a rank that is a multiple of its {site.module.groups} groups"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, module = site.parameter, site.module
        assert isinstance(module, nn.modules.conv._ConvNd)
        out, within, *kernel = parameter.shape
        a = self.empty(parameter, self.rank, within * module.groups, *kernel)
        b = self.empty(parameter, out, self.rank // module.groups, *[1] * len(kernel))
        return {"lora_B": b.zero_(), "lora_A": uniform(a, prod(a.shape[1:]), generator)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return Mixing(base, tensors["lora_B"], tensors["lora_A"], self.scale, self.dropout)
