"""`x·(W + Δ)ᵀ + bias` for a Δ that repeats one block along the inputs in one autograd function, faster for many tokens.

As separate operations the change takes four more passes over activations: summing inputs, a thin product, its addition to
the output, and in backward spreading a gradient over the inputs. `W + Δ` takes one pass over the weight in forward and one in
backward. Autograd would then compute the weight's whole gradient; the block's is a thin product with the summed inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .function import apply, save, with_signature


def forming_pays(tokens: int, rows: int, columns: int) -> bool:
    """Whether the saved passes over activations cost more than computing the weight twice.

    Measured for 384 -> 384: faster at 512 tokens, slower at 256.
    """
    return tokens * (rows + columns) >= 2 * rows * columns


def shared_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """The layer by the fused kernel, where `can_fuse` allows it.

    Args:
        x: `(..., in)`.
        weight: W, `(out, in)`, frozen.
        bias: `(out,)` or None.
        block: `(r, w)`; w divides out. `Δ[o, i] = block[i mod r, o mod w]`.
    """
    rows = weight.shape[0]
    whole = block if block.shape[1] == rows else block.repeat(1, rows // block.shape[1])
    y: Tensor = apply(SharedLinear, x, weight, bias, whole)[0]
    return y


@with_signature
class SharedLinear(torch.autograd.Function):
    """The pair `(y, h)`, h the summed inputs. h is an output because second derivatives flow through it.

    Shapes: x `(..., in)`; W `(out, in)`; bias `(out,)` or None; block `(r, out)`; y `(..., out)`; h `(..., r)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, changed(weight, block), bias), summed_shards(x, block.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, _, block = inputs
        save(ctx, weight, block, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, block, h = ctx.saved_tensors
        grad_x = grad_bias = grad_block = None
        if grad_y is not None:
            rows = grad_y.reshape(-1, grad_y.shape[-1])
            if ctx.needs_input_grad[0]:
                grad_x = grad_y @ changed(weight, block)
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0)
            if ctx.needs_input_grad[3]:
                grad_block = h.reshape(-1, h.shape[-1]).mT @ rows
        if grad_h is not None and ctx.needs_input_grad[0]:
            spread = tiled(grad_h, weight.shape[1])
            grad_x = spread if grad_x is None else grad_x + spread
        return grad_x, None, grad_bias, grad_block

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, weight_t: None, bias_t: Tensor | None, block_t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, block, h = ctx.saved_tensors
        h_t, y_t = torch.zeros_like(h), h.new_zeros(*h.shape[:-1], weight.shape[0])
        if x_t is not None:
            h_t, y_t = h_t + summed_shards(x_t, block.shape[0]), y_t + F.linear(x_t, changed(weight, block))
        if block_t is not None:
            y_t = y_t + h @ block_t
        return (y_t if bias_t is None else y_t + bias_t), h_t


def changed(weight: Tensor, block: Tensor) -> Tensor:
    """W + Δ."""
    rank, columns = block.shape[0], weight.shape[1]
    repeated = block.mT.contiguous()  # read along its rows, as W is
    if columns % rank:
        return weight + tiled(repeated, columns)
    return (weight.reshape(weight.shape[0], -1, rank) + repeated.unsqueeze(-2)).view(weight.shape)


def summed_shards(x: Tensor, rank: int) -> Tensor:
    """`(..., r)`: sums of the features r apart."""
    rest = x.shape[-1] % rank
    whole = x[..., :-rest] if rest else x
    made = whole.reshape(*whole.shape[:-1], -1, rank).sum(-2)
    return made + F.pad(x[..., -rest:], (0, rank - rest)) if rest else made


def tiled(thin: Tensor, columns: int) -> Tensor:
    """`(..., columns)`: features repeated every r, the transpose of `summed_shards`."""
    return thin.repeat(*[1] * (thin.ndim - 1), -(-columns // thin.shape[-1]))[..., :columns]
