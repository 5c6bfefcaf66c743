"""`(x·R)·Wᵀ + bias` for a block-diagonal R: what turning a layer's inputs costs where there are many tokens.

R meets W's rows instead of x's where there are fewer of those, and what is turned is left as a transpose, which the next
product reads as it is. Only x is kept. In backward the gradient of `x·R` gives that of R and, turned back, that of x; of an
orthogonal R with R's gradient from `xᵀ·∂x·R`, so that no activations are turned at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch import is_transformed
from .function import apply, quick

PIECE = 2**16
"""Elements of a piece of activations that stays in a CPU's cache."""


def turned_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, orthogonal: bool) -> Tensor:
    """The layer in one piece; `fuses` says when it may be asked for.

    Args:
        x: `(..., in)`.
        weight: W, `(out, in)`, frozen.
        bias: `(out,)` or None.
        blocks: R's blocks, `(in/b, b, b)`, or `(1, b, b)` if all are one.
        orthogonal: whether they are so exactly, and not nearly.
    """
    blocks = blocks.expand(weight.shape[1] // blocks.shape[-1], -1, -1)
    y: Tensor = apply(TurnedLinear, x.reshape(-1, x.shape[-1]), weight, bias, blocks, orthogonal)
    return y.view(*x.shape[:-1], weight.shape[0])


@quick
class TurnedLinear(torch.autograd.Function):
    """y, `(T, out)`, for x `(T, in)`, W `(out, in)`, bias `(out,)` or None and blocks `(in/b, b, b)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, orthogonal: bool) -> Tensor:
        if weight.shape[0] <= x.shape[0]:
            return F.linear(x, turned(weight, blocks.mT), bias)
        return F.linear(turned(x, blocks), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, blocks, ctx.orthogonal = inputs
        ctx.save_for_backward(x, weight, blocks)
        ctx.save_for_forward(x, weight, blocks)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, blocks = ctx.saved_tensors
        grad_x = grad_blocks = None
        if ctx.orthogonal and ctx.needs_input_grad[0] and weight.shape[0] <= x.shape[0]:
            grad_x = grad_y @ turned(weight, blocks.mT)
            if ctx.needs_input_grad[3]:
                grad_blocks = torch.bmm(apart(x, blocks).mT, apart(grad_x, blocks)) @ blocks
        else:
            grad_x, grad_blocks = turned_back(x, grad_y @ weight, blocks, ctx.needs_input_grad[0])
        return grad_x, None, grad_y.sum(0) if ctx.needs_input_grad[2] else None, grad_blocks, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: None, bias_t: Tensor | None, blocks_t: Tensor | None, _: None) -> Tensor:
        x, weight, blocks = ctx.saved_tensors
        through = torch.zeros_like(x) if x_t is None else turned(x_t, blocks)
        if blocks_t is not None:
            through = through + turned(x, blocks_t)
        return F.linear(through, weight, bias_t)


def apart(rows: Tensor, blocks: Tensor) -> Tensor:
    """`(T, in)` as `(in/b, T, b)`."""
    return rows.view(-1, *blocks.shape[:2]).transpose(0, 1)


def turned(rows: Tensor, blocks: Tensor) -> Tensor:
    """`rows @ R`, made as its transpose: each block's products lie behind each other, and need not be put between others'."""
    return torch.bmm(blocks.mT, apart(rows, blocks).mT).flatten(0, 1).mT


def turned_back(x: Tensor, through: Tensor, blocks: Tensor, with_x: bool) -> tuple[Tensor | None, Tensor]:
    """From the gradient of `x·R`, those of x, where it is asked for, and of R's blocks."""
    columns, parts, back = apart(x, blocks).mT, apart(through, blocks), blocks.mT
    if not with_x:
        return None, torch.bmm(columns, parts)
    if torch.is_grad_enabled() or any(map(is_transformed, (x, through, blocks))):
        return torch.bmm(parts, back).transpose(0, 1).reshape(x.shape), torch.bmm(columns, parts)
    # In place, and piece by piece while it is still in a cache: new memory costs more than the products do.
    tokens = max(1, PIECE // x.shape[1]) if x.device.type == "cpu" else x.shape[0]
    grad_blocks = through.new_zeros(blocks.shape)
    for column, part in zip(columns.split(tokens, 2), parts.split(tokens, 1), strict=True):
        grad_blocks.baddbmm_(column, part)
        part.copy_(torch.bmm(part, back))
    return through, grad_blocks
