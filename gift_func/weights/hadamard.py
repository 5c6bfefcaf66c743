"""`W + s·(A₁·B₁) ⊙ (A₂·B₂)`: a change that is the elementwise product of two low-rank ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .low_rank import LowRank
from .output_dropout import NO_DROPOUT, OutputDropout
from .value import OnBase, Weight, add_scaled, without_padding


class Hadamard(OnBase):
    """`W + s·reshape((A₁·B₁) ⊙ (A₂·B₂))`.

    Args:
        base: W.
        tensors: A₁ `(..., rows, r)` as w1_a, B₁ `(..., r, columns)` as w1_b, A₂ and B₂ as w2_a and w2_b; and, if there
            are any, the Tucker cores t1 and t2 `(r, r, k...)`, whose first two dimensions A `(rows, r)` and B `(r, channels)`
            multiply.
        scale: s.
        transposed: whether W is stored `(columns, rows)`.
        dropout: of rows.
    """

    def __init__(
        self, base: Weight, tensors: Mapping[str, Tensor], scale: float, transposed: bool, dropout: OutputDropout = NO_DROPOUT
    ) -> None:
        self.base = base
        self.dropout = dropout
        self.a1, self.b1, self.t1 = tensors["w1_a"], tensors["w1_b"], tensors.get("t1")
        self.a2, self.b2, self.t2 = tensors["w2_a"], tensors["w2_b"], tensors.get("t2")
        self.scale = scale
        self.transposed = transposed

    @property
    def _is_matrix(self) -> bool:
        """Whether the product of the factors has W's own shape and is added to it as it is."""
        plain = not self.dropout and self.t1 is None and not self.transposed
        return plain and self.base.shape == torch.Size([self.a1.shape[-2], self.b1.shape[-1]])

    def dense(self) -> Tensor:
        first = product(self.a1 * self.scale, self.b1, self.t1)
        change = first * product(self.a2, self.b2, self.t2)
        if self.dropout:
            lead = change.shape[: self.a1.ndim - 1]
            change = change * self.dropout.factor(change, *lead).reshape(*lead, *[1] * (change.ndim - len(lead)))
        change = change.mT if self.transposed else change.reshape(self.base.shape)
        return add_scaled(self.base.dense(), change, 1.0)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, rank = self.a1.shape[-2:]
        columns = self.b1.shape[-1]
        tokens = x.shape.numel() // x.shape[-1] if x.shape[-1] else 0
        # The elementwise product of two products of rank r is a product of rank r², which is cheaper for few tokens.
        few = (tokens + 1) * rank * (rows + columns) < 2 * rows * columns
        if not few or not self._is_matrix:
            return super().linear(x, bias)
        left = (self.a1.unsqueeze(-1) * self.a2.unsqueeze(-2)).flatten(-2)
        right = (self.b1.unsqueeze(-2) * self.b2.unsqueeze(-3)).flatten(-3, -2)
        return LowRank(self.base, left, right, self.scale).linear(x, bias)

    def choose(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        if not self._is_matrix:
            return super().choose(pick, padding)
        change = (pick(self.a1) @ self.b1) * (pick(self.a2) @ self.b2)
        return add_scaled(self.base.choose(pick, padding), without_padding(change, padding), self.scale)


def product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """`A·B`, or a Tucker core with A on its first dimension and B on its second: `(out, in, k...)`."""
    return a @ b if core is None else torch.einsum("ij...,jc,oi->oc...", core, b, a)
