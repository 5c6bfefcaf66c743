"""LoRA: low-rank adaptation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import prod, sqrt
from typing import ClassVar, Literal, Self, TypeVar, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AdaptError
from ..select import Site
from ..weights import LowRank, Residual, Weight
from .full import Full
from .method import FrozenMap, Method, check_choice, check_whole, is_a, is_computed, option, settings, settled

Init = Literal["kaiming", "gaussian", "orthogonal", "random", "pissa", "olora"]
Conv = Literal["kernel", "balanced"]
Layout = Literal["matrix", "transposed", "stacked", "kernel", "balanced"]
Value = TypeVar("Value")

HF_CONV1D = "transformers.pytorch_utils.Conv1D"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class OnMatrices(Method):
    """A method for whatever can be seen as a matrix, which has LoRA's usual sites."""

    def takes(self, site: Site) -> bool:
        if isinstance(site.module, nn.MultiheadAttention):
            return site.param_name in PACKED
        layer = isinstance(site.module, (nn.Linear, *CONVOLUTIONS)) or is_a(site.module, HF_CONV1D)
        return layer and site.param_name == "weight"

    def refuses(self, site: Site) -> str | None:
        if site.parameter.ndim < 2:
            return "a parameter of at least 2 dimensions, to be written as a product of two factors"
        return super().refuses(site)

    def overlooks(self, module: nn.Module) -> str | None:
        layer = isinstance(module, (nn.Linear, *CONVOLUTIONS))
        return "weight" if layer and is_computed(module, "weight") else None


