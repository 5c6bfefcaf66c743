"""LoKr: the change is a Kronecker product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import isqrt, prod
from typing import Literal

import torch
from torch import Tensor

from ..errors import AdaptError
from ..select import Site
from ..weights import Kronecker, OutputDropout, Weight
from .factored import LowRankMethod, uniform
from .layout import rank_axes
from .matrix import matrix_shape
from .options import FrozenMap


@dataclass(frozen=True)
class LoKr(LowRankMethod):
    """`W' = W + s·(C ⊗ D)` with `s = alpha / rank`: a change made of copies of one small matrix, each scaled.

    `out = a·b` and `in = c·d` are split; C is `(a, c)`, D is `(b, d)` and of rank r where that saves something. The rank
    of the product is the product of the ranks, so that few numbers reach a full rank.

    Shapes, of the one or the other kind:

    | tensor | when | shape |
    |---|---|---|
    | lokr_w1 | as a rule | `(a, c)` |
    | lokr_w1_a, lokr_w1_b | `decompose_both` and `r < max(a, c)/2` | `(a, r)`, `(r, c)` |
    | lokr_w2 | `r >= max(b, d)/2` | `(b, d, k...)` |
    | lokr_w2_a, lokr_w2_b | else | `(b, r)`, `(r, d·k...)` |
    | lokr_t2, lokr_w2_a, lokr_w2_b | else, a kernel with `use_effective_conv2d` | `(r, r, k...)`, `(r, b)`, `(r, d)` |

    Stacks of matrices lead with their dimensions; transformers' Conv1D counts as `(out, in)`; a Conv1d's core is
    `(r, r, k, 1)`, as in PEFT.

    Args:
        rank: r.
        alpha: the numerator of s; None means alpha = rank, hence s = 1.
        decompose_both: let C be of rank r, too.
        decompose_factor: a and c are this where it divides, else the largest divisor up to it and to the square root;
            -1 for no limit but the root.
        use_effective_conv2d: give D the Tucker form for kernels wider than one element.
        rank_dropout: probability of leaving the change of an output out, in training.
        rank_dropout_scale: scale the outputs that stay up by as much.
        module_dropout: probability of leaving out the whole change of a place, in training.
        init: `"kaiming"` (C zero) and `"lycoris"` (D zero) start as the base; `"random"` does not.
        rank_pattern: rank by module name, as in `LoRA`.
        alpha_pattern: the same for alpha.
        dtype: element type of the tensors; None means that of the parameter.

    Raises:
        AdaptError: for a rank below 1, a dropout outside [0, 1), a factor that is neither -1 nor at least 1, an unknown init.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(32, 64), gf.LoKr(rank=2))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'lokr_w1': (8, 4), 'lokr_w2_a': (8, 2), 'lokr_w2_b': (2, 8)}

    References:
        Yeh et al., LyCORIS, 2023 (arXiv:2309.14859). Where neither C nor D is decomposed LyCORIS takes s = 1; here and in
        PEFT it is alpha / rank throughout.
    """

    rank: int = 8
    _: KW_ONLY
    alpha: float | None = None
    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0
    init: Literal["kaiming", "lycoris", "random"] = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenMap)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise AdaptError(f"decompose_factor is -1 or at least 1, got decompose_factor={self.decompose_factor!r}")

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        lead = matrix_shape(site.parameter.shape, self.layout)[:-2]
        zero = {"kaiming": ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), "random": ()}[self.init]
        made = {}
        for name, shape in self.shapes(site.parameter).items():
            tensor = uniform(self.empty(site.parameter, *lead, *shape), prod(shape[1:]), generator)
            made[name] = tensor.zero_() if name in zero else tensor
        return made

    def shapes(self, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        """The shapes of a parameter's tensors; in a stack of matrices, of each of them."""
        rows, columns = matrix_shape(parameter.shape, self.layout)[-2:]
        sides, r = tuple(parameter.shape[2:]) if self.layout == "kernel" else (), self.rank
        (a, b), (c, d) = (two_divisors(n, self.decompose_factor) for n in (rows, columns // prod(sides)))
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (a, c)}
        if self.decompose_both and r < max(a, c) / 2:
            shapes = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        if r >= max(b, d) / 2:
            return {**shapes, "lokr_w2": (b, d, *sides)}
        if self.use_effective_conv2d and prod(sides) > 1:
            core = (r, r, *sides, *[1] * (2 - len(sides)))
            return {**shapes, "lokr_t2": core, "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        return {**shapes, "lokr_w2_a": (b, r), "lokr_w2_b": (r, d * prod(sides))}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        dropout = OutputDropout(self.rank_dropout, self.rank_dropout_scale, self.module_dropout)
        return Kronecker(base, tensors, self.scale, self.layout == "transposed", dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        factors = {name: t for name, t in tensors.items() if name.endswith(("_a", "_b"))}
        axes = {name: rank_axes(t, left=name.endswith("_a")) for name, t in factors.items()}
        return axes if "lokr_t2" not in tensors else axes | {"lokr_t2": (0, 1), "lokr_w2_a": (0,), "lokr_w2_b": (0,)}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a": self.scale}


def two_divisors(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of a size, the first `factor` where that divides it, else the nearest to the root that is not above it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    first = next(n for n in range(limit, 0, -1) if size % n == 0)
    return first, size // first
