"""`y = x·Wᵀ + bias`, and `+ s·(x·A_nᵀ)·B_nᵀ` in the rows of adapter n: a batch whose rows have different adapters.

All rows are multiplied by W in one product. The rows of an adapter are contiguous, so its change is added to a slice of the
output in place; no adapter's factors are copied for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .function import apply, save, with_signature
from .stacked_linear import StackedLinear, output_tangents, vmap_over

Sizes = tuple[int, ...]


def mixed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: Sizes
) -> Tensor:
    """The layer on rows that are ordered by adapter.

    Args:
        x: `(R, in)`, the rows of adapter 0, of adapter 1, ..., and last those without an adapter.
        weight: W, `(out, in)`, frozen.
        bias: `(out,)` or None.
        left: B, `(K, out, r)`.
        right: A, `(K, r, in)`.
        scale: s.
        sizes: number of rows of each of the K adapters, at least 1.

    Returns:
        `(R, out)`.
    """
    tensors = (x, left, right) if bias is None else (x, left, right, bias)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _forward(x, weight, bias, left, right, scale, sizes)[0]
    count = len(sizes)
    if len(set(sizes)) == 1 and sum(sizes) == x.shape[0]:
        y = apply(StackedLinear, x.view(count, sizes[0], -1), weight, bias, left, right, scale)[0]
        made: Tensor = y.flatten(0, 1)
        return made
    made = apply(MixedLinear, x, weight, bias, left, right, scale, sizes)[0]
    return made


@with_signature
class MixedLinear(torch.autograd.Function):
    """The pair `(y, h)`; h `(r, rows with an adapter)` is an output because second derivatives flow through it."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        y, h = _forward(x, weight, bias, left, right, scale, sizes)
        return y, h if h.ndim == 2 else h.movedim(1, 0).flatten(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, left, right, ctx.scale, ctx.sizes = inputs
        save(ctx, x, weight, left, right, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, left, right, h = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        if grad_y is None and grad_h is None:
            return None, None, None, None, None, None, None
        if grad_y is None:
            grad_y = x.new_zeros(x.shape[0], weight.shape[0])
        thin = _thin(grad_y, left.mT, sizes) * ctx.scale
        if grad_h is not None:
            thin = thin + grad_h
        grad_x = grad_bias = grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight
            if torch.is_grad_enabled():
                grad_x = grad_x + _wide(thin, right.mT, sizes, len(x))
            else:
                _add(grad_x, thin, right, 1.0, sizes)
        grad_bias = grad_y.sum(0) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[3]:
            grads = zip(_parts((h * ctx.scale).mT, sizes), _parts(grad_y, sizes), strict=True)
            grad_left = torch.stack([(a.mT @ b).mT for (_, a), (_, b) in grads])
        if ctx.needs_input_grad[4]:
            grads = zip(_parts(thin.mT, sizes), _parts(x, sizes), strict=True)
            grad_right = torch.stack([a.mT @ b for (_, a), (_, b) in grads])
        return grad_x, None, grad_bias, grad_left, grad_right, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        sizes, rows = ctx.sizes, len(ctx.saved_tensors[0])
        thin, wide = partial(_thin, sizes=sizes), partial(_wide, sizes=sizes, rows=rows)
        return output_tangents(ctx, tangents, (rows,), thin, wide)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return vmap_over(_forward_out_of_place, in_dims, inputs), (0, 0)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    y = F.linear(x, weight, bias)
    # As in `stacked_linear`, the order of the product that reads activations by rows.
    if len(set(sizes)) == 1:
        h = right @ _even(x, sizes).mT
        _even(y, sizes).baddbmm_(h.mT, left.mT, alpha=scale)
        return y, h
    h = _thin(x, right, sizes)
    _add(y, h, left.mT, scale, sizes)
    return y, h


def _forward_out_of_place(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    h = _thin(x, right, sizes)
    return F.linear(x, weight, bias) + scale * _wide(h, left, sizes, len(x)), h


def _thin(rows: Tensor, factors: Tensor, sizes: Sizes) -> Tensor:
    """`F_n·xᵀ` for the rows of adapter n, concatenated: `(r, rows with an adapter)`."""
    return torch.cat([factors[k] @ part.mT for k, part in _parts(rows, sizes)], 1)


def _wide(thin: Tensor, factors: Tensor, sizes: Sizes, rows: int) -> Tensor:
    """`thin_nᵀ·F_nᵀ` in the rows of adapter n, zeros in those without one."""
    change = torch.cat([part @ factors[k].mT for k, part in _parts(thin.mT, sizes)])
    return F.pad(change, (0, 0, 0, rows - len(change)))


def _add(rows: Tensor, thin: Tensor, factors: Tensor, scale: float, sizes: Sizes) -> None:
    """Add `s·thin_nᵀ·F_n` into the rows of adapter n; thin `(r, rows)`."""
    for (k, part), (_, own) in zip(_parts(rows, sizes), _parts(thin.mT, sizes), strict=True):
        part.addmm_(own, factors[k], alpha=scale)


def _even(rows: Tensor, sizes: Sizes) -> Tensor:
    """The rows as `(K, rows of each, d)`, for adapters with the same number of rows."""
    return rows[: sum(sizes)].view(len(sizes), sizes[0], -1)


def _parts(rows: Tensor, sizes: Sizes) -> Iterator[tuple[int, Tensor]]:
    """Each adapter's rows."""
    start = 0
    for index, size in enumerate(sizes):
        yield index, rows[start : start + size]
        start += size