@settings
class LoRA(OnMatrices):
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
    initialization: str = option(default="kaiming", alias="init")
    train_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenMap)
    conv: Conv = "kernel"
    dtype: torch.dtype | None = None
    layout: Layout = settled(default="matrix")

    def __post_init__(self) -> None:
        check_whole(self, "rank")
        for value in (self.rank, *self.rank_pattern.values()):
            if self.initialization == "orthogonal" and value % 2:
                raise AdaptError(f"init='orthogonal' splits the rank in two halves and needs an even one, got rank={value}")
        check_dropout(self.dropout)
        if not re.fullmatch(r"pissa_niter_\d+", str(self.initialization)):
            check_choice("init", self.initialization, (*get_args(Init), "pissa_niter_<iterations>"))
        check_choice("conv", self.conv, get_args(Conv))

    @property
    def scale(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) with `rslora`."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def starts_as_base(self) -> bool:
        return self.initialization != "random"

    def refuses(self, site: Site) -> str | None:
        return super().refuses(site) or refuses_dropout(self.dropout, site)

    def at(self, site: Site) -> Self:
        return super().at(site).but(layout=layout_of(site, self.conv))

    def companions(self, site: Site) -> dict[str, Method]:
        bias = site.param_name.replace("weight", "bias")
        return {bias: Full()} if self.train_bias and bias != site.param_name else {}

    def init(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, rank = site.parameter, self.rank
        lead, rows, columns = matrix_of(parameter.shape, self.layout)
        dtype = self.dtype or parameter.dtype
        a = torch.empty(*lead, rank, columns, dtype=dtype, device=parameter.device)
        b = torch.zeros(*lead, rows, rank, dtype=dtype, device=parameter.device)
        if self.initialization == "gaussian":
            a.normal_(std=1 / rank, generator=generator)
        elif self.initialization == "orthogonal":
            wide = dtype if dtype == torch.float64 else torch.float32
            mix = torch.empty(rank, rank, dtype=wide, device=parameter.device).normal_(generator=generator)
            q = torch.linalg.qr(mix).Q.to(dtype) / 10
            half = torch.empty(*lead, rank // 2, columns, dtype=dtype, device=parameter.device)
            a = q[0::2].mT @ half.normal_(generator=generator)
            half = torch.empty(*lead, rows, rank // 2, dtype=dtype, device=parameter.device)
            b = half.normal_(generator=generator) @ q[1::2]
        else:
            a.uniform_(-1, 1, generator=generator).div_(sqrt(max(columns, 1)))
            if self.initialization == "random":
                b.uniform_(-1, 1, generator=generator).div_(sqrt(rank))
        tensors = {"lora_B": b, "lora_A": a}
        if self.initialization.startswith(("pissa", "olora")):
            right, left = self._parts_of(as_matrix(parameter, self.layout), generator)
            found = right.shape[-2]
            tensors["lora_A"] = torch.cat([right.to(dtype), a[..., found:, :]], dim=-2)
            tensors["lora_B"] = torch.cat([left.to(dtype), b[..., found:]], dim=-1)
            tensors |= {"lora_B0": tensors["lora_B"].clone(), "lora_A0": tensors["lora_A"].clone()}
        if self.layout == "kernel":
            for name, tensor in tensors.items():
                after = parameter.shape[1:] if name.startswith("lora_A") else [rank, *[1] * (parameter.ndim - 2)]
                tensors[name] = tensor.reshape(tensor.shape[0], *after)
        return tensors

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        left, right = factors_of(tensors["lora_B"], tensors["lora_A"], self.layout)
        if "lora_A0" not in tensors:
            return LowRank(base, left, right, self.scale, self.dropout)
        start = factors_of(tensors["lora_B0"], tensors["lora_A0"], self.layout)
        return Residual(base, (left, right), start, self.scale, self.dropout)

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        a, b = tensors["lora_A"], tensors["lora_B"]
        if self.layout == "kernel" and a.shape[0] != b.shape[1]:
            return {}  # every group has its own share of the rank: zeros at the end would shift the shares
        kernel = self.layout == "kernel"
        factors = {name: t for name, t in tensors.items() if name.startswith(("lora_A", "lora_B"))}
        return {name: rank_axes(t, left=name.startswith("lora_B"), kernel=kernel) for name, t in factors.items()}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: self.scale for name in tensors if name.startswith("lora_B")}

    def _parts_of(self, matrix: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A₀ and B₀: the part of W that a residual initialisation starts at, of at most `rank` directions."""
        matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        rank = min(self.rank, *matrix.shape[-2:])
        if self.initialization == "olora":
            q, r = torch.linalg.qr(matrix)
            return r[..., :rank, :], q[..., :rank]
        basis = None
        if self.initialization != "pissa":  # Halko et al., 2011: an orthonormal basis of the range, by power iterations
            mixed = torch.empty(*matrix.shape[:-2], matrix.shape[-1], rank, dtype=matrix.dtype, device=matrix.device)
            basis = torch.linalg.qr(matrix @ mixed.normal_(generator=generator)).Q
            for _ in range(int(self.initialization.removeprefix("pissa_niter_"))):
                basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
        u, sigma, vh = torch.linalg.svd(matrix if basis is None else basis.mT @ matrix, full_matrices=False)
        root = (sigma[..., :rank] / self.scale).sqrt()
        u = u if basis is None else basis @ u
        return root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)


def check_dropout(dropout: float, name: str = "dropout") -> None:
    """Refuse a dropout that is no probability."""
    if not 0.0 <= dropout < 1.0:
        raise AdaptError(f"{name} is a probability in [0, 1), got {name}={dropout!r}")


@dataclass(frozen=True)
class OutputDropout:
    """Dropout of a change's outputs, and of the whole of it, as LyCORIS and PEFT have it.

    Attributes:
        rows: probability of leaving the change of an output out.
        rescale: divide those that stay by their share.
        whole: probability of leaving all of it out.
    """

    rows: float = 0.0
    rescale: bool = False
    whole: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.rows or self.whole)

    def factor(self, like: Tensor, *shape: int) -> Tensor:
        """What the outputs' changes are multiplied by, drawn anew."""
        kept = (F.dropout(like.new_ones(shape), self.rows) > 0).to(like.dtype)
        if self.rescale:
            kept = kept / kept.mean(-1, keepdim=True).clamp(min=1 / shape[-1])
        return kept * (F.dropout(like.new_ones(1), self.whole) > 0)


def refuses_dropout(dropout: float, site: Site) -> str | None:
    """What is missing for dropout on an operation's input to act at a site."""
    if dropout and isinstance(site.module, (nn.RNNBase, nn.RNNCellBase)):
        return f"dropout=0 on a {type(site.module).__name__}, whose operation reads the weight as a whole"
    return None


def uniform(*shape: int, fan_in: int, like: Tensor, dtype: torch.dtype | None, generator: torch.Generator | None) -> Tensor:
    """A tensor drawn uniformly from ±1/sqrt(fan_in), where `like` is; its element type unless another is given."""
    made = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    return made.uniform_(-1, 1, generator=generator).div_(sqrt(max(fan_in, 1)))


def layout_of(site: Site, conv: Conv = "kernel") -> Layout:
    """How a site's parameter is seen as a matrix, or as a stack of matrices."""
    if is_a(site.module, HF_CONV1D):
        return "transposed"
    if isinstance(site.module, nn.modules.conv._ConvNd) and site.param_name == "weight":
        return conv
    return "stacked" if site.parameter.ndim > 2 else "matrix"


def matrix_of(shape: torch.Size, layout: Layout) -> tuple[list[int], int, int]:
    """Leading dimensions, rows (outputs) and columns (inputs) of a parameter seen in a layout."""
    if layout == "kernel":
        return [], shape[0], prod(shape[1:])
    if layout == "balanced":
        return [], *balanced(shape)
    *lead, rows, columns = shape
    return (lead, columns, rows) if layout == "transposed" else (lead, rows, columns)


def factors_of(b: Tensor, a: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """LoRA's tensors as left and right factor of the weight as it is stored."""
    if layout == "transposed":
        return a.mT, b.mT
    if layout == "kernel":
        groups = a.shape[0] // b.shape[1]
        a, b = a.flatten(1), b.flatten(1)
        if groups > 1:  # PEFT's grouped convolutions: every group has its own share of the rank
            return rearrange(b, "(g o) r -> g o r", g=groups), rearrange(a, "(g r) c -> g r c", g=groups)
    return b, a


def rank_axes(factor: Tensor, *, left: bool, kernel: bool = False) -> tuple[int, ...]:
    """Where the rank is in the left factor of a product of two matrices, or of two kernels, or in the right one."""
    return (int(left),) if kernel else (factor.ndim - (1 if left else 2),)


def as_matrix(parameter: Tensor, layout: Layout) -> Tensor:
    """A parameter as the matrix, outputs by inputs, or stack of matrices that it is seen as in a layout."""
    lead, rows, columns = matrix_of(parameter.shape, layout)
    return parameter.mT if layout == "transposed" else parameter.reshape(*lead, rows, columns)


def balanced(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a kernel's memory seen as a matrix that is as square as its layout allows."""
    if len(shape) <= 3:
        return shape[0], prod(shape[1:])
    return shape[0] * shape[2], shape[1] * prod(shape[3:])
