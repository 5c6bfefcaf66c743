"""`y_n = x_n·Wᵀ + bias + s·(x_n·A_nᵀ)·B_nᵀ` for N adapters at once.

The tokens of all adapters are multiplied by the frozen W in one product. The changes are added to the output in place, and
only x and the r-wide product are saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .function import apply, save, with_signature

Product = Callable[[Tensor, Tensor], Tensor]


@with_signature
class StackedLinear(torch.autograd.Function):
    """The pair `(y, h)`, `h_n = A_n·x_nᵀ`. h is an output because second derivatives flow through it.

    Shapes: x `(N, T, in)`, or `(T, in)` for one x that all share; W `(out, in)`; bias `(out,)` or None; left
    `(N, out, r)`; right `(N, r, in)`; y `(N, T, out)`; h `(N, r, T)`.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        # Of the two orders of each thin product, the one that reads the activations by rows.
        h = right @ x.mT
        if x.ndim == 2:
            shared = F.linear(x, weight, bias).expand(left.shape[0], -1, -1)
            return torch.baddbmm(shared, h.mT, left.mT, alpha=scale), h
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
        return y.baddbmm_(h.mT, left.mT, alpha=scale), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, left, right, ctx.scale = inputs
        save(ctx, x, weight, left, right, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, left, right, h = ctx.saved_tensors
        grad_x = grad_bias = grad_left = grad_right = None
        if grad_y is not None:
            thin = left.mT @ grad_y.mT
            thin = thin * ctx.scale if grad_h is None else torch.add(grad_h, thin, alpha=ctx.scale)
            grad_bias = grad_y.sum((0, 1)) if ctx.needs_input_grad[2] else None
            grad_left = ((h * ctx.scale) @ grad_y).mT if ctx.needs_input_grad[3] else None
        elif grad_h is not None:
            thin = grad_h
        else:
            return None, None, None, None, None, None
        if ctx.needs_input_grad[4]:
            grad_right = thin @ x
        if ctx.needs_input_grad[0]:
            if grad_y is None:
                grad_x = thin.mT @ right
            else:
                grad_x = (grad_y.reshape(-1, grad_y.shape[-1]) @ weight).view(*grad_y.shape[:-1], -1)
                grad_x = torch.baddbmm(grad_x, thin.mT, right) if torch.is_grad_enabled() else grad_x.baddbmm_(thin.mT, right)
            grad_x = grad_x.sum(0) if x.ndim == 2 else grad_x
        return grad_x, None, grad_bias, grad_left, grad_right, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        members, _, tokens = ctx.saved_tensors[-1].shape
        return output_tangents(ctx, tangents, (members, tokens), lambda x, a: a @ x.mT, lambda h, b: h.mT @ b.mT)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """A stack of stacks is one stack; a batch of x for the same adapters is one longer x."""
        x, weight, bias, left, right, scale = inputs
        x_dim, weight_dim, bias_dim, left_dim, right_dim, _ = in_dims
        if weight_dim is not None:
            return vmap_over(_plain, in_dims, inputs), (0, 0)
        size, shift = info.batch_size, None
        if bias_dim is not None:
            shift, bias = bias.movedim(bias_dim, 0)[:, None, None], None
        if left_dim is None and right_dim is None and x_dim is not None:
            x = x.movedim(x_dim, 0)
            # (size, N, T, in) -> (N, size * T, in); one x that all adapters share stays one.
            x = x.flatten(0, 1) if x.ndim == 3 else x.movedim(0, 1).flatten(1, 2)
            y, h = apply(StackedLinear, x, weight, bias, left, right, scale)
            y, h = y.unflatten(1, (size, -1)).movedim(1, 0), h.unflatten(2, (size, -1)).movedim(2, 0)
        else:
            left, right = batch_first(left, left_dim, size), batch_first(right, right_dim, size)
            members = left.shape[1]
            if x_dim is None:
                x = x.squeeze(0) if x.ndim == 3 and members == 1 else x
                x = x if x.ndim == 2 else x.expand(size, *x.shape).flatten(0, 1)
            else:
                x = x.movedim(x_dim, 0)
                x = x.unsqueeze(1).expand(-1, members, -1, -1).flatten(0, 1) if x.ndim == 3 else x.flatten(0, 1)
            left, right = left.flatten(0, 1), right.flatten(0, 1)
            y, h = apply(StackedLinear, x, weight, bias, left, right, scale)
            y, h = y.unflatten(0, (size, members)), h.unflatten(0, (size, members))
        return (y if shift is None else y + shift, h), (0, 0)


def output_tangents(
    ctx: Any, tangents: tuple[Any, ...], rows: tuple[int, ...], thin: Product, wide: Product
) -> tuple[Tensor, Tensor]:
    """The tangents of y and h.

    Args:
        ctx: with x, W, left, right and h, and the scale.
        tangents: of x, W, bias, left and right, each None where there is none.
        rows: the shape of y without its features.
        thin: h from x and right.
        wide: the change without its scale from h and left.
    """
    x, weight, left, right, h = ctx.saved_tensors
    x_t, _, bias_t, left_t, right_t, *_ = tangents
    y_t, h_t = x.new_zeros(*rows, weight.shape[0]), torch.zeros_like(h)
    if x_t is not None:
        y_t, h_t = y_t + F.linear(x_t, weight), h_t + thin(x_t, right)
    if right_t is not None:
        h_t = h_t + thin(x, right_t)
    if left_t is not None:
        y_t = y_t + ctx.scale * wide(h, left_t)
    if bias_t is not None:
        y_t = y_t + bias_t
    return y_t + ctx.scale * wide(h_t, left), h_t


def batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with its batch dimension first, expanded to the batch if it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def vmap_over(function: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Any:
    """`function` over the batch, by torch's vmap rules for the operations in it."""
    tensors = [(t, d) for t, d in zip(inputs, in_dims, strict=True) if d is not None]

    def call(*batched: Tensor) -> Any:
        rest = iter(batched)
        return function(*(t if d is None else next(rest) for t, d in zip(inputs, in_dims, strict=True)))

    return torch.vmap(call, tuple(d for _, d in tensors))(*(t for t, _ in tensors))


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    h = right @ x.mT
    return F.linear(x, weight, bias) + scale * (h.mT @ left.mT), h
