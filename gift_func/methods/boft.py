"""BOFT: features are rotated by a product of sparse orthogonal matrices, as in a fast Fourier transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import AdaptError
from ..select import Site
from ..weights import Blocks, Scaled, Weight, cayley
from .matrix import MatrixMethod, matrix_shape, on_matrix


@dataclass(frozen=True)
class BOFT(MatrixMethod):
    """`W' = diag(s)·W·Rᵀ`, `R = R_m ⋯ R_1`, each factor block-diagonal between a butterfly's permutations.

    Every factor lets features meet that lie twice as far apart, so few parameters make a dense orthogonal matrix. A block
    is `(I - Q)·(I + Q)⁻¹` with `Q = (boft_R - boft_Rᵀ)/2`. boft_R starts at zero and s at one, so an adapted network
    starts as the base.

    Shapes (`b` = block size, `n` = in / b, `m` = number of factors): boft_R `(m, n, b, b)`, boft_s `(out, 1)`, of a
    convolution `(1, out)`. A kernel is a matrix `(out, in/groups·k...)`. An embedding's features are turned and scaled.

    Args:
        block_size: b, a divisor of the width.
        block_num: n in its place.
        n_butterfly_factor: m. One factor is plain block-diagonal; with more, b is even and the width a multiple of
            `b·2^(m-1)`. PEFT computes more than one only with its CUDA extension, and silently takes one otherwise.
        dropout: probability with which a block is left out in training.

    Raises:
        AdaptError: for a size or number below 1, an odd block size with several factors, or a dropout outside [0, 1).

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(8, 2), gf.BOFT(4, n_butterfly_factor=2))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'boft_R': (2, 2, 4, 4), 'boft_s': (2, 1)}

    References:
        Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2024 (arXiv:2311.06243).
        Dropout leaves out every block independently, where the paper leaves out a fixed share of one factor's.
    """

    whole = ("block_size", "n_butterfly_factor", "block_num")

    block_size: int = 4
    _: KW_ONLY
    block_num: int | None = None
    n_butterfly_factor: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_butterfly_factor > 1 and self.block_num is None and self.block_size % 2:
            raise AdaptError(f"several butterfly factors split blocks in two and need an even size, got {self.block_size}")

    def why_not(self, site: Site) -> str | None:
        if site.parameter.ndim >= 2:
            view = self.for_site(site).view
            width = matrix_shape(site.parameter.shape, view)[-2 if view == "lookup" else -1]
            size = self.block_size if self.block_num is None else width // self.block_num
            several = self.n_butterfly_factor > 1
            step = size * 2 ** (self.n_butterfly_factor - 1)
            if not size or width % step or (several and size % 2) or (self.block_num and width % self.block_num):
                need = f"block_num={self.block_num}" if self.block_num else f"block_size={self.block_size}"
                factors = f" and n_butterfly_factor={self.n_butterfly_factor}" if several else ""
                return f"a {need}{factors} whose blocks, of even size where there are several factors, divide its width {width}"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        dtype, device = site.parameter.dtype, site.parameter.device
        *lead, rows, columns = matrix_shape(site.parameter.shape, self.view)
        width = rows if self.view == "lookup" else columns
        size = self.block_size if self.block_num is None else width // self.block_num
        blocks = torch.zeros(*lead, self.n_butterfly_factor, width // size, size, size, dtype=dtype, device=device)
        factors = (1, rows) if self.view == "kernel" else (*lead, rows, 1)
        return {"boft_R": blocks, "boft_s": torch.ones(factors, dtype=dtype, device=device)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        raw, s = tensors["boft_R"], tensors["boft_s"]
        rotated = partial(Blocks, factors=self.n_butterfly_factor, dropout=self.dropout)
        if self.view == "lookup":  # the layer's outputs are rotated, W·R, and not its inputs
            return Scaled(rotated(base.mT, raw, blocks, raw.shape[-1], "output").mT, s.mT, "input")
        s = s.mT if self.view == "kernel" else s
        return on_matrix(base, self.view, lambda w: Scaled(rotated(w, raw, blocks, raw.shape[-1]), s, "output"))


def blocks(raw: Tensor) -> Tensor:
    """The orthogonal blocks of all factors."""
    return cayley((raw - raw.mT) / 2)
