"""`x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ` in one piece: what a low-rank linear layer costs where there are many tokens.

As separate operations the change is a fresh output, a scaling and an addition, each one more pass over
activations in new memory. Here it is added into the base's own fresh output; only x and the r-wide
product are kept; the r-wide products are formed in the order that reads x by rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._torch import is_transformed, whole_numel
from .stacked_linear import StackedLinear, front, over
from .value import autocasts

MANY = 128
"""Tokens from which on the saved passes are worth a Python function in the graph (measured: 32 lose, 1,024 win)."""

MANY_TRANSFORMED = 512
"""The same under `torch.func` transforms, whose machinery costs more (measured: 256 lose, 1,024 win)."""


class _LowRankLinear(torch.autograd.Function):
    """The pair `(y, h)`, `h = A·xᵀ`. h is an output because second derivatives flow through it."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        h = right @ x.mT
        y = F.linear(x, weight, bias)
        y.addmm_(h.mT, left.mT, alpha=scale)
        return y, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, left, right, ctx.scale = inputs
        ctx.save_for_backward(x, weight, left, right, output[1])
        ctx.save_for_forward(x, weight, left, right, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, left, right, h = ctx.saved_tensors
        grad_x = grad_bias = grad_left = grad_right = None
        if grad_y is not None:
            thin = left.mT @ grad_y.mT
            thin = thin * ctx.scale if grad_h is None else torch.add(grad_h, thin, alpha=ctx.scale)
            grad_bias = grad_y.sum(0) if ctx.needs_input_grad[2] else None
            grad_left = (h @ grad_y).mT * ctx.scale if ctx.needs_input_grad[3] else None
        elif grad_h is not None:
            thin = grad_h
        else:
            return None, None, None, None, None, None
        if ctx.needs_input_grad[4]:
            grad_right = thin @ x
        if ctx.needs_input_grad[0]:
            grad_x = thin.mT @ right if grad_y is None else _through(grad_y, weight, thin, right)
        return grad_x, None, grad_bias, grad_left, grad_right, None

    @staticmethod
    def jvp(
        ctx: Any,
        x_t: Tensor | None,
        weight_t: None,
        bias_t: Tensor | None,
        left_t: Tensor | None,
        right_t: Tensor | None,
        _: None,
    ) -> tuple[Tensor, Tensor]:
        x, weight, left, right, h = ctx.saved_tensors
        h_t = torch.zeros_like(h)
        y_t = x.new_zeros(x.shape[0], weight.shape[0])
        if x_t is not None:
            h_t, y_t = h_t + right @ x_t.mT, y_t + F.linear(x_t, weight)
        if right_t is not None:
            h_t = h_t + right_t @ x.mT
        if left_t is not None:
            y_t = y_t + ctx.scale * (h.mT @ left_t.mT)
        if bias_t is not None:
            y_t = y_t + bias_t
        return y_t + ctx.scale * (h_t.mT @ left.mT), h_t

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """A batch of x is one longer x; a batch of adapters is a stack."""
        x, weight, bias, left, right, scale = inputs
        x_dim, weight_dim, bias_dim, left_dim, right_dim, _ = in_dims
        size = info.batch_size
        if weight_dim is not None:
            return over(_plain, in_dims, inputs), (0, 0)
        shift: Tensor | None = None
        if bias_dim is not None:
            shift, bias = bias.movedim(bias_dim, 0).unsqueeze(1), None
        if left_dim is None and right_dim is None and x_dim is not None:
            y, h = _LowRankLinear.apply(x.movedim(x_dim, 0).flatten(0, 1), weight, bias, left, right, scale)  # type: ignore[no-untyped-call]
            y, h = y.unflatten(0, (size, -1)), h.unflatten(1, (size, -1)).movedim(1, 0)
        else:
            x = x if x_dim is None else x.movedim(x_dim, 0)
            left, right = front(left, left_dim, size), front(right, right_dim, size)
            y, h = StackedLinear.apply(x, weight, bias, left, right, scale)  # type: ignore[no-untyped-call]
        return (y if shift is None else y + shift, h), (0, 0)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    h = right @ x.mT
    return F.linear(x, weight, bias) + scale * (h.mT @ left.mT), h


def _through(grad_y: Tensor, weight: Tensor, thin: Tensor, right: Tensor) -> Tensor:
    """`grad_y·W + thinᵀ·A`: the gradient of x."""
    grad_x = grad_y @ weight
    return torch.addmm(grad_x, thin.mT, right) if torch.is_grad_enabled() else grad_x.addmm_(thin.mT, right)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float | Tensor
) -> Tensor | None:
    """The layer in one piece, or None where the separate operations are to be used.

    Args:
        x: `(..., in)`.
        weight: W, `(out, in)`, frozen.
        bias: `(out,)` or None.
        left: B, `(out, r)`.
        right: A, `(r, in)`.
        scale: s.
    """
    tensors = [x, weight, left, right] if bias is None else [x, weight, left, right, bias]
    if torch.compiler.is_compiling() or isinstance(scale, Tensor) or weight.requires_grad or x.ndim < 2:
        return None
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != weight.dtype for t in tensors):
        return None
    if autocasts(x) or weight.ndim != 2 or left.ndim != 2:
        return None
    flat = x.reshape(-1, x.shape[-1])
    if any(map(is_transformed, tensors)):
        # A batch of x, or of adapters that share x, is hidden in the tensors' wholes.
        batch = max(whole_numel(t) // max(t.numel(), 1) for t in (x, left, right))
        if flat.shape[0] * batch < MANY_TRANSFORMED:
            return None
        y = _LowRankLinear.apply(flat, weight, bias, left, right, scale)[0]  # type: ignore[no-untyped-call]
    elif not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        y = F.linear(flat, weight, bias)
        y.addmm_(F.linear(flat, right), left.mT, alpha=scale)
    elif flat.shape[0] >= MANY:
        y = _LowRankLinear.apply(flat, weight, bias, left, right, scale)[0]  # type: ignore[no-untyped-call]
    else:
        return None
    made: Tensor = y.view(*x.shape[:-1], weight.shape[0])
    return made
