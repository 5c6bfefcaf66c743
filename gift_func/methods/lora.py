"""LoRA: low-rank adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AdaptError
from ..select import Site
from ..weights import LowRank, LowRankFromStart, Weight
from .factored import LowRankMethod
from .full import Full
from .layout import ConvLayout, factors_of, rank_axes
from .lora_init import RESIDUAL, first_factors, initialisation
from .options import FrozenMap
from .weight_method import WeightMethod, by_shape


@dataclass(frozen=True)
class LoRA(LowRankMethod):
    """`W' = W + s·B·A` with `s = alpha / rank`: a change of low rank beside the frozen weight.

    The change that training makes to a large weight has a low intrinsic rank, so two thin factors carry it. B starts at
    zero, so an adapted network starts as the base.

    Shapes (`r` = rank, `k` = the kernel's sizes), by what the parameter is:

    | parameter | W | lora_A | lora_B |
    |---|---|---|---|
    | Linear, Embedding, any matrix | `(out, in)` | `(r, in)` | `(out, r)` |
    | transformers' Conv1D | `(in, out)` | `(r, in)` | `(out, r)` |
    | convolution, `conv="kernel"` | `(out, in/groups, k, ...)` | `(r, in/groups, k, ...)` | `(out, r, 1, ...)` |
    | convolution, `conv="balanced"` | `(out, in/groups, k, ...)` | `(r, in/groups·k...)` | `(out·k, r)` |
    | a stack of matrices (experts) | `(E, out, in)` | `(E, r, in)` | `(E, out, r)` |

    Args:
        rank: r, at least 1.
        alpha: the numerator of s; None means alpha = rank, hence s = 1.
        rslora: use `s = alpha / sqrt(rank)`.
        dropout: probability of dropping an input feature on its way into the change, in training only. It acts in linear
            layers, products, convolutions and nn.MultiheadAttention; looking up an embedding has no features to drop,
            and an operation that reads the weight as a whole (an RNN's, say) refuses it.
        init: `"kaiming"` (A uniform in ±1/sqrt(fan_in), B zero), `"gaussian"` (A normal with deviation 1/rank, B zero),
            `"orthogonal"` (neither zero, their product zero; even rank), `"random"` (both uniform: not the identity);
            and the residual ones, which start at parts B₀, A₀ of W itself and change it by `s·(B·A − B₀·A₀)`, so that the
            base stays as it is: `"pissa"` (the first `rank` singular directions, each factor with the root of σ/s),
            `"pissa_niter_16"` (the same by a randomised decomposition of so many iterations), `"olora"` (the first
            `rank` columns of Q and rows of R, W = Q·R). B₀, A₀ are kept frozen as `lora_B0`, `lora_A0`; what of the
            rank W has no directions for starts as `"kaiming"` does.
        train_bias: also train the bias of every adapted module.
        rank_pattern: rank of the sites whose module name ends in what a key (a regular expression) matches; first hit.
        alpha_pattern: the same for alpha.
        conv: how a kernel is seen as a matrix. `"kernel"`: a k×k convolution into r channels, then a 1×1, as PEFT and
            LyCORIS factor it. `"balanced"`: rows `out·k₀`, columns `in/groups·k₁·...` of W's memory (Conv1d: rows
            `out`, columns `in/groups·k₀`), as GIFt does.
        dtype: element type of the adapter's tensors; None means that of the parameter.

    Raises:
        AdaptError: for a rank below 1, a dropout outside [0, 1), an unknown init or conv, an odd rank with orthogonal.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> adapted = gf.adapt(model, gf.LoRA(rank=2))
        >>> list(adapted.adapter)
        ['0.lora_B', '0.lora_A', '2.lora_B', '2.lora_A']

    References:
        Hu et al., LoRA, 2021 (arXiv:2106.09685); Kalajdzievski, rsLoRA, 2023 (arXiv:2312.03732); Meng et al., PiSSA,
        2024 (arXiv:2404.02948); Büyükakyüz, OLoRA, 2024 (arXiv:2406.01775). The two papers write the residual
        W − s·B₀·A₀ into the base; here dropout, if any, acts on what meets the whole change.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"lora_A0", "lora_B0"})

    rank: int = 8
    _: KW_ONLY
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    train_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenMap)
    conv: ConvLayout = "kernel"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in (self.rank, *self.rank_pattern.values()):
            if self.init == "orthogonal" and value % 2:
                raise AdaptError(f"init='orthogonal' splits the rank in two halves and needs an even one, got rank={value}")
        initialisation(self.init)

    @property
    def scale(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) with `rslora`."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (sqrt(self.rank) if self.rslora else self.rank)

    def companions(self, site: Site) -> dict[str, WeightMethod]:
        bias = site.param_name.replace("weight", "bias")
        return {bias: Full()} if self.train_bias and bias != site.param_name else {}

    @by_shape
    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        b, a = first_factors(self, site.parameter, generator)
        start = {"lora_B0": b.clone(), "lora_A0": a.clone()} if self.init.startswith(RESIDUAL) else {}
        return {"lora_B": b, "lora_A": a, **start}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        left, right = factors_of(tensors["lora_B"], tensors["lora_A"], self.layout)
        if "lora_A0" not in tensors:
            return LowRank(base, left, right, self.scale, self.dropout)
        start = factors_of(tensors["lora_B0"], tensors["lora_A0"], self.layout)
        return LowRankFromStart(base, (left, right), start, self.scale, self.dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        a, b = tensors["lora_A"], tensors["lora_B"]
        if self.layout == "kernel" and a.shape[0] != b.shape[1]:
            return {}  # every group has its own share of the rank: zeros at the end would shift the shares
        kernel = self.layout == "kernel"
        factors = {name: t for name, t in tensors.items() if name.startswith(("lora_A", "lora_B"))}
        return {name: rank_axes(t, left=name.startswith("lora_B"), kernel=kernel) for name, t in factors.items()}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: self.scale for name in tensors if name.startswith("lora_B")}
