"""SHiRA: a few scattered entries of each weight are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..seeding import sample
from ..select import Site
from ..weights import SparseDelta, Weight
from .matrix import MatrixMethod, matrix_shape


@dataclass(frozen=True)
class SHiRA(MatrixMethod):
    """`W' = W + s·scatter(v)`: values v added at a fixed random choice of W's entries.

    As many numbers as LoRA of the same rank trains, but the change is sparse and of high rank: it overwrites 1-2 % of a
    weight, and two such adapters hardly meet when they are added. v starts at zero.

    Shapes (a kernel is taken as the matrix `(out, in/groups·k...)`), with `n = rank·(rows + columns)`: shira_weight `(n,)`,
    shira_indices `(2, n)`, the row and column of each, drawn once, saved and not trained.

    Args:
        rank: sets how many entries are trained.
        scale: s.
        random_seed: what the entries are drawn from, the same for weights of one shape; None means from the generator
            that `adapt` is given.

    Raises:
        AdaptError: for a rank below 1.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(32, 16), gf.SHiRA(rank=2))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'shira_weight': (96,), 'shira_indices': (2, 96)}

    References:
        Bhardwaj et al., Sparse High Rank Adapters, 2024 (arXiv:2406.13175), the random mask; PEFT's count of entries.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"shira_indices"})
    needs = "a parameter of at least 2 dimensions"
    whole = ("rank",)

    rank: int = 32
    _: KW_ONLY
    scale: float = 1.0
    random_seed: int | None = None

    def why_not(self, site: Site) -> str | None:
        if site.parameter.ndim < 2:
            return self.needs
        rows, columns = matrix_shape(site.parameter.shape, "kernel")
        if self.rank * (rows + columns) > rows * columns:
            return f"at least rank·(rows + columns) = {self.rank * (rows + columns)} entries"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter = site.parameter
        rows, columns = matrix_shape(parameter.shape, "kernel")
        count = self.rank * (rows + columns)
        values = torch.zeros(count, dtype=parameter.dtype, device=parameter.device)
        places = sample(rows * columns, count, seed=self.random_seed, generator=generator, device=parameter.device)
        places = places.sort().values
        indices = torch.stack([places // columns, places % columns]).to(torch.int32)
        return {"shira_weight": values, "shira_indices": indices}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return SparseDelta(base, tensors["shira_weight"], tensors["shira_indices"], self.scale)
