"""C3A: a change made of circulant blocks, which act by circular convolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, field
from math import sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from ..select import Site
from ..weights import Circulant, Weight
from .matrix import MatrixMethod, View, matrix_shape, on_matrix, view_of
from .settings import FrozenMap, check_choice, check_whole, option, settings, settled

Init = Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"]


@settings
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

    block_size: int = 256
    _: KW_ONLY
    initialization: Init = option(default="xavier_uniform", alias="init")
    block_size_pattern: Mapping[str, int] = field(default_factory=FrozenMap)
    view: View = settled(default="matrix")

    def __post_init__(self) -> None:
        check_whole(self, "block_size")
        check_choice("init", self.initialization, get_args(Init))

    @property
    def starts_as_base(self) -> bool:
        return self.initialization == "zeros"

    def refuses(self, site: Site) -> str | None:
        if site.parameter.ndim >= 2:
            settled = self.at(site)
            rows, columns = matrix_shape(site.parameter.shape, settled.view)[-2:]
            if rows % settled.block_size or columns % settled.block_size:
                return f"a block_size={settled.block_size} that divides its {rows} outputs and {columns} inputs"
        return super().refuses(site)

    def at(self, site: Site) -> C3A:
        return super().at(site).but(view=view_of(site))

    def init(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, size = site.parameter, self.block_size
        *lead, rows, columns = matrix_shape(parameter.shape, self.view)
        shape = (*lead, rows // size, columns // size, size)
        kernel = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        if self.initialization == "gaussian":
            kernel.normal_(generator=generator)
        elif self.initialization != "zeros":
            bound = sqrt(6 / (rows + columns) if self.initialization == "xavier_uniform" else 1 / columns)
            kernel.uniform_(-bound, bound, generator=generator)
        return {"c3a_kernel": kernel}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        kernel = tensors["c3a_kernel"]
        return on_matrix(base, self.view, lambda matrix: Circulant(matrix, kernel, 1 / matrix.shape[-1]))
