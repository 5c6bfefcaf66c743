"""`W + s·(C ⊗ D)`: a change that is a Kronecker product."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..kernels.choice import autocasts
from .hadamard import product
from .output_dropout import NO_DROPOUT, OutputDropout
from .value import OnBase, Weight, add_scaled, dense_linear, without_padding


class Kronecker(OnBase):
    """`W + s·reshape(C ⊗ D)`, or its transpose.

    Args:
        base: W.
        tensors: C as lokr_w1 or its two factors; D as lokr_w2, its two factors, or those and a Tucker core.
        scale: s.
        transposed: whether the transpose of the product is added.
        dropout: of the product's rows.
    """

    def __init__(
        self, base: Weight, tensors: Mapping[str, Tensor], scale: float, transposed: bool, dropout: OutputDropout = NO_DROPOUT
    ) -> None:
        self.base = base
        self.dropout = dropout
        self.w1, self.w1_a, self.w1_b = (tensors.get(f"lokr_w1{part}") for part in ("", "_a", "_b"))
        self.w2, self.w2_a, self.w2_b = (tensors.get(f"lokr_w2{part}") for part in ("", "_a", "_b"))
        self.t2 = tensors.get("lokr_t2")
        self.scale = scale
        self.transposed = transposed

    def _pair(self) -> tuple[Tensor, Tensor]:
        """s·C `(..., a, c)` and D `(..., b, d)`, a kernel's as `(b, d·k...)`; both transposed if their product is."""
        c = _factor(self.w1, self.w1_a, self.w1_b, None) * self.scale
        d = _factor(self.w2, self.w2_a, self.w2_b, self.t2)
        d = d if d.ndim == c.ndim else d.flatten(1)
        return (c.mT, d.mT) if self.transposed else (c, d)

    def dense(self) -> Tensor:
        left, right = self._pair()
        change = (left[..., :, None, :, None] * right[..., None, :, None, :]).reshape(self.base.shape)
        if self.dropout:
            output = -1 if self.transposed else left.ndim - 2
            rows = self.dropout.factor(change, *left.shape[:-2], self.base.shape[output])
            rows = rows.unsqueeze(-2) if self.transposed else rows.reshape(*rows.shape, *[1] * (change.ndim - rows.ndim))
            change = change * rows
        return add_scaled(self.base.dense(), change, 1.0)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        left, right = self._pair()
        (a, c), (b, d) = left.shape[-2:], right.shape[-2:]
        tokens = x.shape.numel() // x.shape[-1] if x.shape[-1] else 0
        # Through the factors: tokens·b·c·(a + d) products. Through the matrix: to form it, and its gradient in backward.
        through = tokens * b * c * (a + d) < (2 + tokens / 2) * a * b * c * d
        if not through or self.dropout or self.base.shape != torch.Size([a * b, c * d]):
            return super().linear(x, bias)
        thin = x if autocasts(x) else x.to(left.dtype)
        inner = dense_linear(thin.unflatten(-1, (c, d)), right, None)
        change = dense_linear(inner.mT, left, None).mT.flatten(-2)
        return add_scaled(self.base.linear(x, bias), change, 1.0)

    def choose(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        left, right = self._pair()
        b = right.shape[-2]
        if self.dropout or self.ndim != 2 or self.shape != torch.Size([left.shape[-2] * b, left.shape[-1] * right.shape[-1]]):
            return super().choose(pick, padding)
        row = pick(torch.arange(self.shape[0], device=left.device).unsqueeze(-1)).squeeze(-1)
        change = (left[row // b].unsqueeze(-1) * right[row % b].unsqueeze(-2)).flatten(-2)
        return add_scaled(self.base.choose(pick, padding), without_padding(change, padding), 1.0)

    @property
    def mT(self) -> Weight:
        if self._pair()[0].ndim != self.base.ndim:  # a kernel
            return super().mT
        return self.replace(base=self.base.mT, transposed=not self.transposed)


def _factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    """A factor as it is, as a product of two, or as a Tucker core between two."""
    if whole is not None:
        return whole
    assert a is not None
    assert b is not None
    return product(a if core is None else a.mT, b, core)
