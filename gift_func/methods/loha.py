"""LoHa: the change is the elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from ..select import Site
from ..weights import Hadamard, OutputDropout, Weight
from .factored import LowRankMethod, uniform
from .layout import rank_axes
from .matrix import matrix_shape
from .options import FrozenMap


@dataclass(frozen=True)
class LoHa(LowRankMethod):
    """`W' = W + s·(A₁·B₁) ⊙ (A₂·B₂)` with `s = alpha / rank`: a Hadamard product of two low-rank changes.

    Its rank reaches r², where LoRA's with as many parameters reaches 2r. B₂ starts at zero.

    Shapes (a kernel is the matrix `(out, in/groups·k...)` unless `use_effective_conv2d`; stacks of matrices lead with
    their dimensions; transformers' Conv1D, stored `(in, out)`, counts as `(out, in)`):

    | tensor | matrix | kernel with cores |
    |---|---|---|
    | hada_w1_a, hada_w2_a | `(out, r)` | `(r, out)` |
    | hada_w1_b, hada_w2_b | `(r, in)` | `(r, in/groups)` |
    | hada_t1, hada_t2 | none | `(r, r, k...)`, of a Conv1d `(r, r, k, 1)` as in PEFT |

    Args:
        rank: r.
        alpha: the numerator of s; None means alpha = rank, hence s = 1.
        use_effective_conv2d: give a kernel wider than one element a Tucker form: each factor is a core that A and B
            multiply on its two sides of channels.
        rank_dropout: probability of leaving the change of an output out, in training; the others are scaled up by as much.
        module_dropout: probability of leaving out the whole change of a place, in training.
        init: `"kaiming"` (uniform in ±1/sqrt(fan in)) and `"normal"` (LyCORIS's) start as the base; `"random"` does not.
        rank_pattern: rank by module name, as in `LoRA`.
        alpha_pattern: the same for alpha.
        dtype: element type of the tensors; None means that of the parameter.

    Raises:
        AdaptError: for a rank below 1, a dropout outside [0, 1), or an unknown init.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 3), gf.LoHa(rank=2))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'hada_w1_a': (3, 2), 'hada_w1_b': (2, 4), 'hada_w2_a': (3, 2), 'hada_w2_b': (2, 4)}

    References:
        Hyeon-Woo et al., FedPara, 2021 (arXiv:2108.06098), whose tanh around the factors is left out, as in
        Yeh et al., LyCORIS, 2023 (arXiv:2309.14859).
    """

    rank: int = 8
    _: KW_ONLY
    alpha: float | None = None
    use_effective_conv2d: bool = False
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init: Literal["kaiming", "normal", "random"] = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenMap)
    dtype: torch.dtype | None = None

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, r = site.parameter, self.rank
        *lead, rows, columns = matrix_shape(parameter.shape, self.layout)
        tucker = self.use_effective_conv2d and self.layout == "kernel" and prod(parameter.shape[2:]) > 1
        shapes = {"a": (*lead, rows, r), "b": (*lead, r, columns)}
        if tucker:
            sides = tuple(parameter.shape[2:]) if parameter.ndim > 3 else (parameter.shape[2], 1)
            shapes = {"a": (r, rows), "b": (r, parameter.shape[1]), "t": (r, r, *sides)}
        made = {}
        for i in (1, 2):
            for part, shape in shapes.items():
                fan_in = prod(shape[1:]) if part == "t" else shape[-1]
                tensor = uniform(self.empty(parameter, *shape), fan_in, generator)
                if self.init == "normal":
                    tensor.normal_(std=1.0 if part == "b" else 0.1, generator=generator)
                made[f"hada_t{i}" if part == "t" else f"hada_w{i}_{part}"] = tensor
        if self.starts_as_base:
            made["hada_w2_b" if self.init == "kaiming" else "hada_w1_a"].zero_()
        return made

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        tensors = {name.removeprefix("hada_"): tensor for name, tensor in tensors.items()}
        if "t1" in tensors:
            tensors |= {"w1_a": tensors["w1_a"].mT, "w2_a": tensors["w2_a"].mT}
        dropout = OutputDropout(self.rank_dropout, rescale=True, whole=self.module_dropout)
        return Hadamard(base, tensors, self.scale, self.layout == "transposed", dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        hada = {name: t for name, t in tensors.items() if name.startswith("hada_")}
        if "hada_t1" in hada:
            return {name: (0, 1) if name.startswith("hada_t") else (0,) for name in hada}
        return {name: rank_axes(t, left=name.endswith("_a")) for name, t in hada.items()}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"hada_w1_a": self.scale}
