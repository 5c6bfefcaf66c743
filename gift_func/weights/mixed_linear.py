"""`y = x·Wᵀ + bias`, and `+ s·(x·A_nᵀ)·B_nᵀ` in the rows of adapter n: a batch whose rows have adapters of their own.

W meets all rows in one product. Rows of one adapter are neighbours, so each change is added into a slice of the fresh
output; no adapter's factors are copied per row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .stacked_linear import StackedLinear

Sizes = tuple[int, ...]


def mixed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: Sizes
) -> Tensor:
    """The layer on rows that are ordered by adapter.

    Args:
        x: `(R, in)`, the rows of adapter 0, of adapter 1, ..., and last those without one.
        weight: W, `(out, in)`, frozen.
        bias: `(out,)` or None.
        left: B, `(K, out, r)`.
        right: A, `(K, r, in)`.
        scale: s.
        sizes: how many rows each of the K adapters has, at least 1.

    Returns:
        `(R, out)`.
    """
    tensors = (x, left, right) if bias is None else (x, left, right, bias)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _forward(x, weight, bias, left, right, scale, sizes)[0]
    count = len(sizes)
    if len(set(sizes)) == 1 and sum(sizes) == x.shape[0]:
        y = StackedLinear.apply(x.view(count, sizes[0], -1), weight, bias, left, right, scale)[0]  # type: ignore[no-untyped-call]
        made: Tensor = y.flatten(0, 1)
        return made
    made = MixedLinear.apply(x, weight, bias, left, right, scale, sizes)[0]  # type: ignore[no-untyped-call]
    return made


class MixedLinear(torch.autograd.Function):
    """The pair `(y, h)`; h `(rows with an adapter, r)` is an output because second derivatives flow through it."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        return _forward(x, weight, bias, left, right, scale, sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, left, right, ctx.scale, ctx.sizes = inputs
        ctx.save_for_backward(x, weight, left, right, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, left, right, h = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        rows = sum(sizes)
        if grad_y is None and grad_h is None:
            return None, None, None, None, None, None, None
        if grad_y is None:
            grad_y = x.new_zeros(x.shape[0], weight.shape[0])
        thin = torch.cat([part @ left[k] for k, part in _parts(grad_y, sizes)]) * ctx.scale
        if grad_h is not None:
            thin = thin + grad_h
        grad_x = grad_bias = grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight
            change = torch.cat([part @ right[k] for k, part in _parts(thin, sizes)])
            if torch.is_grad_enabled():
                grad_x = grad_x + F.pad(change, (0, 0, 0, x.shape[0] - rows))
            else:
                grad_x[:rows] += change
        grad_bias = grad_y.sum(0) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[3]:
            grads = zip(_parts(h, sizes), _parts(grad_y, sizes), strict=True)
            grad_left = torch.stack([(a.mT @ b).mT for (_, a), (_, b) in grads]) * ctx.scale
        if ctx.needs_input_grad[4]:
            grads = zip(_parts(thin, sizes), _parts(x, sizes), strict=True)
            grad_right = torch.stack([a.mT @ b for (_, a), (_, b) in grads])
        return grad_x, None, grad_bias, grad_left, grad_right, None, None


# As in `stacked_linear`: torch asks for it in every call.
MixedLinear.forward.__signature__ = inspect.signature(MixedLinear.forward)  # type: ignore[attr-defined]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    y = F.linear(x, weight, bias)
    count, rows = len(sizes), sum(sizes)
    if len(set(sizes)) == 1:
        h = torch.bmm(x[:rows].view(count, sizes[0], -1), right.mT)
        y[:rows].view(count, sizes[0], -1).baddbmm_(h, left.mT, alpha=scale)
        return y, h.flatten(0, 1)
    h = torch.cat([part @ right[k].mT for k, part in _parts(x, sizes)])
    for (k, part), (_, thin) in zip(_parts(y, sizes), _parts(h, sizes), strict=True):
        part.addmm_(thin, left[k].mT, alpha=scale)
    return y, h


def _parts(rows: Tensor, sizes: Sizes) -> Iterator[tuple[int, Tensor]]:
    """Each adapter's rows."""
    start = 0
    for index, size in enumerate(sizes):
        yield index, rows[start : start + size]
        start += size
