"""`(x·R)·Wᵀ + bias` for a block-diagonal R in one autograd function, which is faster for many tokens.

W is multiplied by R instead of x if it has fewer rows, and the product stays a transposed view, which the next product
reads without a copy. Only x is saved for backward, where the gradient of `x·R` gives those of R and, times Rᵀ, of x. For an
exactly orthogonal R the gradient of R is `xᵀ·∂x·R`, so no activations are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch import is_transformed
from .function import apply, save, with_signature

CHUNK = 2**16
"""Elements of a chunk of activations that fits in a CPU's cache."""


def rotated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, orthogonal: bool) -> Tensor:
    """The layer by the fused kernel, where `can_fuse` allows it.

    Args:
        x: `(..., in)`.
        weight: W, `(out, in)`, frozen.
        bias: `(out,)` or None.
        blocks: R's blocks, `(in/b, b, b)`, or `(1, b, b)` if all are the same.
        orthogonal: whether they are exactly orthogonal.
    """
    blocks = blocks.expand(weight.shape[1] // blocks.shape[-1], -1, -1)
    y: Tensor = apply(RotatedLinear, x.reshape(-1, x.shape[-1]), weight, bias, blocks, orthogonal)
    return y.view(*x.shape[:-1], weight.shape[0])


@with_signature
class RotatedLinear(torch.autograd.Function):
    """y, `(T, out)`, for x `(T, in)`, W `(out, in)`, bias `(out,)` or None and blocks `(in/b, b, b)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, orthogonal: bool) -> Tensor:
        if weight.shape[0] <= x.shape[0]:
            return F.linear(x, rotated(weight, blocks.mT), bias)
        return F.linear(rotated(x, blocks), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, blocks, ctx.orthogonal = inputs
        save(ctx, x, weight, blocks)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, blocks = ctx.saved_tensors
        grad_x = grad_blocks = None
        if ctx.orthogonal and ctx.needs_input_grad[0] and weight.shape[0] <= x.shape[0]:
            grad_x = grad_y @ rotated(weight, blocks.mT)
            if ctx.needs_input_grad[3]:
                grad_blocks = torch.bmm(by_block(x, blocks).mT, by_block(grad_x, blocks)) @ blocks
        else:
            grad_x, grad_blocks = rotation_gradients(x, grad_y @ weight, blocks, ctx.needs_input_grad[0])
        return grad_x, None, grad_y.sum(0) if ctx.needs_input_grad[2] else None, grad_blocks, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: None, bias_t: Tensor | None, blocks_t: Tensor | None, _: None) -> Tensor:
        x, weight, blocks = ctx.saved_tensors
        through = torch.zeros_like(x) if x_t is None else rotated(x_t, blocks)
        if blocks_t is not None:
            through = through + rotated(x, blocks_t)
        return F.linear(through, weight, bias_t)


def by_block(rows: Tensor, blocks: Tensor) -> Tensor:
    """`(T, in)` as `(in/b, T, b)`."""
    return rows.view(-1, *blocks.shape[:2]).transpose(0, 1)


def rotated(rows: Tensor, blocks: Tensor) -> Tensor:
    """`rows @ R`, computed as its transpose, in which the output of each block is contiguous and needs no interleaving."""
    return torch.bmm(blocks.mT, by_block(rows, blocks).mT).flatten(0, 1).mT


def rotation_gradients(x: Tensor, through: Tensor, blocks: Tensor, with_x: bool) -> tuple[Tensor | None, Tensor]:
    """The gradients of x, if it is needed, and of R's blocks, from the gradient of `x·R`."""
    columns, parts, back = by_block(x, blocks).mT, by_block(through, blocks), blocks.mT
    if not with_x:
        return None, torch.bmm(columns, parts)
    if torch.is_grad_enabled() or any(map(is_transformed, (x, through, blocks))):
        return torch.bmm(parts, back).transpose(0, 1).reshape(x.shape), torch.bmm(columns, parts)
    # In place, and in chunks that are still in a cache: new memory costs more than the products.
    tokens = max(1, CHUNK // x.shape[1]) if x.device.type == "cpu" else x.shape[0]
    grad_blocks = through.new_zeros(blocks.shape)
    for column, part in zip(columns.split(tokens, 2), parts.split(tokens, 1), strict=True):
        grad_blocks.baddbmm_(column, part)
        part.copy_(torch.bmm(part, back))
    return through, grad_blocks
