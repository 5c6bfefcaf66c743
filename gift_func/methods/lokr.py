"""LoKr: the change is a Kronecker product."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, field
from math import isqrt, prod
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from ..errors import AdaptError
from ..select import Site
from ..weights import OnBase, Weight
from ..weights.value import add_scaled, autocasts, dense_linear
from .lora import Layout, OnMatrices, OutputDropout, check_dropout, layout_of, matrix_of, rank_axes, uniform
from .method import FrozenMap, check_choice, check_whole, option, settings, settled

Init = Literal["kaiming", "lycoris", "random"]
NO_DROPOUT = OutputDropout()


class Kronecker(OnBase):
    """`W + s·reshape(C ⊗ D)`, or its transpose.

    Args:
        base: W.
        tensors: C as lokr_w1 or its factors, D as lokr_w2, its factors, or a Tucker core between them.
        scale: s.
        transposed: whether W holds the transpose of the product.
        dropout: of the product's rows.
    """

    def __init__(
        self,
        base: Weight,
        tensors: Mapping[str, Tensor],
        scale: float,
        transposed: bool,
        dropout: OutputDropout = NO_DROPOUT,
    ) -> None:
        self.base = base
        self.dropout = dropout
        self.w1, self.w1_a, self.w1_b = (tensors.get(f"lokr_w1{part}") for part in ("", "_a", "_b"))
        self.w2, self.w2_a, self.w2_b = (tensors.get(f"lokr_w2{part}") for part in ("", "_a", "_b"))
        self.t2 = tensors.get("lokr_t2")
        self.scale = scale
        self.transposed = transposed

    def _pair(self) -> tuple[Tensor, Tensor]:
        """s·C `(..., a, c)` and D `(..., b, d)`, a kernel's as `(b, d·k...)`; transposed where their product is."""
        c = _product(self.w1, self.w1_a, self.w1_b, None) * self.scale
        d = _product(self.w2, self.w2_a, self.w2_b, self.t2)
        d = d if d.ndim == c.ndim else d.flatten(1)
        return (c.mT, d.mT) if self.transposed else (c, d)

    def dense(self) -> Tensor:
        left, right = self._pair()
        change = (left[..., :, None, :, None] * right[..., None, :, None, :]).reshape(self.base.shape)
        if self.dropout:
            output = -1 if self.transposed else left.ndim - 2
            rows = self.dropout.factor(change, *left.shape[:-2], self.base.shape[output])
            rows = rows.unsqueeze(-2) if self.transposed else rows.reshape(*rows.shape, *[1] * (change.ndim - rows.ndim))
            change = change * rows
        return add_scaled(self.base.dense(), change, 1.0)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        left, right = self._pair()
        (a, c), (b, d) = left.shape[-2:], right.shape[-2:]
        tokens = x.shape.numel() // x.shape[-1] if x.shape[-1] else 0
        # Through the factors: tokens·b·c·(a + d) products. Through the matrix: to form it, and its gradient in backward.
        through = tokens * b * c * (a + d) < (2 + tokens / 2) * a * b * c * d
        if not through or self.dropout or self.base.shape != torch.Size([a * b, c * d]):
            return super().linear(x, bias)
        thin = x if autocasts(x) else x.to(left.dtype)
        inner = dense_linear(thin.unflatten(-1, (c, d)), right, None)
        change = dense_linear(inner.mT, left, None).mT.flatten(-2)
        return add_scaled(self.base.linear(x, bias), change, 1.0)

    def choose(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        left, right = self._pair()
        b = right.shape[-2]
        if self.dropout or self.ndim != 2 or self.shape != torch.Size([left.shape[-2] * b, left.shape[-1] * right.shape[-1]]):
            return super().choose(pick, padding)
        row = pick(torch.arange(self.shape[0], device=left.device).unsqueeze(-1)).squeeze(-1)
        change = (left[row // b].unsqueeze(-1) * right[row % b].unsqueeze(-2)).flatten(-2)
        if padding is not None:
            change = torch.where(padding.unsqueeze(-1), change.detach(), change)
        return add_scaled(self.base.choose(pick, padding), change, 1.0)

    @property
    def mT(self) -> Weight:  # noqa: N802
        if self._pair()[0].ndim != self.base.ndim:  # a kernel
            return super().mT
        tensors = {f"lokr_{name}": t for name, t in self.__dict__.items() if isinstance(t, Tensor)}
        return Kronecker(self.base.mT, tensors, self.scale, not self.transposed, self.dropout)

    def eval(self) -> Weight:
        made = copy.copy(self)
        made.base, made.dropout = self.base.eval(), NO_DROPOUT
        return made


@settings
class LoKr(OnMatrices):
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
    initialization: Init = option(default="kaiming", alias="init")
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenMap)
    dtype: torch.dtype | None = None
    layout: Layout = settled(default="matrix")

    def __post_init__(self) -> None:
        check_whole(self, "rank")
        check_dropout(self.rank_dropout, "rank_dropout")
        check_dropout(self.module_dropout, "module_dropout")
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise AdaptError(f"decompose_factor is -1 or at least 1, got decompose_factor={self.decompose_factor!r}")
        check_choice("init", self.initialization, get_args(Init))

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def starts_as_base(self) -> bool:
        return self.initialization != "random"

    def at(self, site: Site) -> Self:
        return super().at(site).but(layout=layout_of(site))

    def init(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, r = site.parameter, self.rank
        lead, rows, columns = matrix_of(parameter.shape, self.layout)
        sides = tuple(parameter.shape[2:]) if self.layout == "kernel" else ()
        (a, b), (c, d) = (split(n, self.decompose_factor) for n in (rows, columns // prod(sides)))
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (a, c)}
        if self.decompose_both and r < max(a, c) / 2:
            shapes = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        if r >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *sides)
        elif self.use_effective_conv2d and prod(sides) > 1:
            shapes |= {"lokr_t2": (r, r, *sides, *[1] * (2 - len(sides))), "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        else:
            shapes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * prod(sides))}
        made = {}
        zero = {"kaiming": ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), "random": ()}[self.initialization]
        for name, shape in shapes.items():
            fan_in = prod(shape[1:])
            tensor = uniform(*lead, *shape, fan_in=fan_in, like=parameter, dtype=self.dtype, generator=generator)
            made[name] = tensor.zero_() if name in zero else tensor
        return made

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        dropout = OutputDropout(self.rank_dropout, self.rank_dropout_scale, self.module_dropout)
        return Kronecker(base, tensors, self.scale, self.layout == "transposed", dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        factors = {name: t for name, t in tensors.items() if name.endswith(("_a", "_b"))}
        axes = {name: rank_axes(t, left=name.endswith("_a")) for name, t in factors.items()}
        return axes if "lokr_t2" not in tensors else axes | {"lokr_t2": (0, 1), "lokr_w2_a": (0,), "lokr_w2_b": (0,)}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {"lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a": self.scale}


def _product(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    """A factor as it is, as a product of two, or as a Tucker core between two."""
    if whole is not None:
        return whole
    assert a is not None
    assert b is not None
    return a @ b if core is None else torch.einsum("ij...,jd,ib->bd...", core, b, a)


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of a size, the first `factor` where that divides it, else the nearest to the root that is not above it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    first = next(n for n in range(limit, 0, -1) if size % n == 0)
    return first, size // first
