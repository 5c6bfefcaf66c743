"""OFT: blocks of features are rotated by small orthogonal matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from math import sqrt
from typing import Literal, Self

import torch
from torch import Tensor

from ..errors import AdaptError
from ..select import Site
from ..weights import Blocks, Scaled, Weight, cayley, neumann, skew
from .matrix import MatrixMethod, matrix_shape, on_matrix


@dataclass(frozen=True)
class OFT(MatrixMethod):
    """`W' = W·Rᵀ` with `R = diag(R₁, ..., R_n)` orthogonal, `R_i = (I - Q_i)·(I + Q_i)⁻¹`, `Q_i` skew-symmetric.

    Turning all features alike keeps the angles between neurons, which carry what a network has learned. Q starts at
    zero, so R starts as the identity.

    Shapes (`b` = block size, `n` = in / b blocks, 1 if shared): oft_R `(n, b·(b-1)/2)`, what stands above the diagonal
    of Q; of an embedding oft_embedding_R, and its features are turned. A kernel is a matrix `(out, in/groups·k...)`. On
    the output side `W' = rescale ⊙ Rᵀ·W`: oft_blocks `(out/b, b, b)`, and rescale `(out, 1, ...)`.

    Args:
        block_size: b. If the width is no multiple of it, its nearest divisor is taken, as in PEFT.
        block_num: n in its place (PEFT's `r`); the nearest divisor of the width here as well.
        side: `"input"` as in PEFT, or `"output"`: LyCORIS's diag-OFT, with `Q = oft_blocksᵀ - oft_blocks`.
        neumann: how many terms of a Neumann series stand for the inverse, as in PEFT, whose series nears Rᵀ and not R;
            0 means the exact inverse. Always exact on the output side.
        coft: keep R near the identity: every Q_i is scaled down to the norm `eps / sqrt(n)`; on the output side all of Q
            together to `eps·out`. PEFT writes the smaller Q to its parameter; here the gradient flows through the scaling.
        eps: how near.
        block_share: one block for all.
        rescale: also learn a factor for each output; on the output side only.
        dropout: probability with which a block is left out in training.

    Raises:
        AdaptError: for a size or number below 1, an unknown side, a dropout outside [0, 1), or rescale on the input side.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(8, 2), gf.OFT(block_size=4))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'oft_R': (2, 6)}

    References:
        Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023 (arXiv:2306.07280), which turns
        outputs; Qiu et al., Orthogonal Finetuning Made Scalable, 2025 (arXiv:2506.19847): inputs, and the series.
    """

    whole = ("block_size", "block_num")

    block_size: int = 32
    _: KW_ONLY
    block_num: int | None = None
    side: Literal["input", "output"] = "input"
    neumann: int = 5
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    rescale: bool = False
    dropout: float = 0.0
    size: int = field(default=0, init=False, repr=False, compare=False)
    count: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale and self.side == "input":
            raise AdaptError("rescale=True learns a factor for each output and needs side='output', got side='input'")
        if self.neumann < 0 or self.eps <= 0:
            raise AdaptError(f"neumann is at least 0 and eps above 0, got neumann={self.neumann!r}, eps={self.eps!r}")

    def for_site(self, site: Site) -> Self:
        here = super().for_site(site)
        # Of an embedding the features are rotated, which are its outputs.
        side = -2 if self.side == "output" or here.view == "lookup" else -1
        width = matrix_shape(site.parameter.shape, here.view)[side]
        asked = self.block_size if self.block_num is None else self.block_num
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        found = min(divisors, key=lambda d: (abs(d - asked), d))
        size = found if self.block_num is None else width // found
        return here.replace(size=size, count=width // size)

    def why_not(self, site: Site) -> str | None:
        if site.parameter.ndim >= 2 and self.for_site(site).size < 2:
            return "a width that blocks of at least 2 features divide, near the block_size or block_num asked for"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter = site.parameter
        lead = parameter.shape[:-2] if self.view == "stacked" else ()
        width = self.size * self.count
        count = 1 if self.block_share else self.count
        zeros = partial(torch.zeros, dtype=parameter.dtype, device=parameter.device)
        if self.side == "input":
            name = "oft_embedding_R" if self.view == "lookup" else "oft_R"
            return {name: zeros(*lead, count, self.size * (self.size - 1) // 2)}
        tensors = {"oft_blocks": zeros(*lead, count, self.size, self.size)}
        if self.rescale:
            shape = [width, *[1] * (parameter.ndim - 1)] if self.view == "kernel" else [*lead, width, 1]
            tensors["rescale"] = zeros(shape) + 1
        return tensors

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        names = ("oft_blocks", "oft_embedding_R", "oft_R")
        raw = next(tensors[name] for name in names if name in tensors)
        rotated = partial(Blocks, raw=raw, make=self.blocks, size=self.size, dropout=self.dropout, orthogonal=self._is_exact)
        if self.view == "lookup":  # rows are looked up and then rotated, as a layer's outputs are
            rows = rotated(base.mT, side="output").mT
            return Scaled(rows, tensors["rescale"].mT, "input") if self.rescale else rows

        def change(matrix: Weight) -> Weight:
            made = rotated(matrix, side=self.side)
            return Scaled(made, tensors["rescale"].view(*made.shape[:-1], 1), "output") if self.rescale else made

        return on_matrix(base, self.view, change)

    def blocks(self, raw: Tensor) -> Tensor:
        """The orthogonal blocks, as the one factor of a product: `(..., 1, n, b, b)`."""
        if self.side == "output":
            q, axes = raw.mT - raw, [-3, -2, -1]
        else:
            q, axes = skew(raw, self.size), [-2, -1]
        if self.coft:
            bound = self.eps * self.size * self.count if self.side == "output" else self.eps / sqrt(q.shape[-3])
            q = q * (bound / torch.linalg.vector_norm(q, dim=axes, keepdim=True).clamp(min=bound))
        return (cayley(q) if self._is_exact else neumann(q, self.neumann)).unsqueeze(-4)

    @property
    def _is_exact(self) -> bool:
        return self.side == "output" or not self.neumann
