"""C3A: a change made of circulant blocks, which act by circular convolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from ..select import Site
from ..weights import Circulant, Weight
from .matrix import MatrixMethod, matrix_shape, on_matrix
from .options import FrozenMap


@dataclass(frozen=True)
class C3A(MatrixMethod):
    """`W' = W + C / in`, where every b×b block of C is circulant: `C[i, j] = kernel[(j - i) mod b]`.

    A circulant block has one free row and yet full rank, and a fast Fourier transform multiplies by it.

    Shapes: c3a_kernel `(out/b, in/b, b)`; a kernel is a matrix `(out, in/groups·k...)`.

    Args:
        block_size: b, a divisor of in and of out.
        init: `"xavier_uniform"`, `"kaiming_uniform"` and `"gaussian"` do not start as the base; `"zeros"` does.
        block_size_pattern: b of the sites whose module name ends in what a key (a regular expression) matches; first hit.

    Raises:
        AdaptError: for a block size below 1 or an unknown init.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(8, 4), gf.C3A(block_size=4))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'c3a_kernel': (1, 2, 4)}

    References:
        Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, 2024 (arXiv:2407.19342). The divisor is PEFT's.
    """

    whole = ("block_size",)

    block_size: int = 256
    _: KW_ONLY
    init: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"
    block_size_pattern: Mapping[str, int] = field(default_factory=FrozenMap)

    @property
    def starts_as_base(self) -> bool:
        return self.init == "zeros"

    def why_not(self, site: Site) -> str | None:
        if site.parameter.ndim >= 2:
            here = self.for_site(site)
            rows, columns = matrix_shape(site.parameter.shape, here.view)[-2:]
            if rows % here.block_size or columns % here.block_size:
                return f"a block_size={here.block_size} that divides its {rows} outputs and {columns} inputs"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, size = site.parameter, self.block_size
        *lead, rows, columns = matrix_shape(parameter.shape, self.view)
        shape = (*lead, rows // size, columns // size, size)
        kernel = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        if self.init == "gaussian":
            kernel.normal_(generator=generator)
        elif self.init != "zeros":
            bound = sqrt(6 / (rows + columns) if self.init == "xavier_uniform" else 1 / columns)
            kernel.uniform_(-bound, bound, generator=generator)
        return {"c3a_kernel": kernel}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        kernel = tensors["c3a_kernel"]
        return on_matrix(base, self.view, lambda matrix: Circulant(matrix, kernel, 1 / matrix.shape[-1]))
