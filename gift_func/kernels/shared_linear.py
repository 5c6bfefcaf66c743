"""`x·(W + Δ)ᵀ + bias` for a Δ that repeats one block along the inputs: what such a layer costs where there are many tokens.

Beside W, the change is four more passes over activations: inputs added up, a thin product, its addition to the outputs, and
in backward a gradient spread over the inputs. `W + Δ` is one pass over the weight, in forward and again in backward. Autograd
would then ask for the weight's whole gradient; the block's own is a thin product with the inputs added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .function import apply, quick


def is_worth(tokens: int, rows: int, columns: int) -> bool:
    """Whether the passes over activations that are saved cost more than forming the weight twice does.

    Measured: 512 tokens of 384 -> 384 gain, 256 lose.
    """
    return tokens * (rows + columns) >= 2 * rows * columns


def shared_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """The layer in one piece; `fuses` says when it may be asked for.

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


@quick
class SharedLinear(torch.autograd.Function):
    """The pair `(y, h)`, h the inputs added up. h is an output because second derivatives flow through it.

    Shapes: x `(..., in)`; W `(out, in)`; bias `(out,)` or None; block `(r, out)`; y `(..., out)`; h `(..., r)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, changed(weight, block), bias), gathered(x, block.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, _, block = inputs
        ctx.save_for_backward(weight, block, output[1])
        ctx.save_for_forward(weight, block, output[1])
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
            h_t, y_t = h_t + gathered(x_t, block.shape[0]), y_t + F.linear(x_t, changed(weight, block))
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


def gathered(x: Tensor, rank: int) -> Tensor:
    """`(..., r)`: features r apart added up."""
    rest = x.shape[-1] % rank
    whole = x[..., :-rest] if rest else x
    made = whole.reshape(*whole.shape[:-1], -1, rank).sum(-2)
    return made + F.pad(x[..., -rest:], (0, rank - rest)) if rest else made


def tiled(thin: Tensor, columns: int) -> Tensor:
    """`(..., columns)`: the transpose of `gathered`, features repeated every r."""
    return thin.repeat(*[1] * (thin.ndim - 1), -(-columns // thin.shape[-1]))[..., :columns]
