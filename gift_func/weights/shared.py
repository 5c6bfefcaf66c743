"""`W + Δ` for a Δ that repeats one small block along the inputs, and a variant in which W's blocks multiply theirs."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.choice import autocasts, can_fuse
from ..kernels.shared_linear import forming_pays, shared_linear
from .value import Dense, Index, InputDropout, OnBase, Weight, add_scaled, as_weight, dense_linear


class SharedShards(InputDropout):
    """`W + Δ` with `Δ[o, i] = block[i mod r, o mod w]`.

    Args:
        base: W, a matrix or a stack of matrices, `(..., out, in)`.
        block: `(..., r, w)`; w divides out.
        dropout: probability of dropping an input feature of the change.
    """

    def __init__(self, base: Weight | Tensor, block: Tensor, dropout: float = 0.0) -> None:
        self.base = as_weight(base)
        self.block = block
        self.dropout = dropout

    def change(self) -> Tensor:
        rows, columns = self.shape[-2:]
        rank, width = self.block.shape[-2:]
        lead = [1] * (self.block.ndim - 2)
        return self.block.mT.repeat(*lead, rows // width, -(-columns // rank))[..., :columns]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, columns = self.shape[-2:]
        rank, width = self.block.shape[-2:]
        # Computing the weight writes it twice, about as much as eight products an element, and again for a gradient.
        tokens = prod(x.shape[:-1])
        if not torch.is_grad_enabled() and not self.dropout and tokens * (columns + rank * width) > 8 * rows * columns:
            return dense_linear(x, self.dense(), bias)
        worth = not self.dropout and forming_pays(tokens, rows, columns)
        if worth and isinstance(self.base, Dense) and can_fuse(x, self.base.tensor, bias, self.block):
            return shared_linear(x, self.base.tensor, bias, self.block)
        thin = F.dropout(x, self.dropout) if self.dropout else x
        if thin.dtype != self.block.dtype and not autocasts(x):
            thin = thin.to(self.block.dtype)
        thin = F.pad(thin, (0, -columns % rank)) if columns % rank else thin
        shards = thin.unflatten(-1, (-1, rank)).sum(-2)
        change = shards @ self.block
        if width < rows:
            change = change.repeat(*[1] * (change.ndim - 1), rows // width)
        return add_scaled(self.base.linear(x, bias), change, 1.0)

    def __getitem__(self, index: Index) -> Weight:
        if self.ndim > 2:
            return self.replace(base=self.base[index], block=self.block[index])
        if not isinstance(index, slice):
            return super().__getitem__(index)
        whole = self.block.repeat(1, self.shape[0] // self.block.shape[1])
        return self.replace(base=self.base[index], block=whole[:, index])


class BlockAffine(OnBase):
    """`W' = W + W·B + B` by blocks: every r×r block of W in block row i is multiplied by B_i, which is added.

    Args:
        base: W, a matrix or a stack of matrices, `(..., out, in)`; r divides both.
        block: `(..., out/r, r, r)`.
    """

    def __init__(self, base: Weight | Tensor, block: Tensor) -> None:
        self.base = as_weight(base)
        self.block = block

    def dense(self) -> Tensor:
        weight = self.base.dense()
        rank = self.block.shape[-1]
        rows, columns = weight.shape[-2:]
        wide = weight.to(torch.promote_types(weight.dtype, self.block.dtype))
        tall = wide.reshape(*weight.shape[:-2], rows // rank, columns, rank)  # every block of a block row, one below another
        change = (tall @ self.block.to(wide.dtype)).unflatten(-2, (rank, columns // rank)) + self.block.unsqueeze(-2)
        changed: Tensor = wide + change.reshape(weight.shape)
        return changed.to(weight.dtype)

    def __getitem__(self, index: Index) -> Weight:
        return self.replace(base=self.base[index], block=self.block[index]) if self.ndim > 2 else super().__getitem__(index)
