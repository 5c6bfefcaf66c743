"""IA3: features are amplified or inhibited, one learned factor each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..select import Site
from ..weights import Reshaped, Scaled, Weight
from .matrix import MatrixMethod, matrix_shape, on_matrix
from .weight_method import WeightMethod


@dataclass(frozen=True)
class IA3(MatrixMethod):
    """`W' = diag(l)·W`, or `W' = W·diag(l)` on the input side: every feature gets a learned factor.

    The paper scales what keys, values and the inner activations of the feed-forward layers compute. The first two are
    outputs of a layer, and the last is the input of the next one: `{"*.k": IA3(), "*.v": IA3(), "*.wo": IA3(side="input")}`.
    l starts at one.

    The factor of an output holds for the whole output, `y = l ⊙ (W·x + b)`, as in the paper and in PEFT: the bias of the
    module is scaled along with its weight, by the same tensor.

    Shapes: ia3_l `(1, in)` on the input side and `(out, 1)` on the output side of a matrix, `(1, channels, 1, ...)` of a
    convolution; a stack of matrices has its leading dimensions before these. An embedding's output is the embedding.

    Args:
        side: `"output"` or `"input"` (PEFT's `feedforward_modules`).

    Raises:
        AdaptError: for an unknown side.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 2, bias=False))
        >>> adapted = gf.adapt(model, {"0": gf.IA3(), "1": gf.IA3(side="input")})
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'0.ia3_l': (8, 1), '1.ia3_l': (1, 8)}

    References:
        Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022
        (arXiv:2205.05638).
    """

    side: Literal["output", "input"] = "output"

    def why_not(self, site: Site) -> str | None:
        module = site.module
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            return "a weight with one row for each output channel"
        packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None
        if packed and self.side == "output" and site.param_name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return "side='input', or a bias of its own to be scaled along with it"
        return super().why_not(site)

    def companions(self, site: Site) -> dict[str, WeightMethod]:
        bias = site.param_name.replace("weight", "bias")
        return {bias: ScaledBias()} if self.side == "output" and bias != site.param_name else {}

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter = site.parameter
        *lead, rows, columns = matrix_shape(parameter.shape, self.view)
        shape = [*lead, rows, 1] if self.side == "output" else [*lead, 1, columns]
        if isinstance(site.module, nn.modules.conv._ConvNd):
            features = rows if self.side == "output" else parameter.shape[1] * site.module.groups
            shape = [1, features, *[1] * (parameter.ndim - 2)]
        return {"ia3_l": torch.ones(shape, dtype=parameter.dtype, device=parameter.device)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        factor = tensors["ia3_l"]
        if self.view == "kernel":
            if self.side == "output":
                return Scaled(base, factor.transpose(0, 1), self.side)
            # A group of filters sees its own share of the channels.
            groups = factor.shape[1] // base.shape[1]
            grouped = torch.Size([groups, base.shape[0] // groups, *base.shape[1:]])
            share = rearrange(factor, "one (g c) ... -> g one c ...", g=groups)
            return Reshaped(Scaled(Reshaped(base, grouped), share, self.side), base.shape)
        return on_matrix(base, self.view, lambda matrix: Scaled(matrix, factor, self.side))


@dataclass(frozen=True)
class ScaledBias(WeightMethod):
    """`b' = l ⊙ b`: the bias of a layer whose output `IA3` scales, by the same tensor."""

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        factor = tensors["ia3_l"]
        return Scaled(base, factor.reshape(base.shape), "output", source=factor)
