"""Methods of LyCORIS's files that no paper describes: decomposed changes, and variants of IA3 and LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from math import prod

import torch
from torch import Tensor, nn

from ...errors import AdaptError
from ...methods import IA3, LoHa, LoKr, LoRA, WeightMethod
from ...select import Site
from ...weights import Dense, OnBase, Weight
from ...weights.value import Side


class WeightNormed(OnBase):
    """`m ⊙ V/‖V‖`, with a norm and an m for each output of a layer, or for each of its inputs.

    Args:
        base: V, `(out, in, k...)`.
        magnitude: m, `(out, 1, ...)` or `(1, in, 1, ...)`.
        side: which of them.
    """

    def __init__(self, base: Weight, magnitude: Tensor, side: Side) -> None:
        self.base = base
        self.magnitude = magnitude
        self.side = side

    def norm(self) -> Tensor:
        """‖V‖, of the magnitude's shape."""
        v = self.base.dense()
        own = 0 if self.side == "output" else 1
        over = [axis for axis in range(v.ndim) if axis != own]
        found: Tensor = torch.linalg.vector_norm(v, dim=over, keepdim=True, dtype=torch.promote_types(v.dtype, torch.float32))
        return found

    def dense(self) -> Tensor:
        norm = self.norm()
        gain = self.magnitude / torch.where(norm > 0, norm, 1)  # rows of zeros stay zero, where 0/0 would be NaN
        return (self.base.dense() * gain).to(self.dtype)


@dataclass(frozen=True)
class Decomposed(WeightMethod):
    """`W' = m ⊙ V/‖V‖` for the V that another method makes of W: what DoRA is to LoRA, for LoHa and LoKr as well.

    m starts at ‖V‖, and the gradient flows through the norm, as in LyCORIS (`dora_wd`), which adds a machine epsilon to
    ‖V‖. LoRA on the output side is `gf.DoRA(detach_norm=False)`, which never forms V.

    Shapes: those of the other method, and dora_scale: `(out, 1, ...)` on the output side, `(1, in/groups, 1, ...)` on the
    input side.

    Args:
        of: a `LoRA`, `LoHa` or `LoKr` without dropout.
        side: what has a magnitude: an output, or an input (`wd_on_output=False`).

    Raises:
        AdaptError: for another method, dropout, or an unknown side.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), gf.interop.kohya.Decomposed(gf.LoRA(rank=1), side="input"))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'lora_B': (2, 1), 'lora_A': (1, 4), 'dora_scale': (1, 4)}

    References:
        Liu et al., DoRA, 2024 (arXiv:2402.09353), whose norms are on the input side of W stored `(out, in)`; Yeh et al.,
        LyCORIS, 2023 (arXiv:2309.14859).
    """

    of: WeightMethod
    _: KW_ONLY
    side: Side = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.of, Mapping):
            object.__setattr__(self, "of", WeightMethod.from_dict(self.of))
        of = self.of
        if not isinstance(of, (LoRA, LoHa, LoKr)) or type(of) not in (LoRA, LoHa, LoKr, GivenLoKr):
            raise AdaptError(f"Decomposed is of a LoRA, LoHa or LoKr, got of={of}")
        drops = ("dropout", "rank_dropout", "module_dropout")
        if any(getattr(of, name, 0.0) for name in drops) or of.init.startswith(("pissa", "olora")):
            raise AdaptError(f"Decomposed is of a method without dropout that starts at no part of W, got of={of}")

    def __str__(self) -> str:
        return f"Decomposed({self.of})" if self.side == "output" else f"Decomposed({self.of}, side={self.side!r})"

    @property
    def starts_as_base(self) -> bool:
        return self.of.starts_as_base

    def is_default_site(self, site: Site) -> bool:
        return self.of.is_default_site(site) and self.why_not(site) is None

    def why_not(self, site: Site) -> str | None:
        if not is_host(site.module) or site.param_name != "weight":
            return "the weight of a Linear, Conv1d, Conv2d or Conv3d"
        return self.of.why_not(site)

    def computed_weight_name(self, module: nn.Module) -> str | None:
        return self.of.computed_weight_name(module)

    def for_site(self, site: Site) -> Decomposed:
        return self.replace(of=self.of.for_site(site))

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        tensors = self.of.init_tensors(site, generator)
        dtype = next(iter(tensors.values())).dtype
        v = self.of.weight(Dense(site.parameter.detach()), tensors)
        return {**tensors, "dora_scale": WeightNormed(v, tensors[next(iter(tensors))], self.side).norm().to(dtype)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return WeightNormed(self.of.weight(base, tensors), tensors["dora_scale"], self.side)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return self.of.rank_axes({name: tensor for name, tensor in tensors.items() if name != "dora_scale"})

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return self.of.scaled_tensors({name: tensor for name, tensor in tensors.items() if name != "dora_scale"})


@dataclass(frozen=True)
class WeightIA3(IA3):
    """`W' = diag(l)·W`, or `W·diag(l)`: IA3 that leaves the bias as it is, as LyCORIS's does.

    The paper and `gf.IA3` scale a layer's whole output, bias included.

    Example:
        >>> import torch, gift_func as gf
        >>> list(gf.adapt(torch.nn.Linear(4, 2), gf.interop.kohya.WeightIA3()).adapter)
        ['ia3_l']
    """

    def companions(self, site: Site) -> dict[str, WeightMethod]:
        return {}


@dataclass(frozen=True)
class GivenLoKr(LoKr):
    """`gf.LoKr` with the sizes of C given, where no `decompose_factor` leads to them (`unbalanced_factorization`).

    Args:
        rank: and all others as in `gf.LoKr`; `decompose_both` and `use_effective_conv2d` say how C and D are written.
        first: the rows and columns of C.
        full: whether D is written whole.

    Raises:
        AdaptError: as `gf.LoKr`.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(6, 8), gf.interop.kohya.GivenLoKr(rank=1, first=(4, 2)))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'lokr_w1': (4, 2), 'lokr_w2_a': (2, 1), 'lokr_w2_b': (1, 3)}
    """

    _: KW_ONLY
    first: tuple[int, int] = (1, 1)
    full: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "first", tuple(self.first))

    def why_not(self, site: Site) -> str | None:
        sides, hosted = site.parameter.shape[:2], is_host(site.module) and site.param_name == "weight"
        if hosted and not any(size % first for size, first in zip(sides, self.first, strict=True)):
            return super().why_not(site)
        return f"the weight of a Linear or Conv1d, Conv2d, Conv3d whose sides are multiples of {self.first}"

    def shapes(self, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        r, (a, c), sides = self.rank, self.first, tuple(parameter.shape[2:])
        b, d = parameter.shape[0] // a, parameter.shape[1] // c
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (a, c)}
        if self.decompose_both:
            shapes = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        if self.full:
            return {**shapes, "lokr_w2": (b, d, *sides)}
        if self.use_effective_conv2d:
            return {**shapes, "lokr_t2": (r, r, *sides), "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        return {**shapes, "lokr_w2_a": (b, r), "lokr_w2_b": (r, d * prod(sides))}


def is_host(module: nn.Module) -> bool:
    """Whether LyCORIS adapts the weight of such a module."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
