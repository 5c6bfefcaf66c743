"""`v ⊙ g + b`: activations times a gain for each feature, in as few passes as possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._torch import is_transformed
from .function import apply, save, with_signature

MIN_ELEMENTS = 2**18
"""Elements from which on a saved pass outweighs a Python function in the graph (measured: slower at 2^17, faster at 2^19)."""


def apply_gain(v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """`v ⊙ g + b` in v's element type, computed in the wider of v's and g's.

    Args:
        v: the activations, which nothing else uses: without gradients they are overwritten.
        gain: g, of a shape that broadcasts to v's.
        bias: b, likewise, or None.
    """
    tensors = [v, gain] if bias is None else [v, gain, bias]
    if any(t.dtype != v.dtype for t in tensors):
        y = (v * gain).to(v.dtype)
        return y if bias is None else y + bias.to(y.dtype)  # autocast does not convert the bias
    if torch.compiler.is_compiling() or any(type(t) not in (Tensor, nn.Parameter) or is_transformed(t) for t in tensors):
        return _separately(v, gain, bias)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        v.mul_(gain)
        return v if bias is None else v.add_(bias)
    if v.numel() < MIN_ELEMENTS:
        return _separately(v, gain, bias)
    made: Tensor = apply(Gain, v, gain, bias)
    return made


def _separately(v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    return v * gain if bias is None else torch.addcmul(bias, v, gain)


@with_signature
class Gain(torch.autograd.Function):
    """`v ⊙ g + b` with a backward that allocates one new tensor of v's size, where torch's allocates two."""

    @staticmethod
    def forward(v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return _separately(v, gain, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        v, gain, bias = inputs
        ctx.shift = None if bias is None else bias.shape
        save(ctx, v, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, gain = ctx.saved_tensors
        of_v, of_gain, of_bias = ctx.needs_input_grad
        grad_v = grad_gain = room = None
        if of_gain:
            product = grad * v
            grad_gain = product.sum_to_size(gain.shape)
            room = None if torch.is_grad_enabled() or is_transformed(product) else product
        if of_v:
            grad_v = grad * gain if room is None else torch.mul(grad, gain, out=room)
        return grad_v, grad_gain, grad.sum_to_size(ctx.shift) if of_bias else None

    @staticmethod
    def jvp(ctx: Any, v_t: Tensor | None, gain_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        v, gain = ctx.saved_tensors
        moved = torch.zeros_like(v) if v_t is None else v_t * gain
        moved = moved if gain_t is None else moved + v * gain_t
        return moved if bias_t is None else moved + bias_t
