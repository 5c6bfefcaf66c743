"""`x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ` in one autograd function, which is faster for many tokens.

As separate operations the change is a new output, a scaling and an addition, each one more pass over activations in
new memory. Here it is added to the base's output in place, and only x and the r-wide product are saved for backward. The
computation is that of a stack of adapters that are all the same, each with a chunk of the tokens: on a CPU the r-wide
products of chunks cost less than those of all tokens.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import as_batched, batch_of, below_vmap, in_one_vmap, is_batched, is_transformed, whole_numel
from .choice import autocasts
from .function import apply
from .stacked_linear import StackedLinear

MIN_TOKENS = 128
"""Tokens from which on the saved passes outweigh a Python function in the graph (measured: slower at 32, faster at 1,024)."""

MIN_TOKENS_TRANSFORMED = 512
"""The same under `torch.func` transforms, where the function costs more (measured: slower at 256, faster at 1,024)."""

CHUNKS, MIN_TOKENS_IN_CHUNKS = 8, 512
"""Number of chunks of tokens, and of tokens from which on (measured on two cores: 4 to 16 chunks are equally fast)."""


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float | Tensor
) -> Tensor | None:
    """The layer by the fused kernel, or None where separate operations are to be used.

    Args:
        x: `(..., in)`.
        weight: W, `(out, in)`, frozen.
        bias: `(out,)` or None.
        left: B, `(out, r)`.
        right: A, `(r, in)`.
        scale: s.
    """
    if torch.compiler.is_compiling():
        return None
    tokens = x.shape[:-1].numel()
    transformed = is_transformed(x) or is_transformed(right) or is_transformed(left)
    if tokens < MIN_TOKENS and right.requires_grad and not transformed and torch.is_grad_enabled():
        return None
    tensors = [x, weight, left, right] if bias is None else [x, weight, left, right, bias]
    if isinstance(scale, Tensor) or weight.requires_grad or x.ndim < 2:
        return None
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != weight.dtype for t in tensors):
        return None
    if autocasts(x) or weight.ndim != 2 or left.ndim != 2:
        return None
    flat = x.reshape(-1, x.shape[-1])
    if transformed or any(map(is_transformed, tensors)):
        # The shapes do not show the batch of a transform, of x or of adapters that share x; whole tensors do.
        batch = max(whole_numel(t) // max(t.numel(), 1) for t in (x, left, right))
        if tokens * batch < MIN_TOKENS_TRANSFORMED:
            return None
        if in_one_vmap(tensors) and not is_transformed(weight):
            return _of_members(x, weight, bias, left, right, scale)
        chunks = 1
    elif not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        y = F.linear(flat, weight, bias)
        y.addmm_(F.linear(flat, right), left.mT, alpha=scale)
        return y.view(*x.shape[:-1], weight.shape[0])
    elif tokens >= MIN_TOKENS:
        chunks = CHUNKS if x.device.type == "cpu" and tokens >= MIN_TOKENS_IN_CHUNKS and tokens % CHUNKS == 0 else 1
    else:
        return None
    x3, left3, right3 = flat.unflatten(0, (chunks, -1)), left.expand(chunks, -1, -1), right.expand(chunks, -1, -1)
    made: Tensor = apply(StackedLinear, x3, weight, bias, left3, right3, scale)[0]
    return made.view(*x.shape[:-1], weight.shape[0])


def _of_members(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The layer for all members of the only active `torch.vmap`, computed outside of it."""
    shape, out = x.shape[:-1], weight.shape[0]
    (x, x_own), (left, left_own), (right, right_own) = map(_whole, (x, left, right))
    shift: Tensor | None = None
    if bias is not None and is_batched(bias):
        shift, bias = batch_of(bias), None
    size = next(
        t.shape[0] for t, own in ((x, x_own), (left, left_own), (right, right_own), (shift, True)) if own and t is not None
    )
    with below_vmap():
        x = x.reshape(size, -1, x.shape[-1]) if x_own else x.reshape(-1, x.shape[-1])
        if left_own or right_own:
            left, right = (t if own else t.expand(size, -1, -1) for t, own in ((left, left_own), (right, right_own)))
            y = apply(StackedLinear, x, weight, bias, left, right, scale)[0]
        else:  # a batch of x for one adapter is one longer x
            longer = x.reshape(1, -1, x.shape[-1])
            y = apply(StackedLinear, longer, weight, bias, left.unsqueeze(0), right.unsqueeze(0), scale)[0]
            y = y.view(-1, prod(shape), out)
        y = (y if shift is None else y + shift.unsqueeze(1)).view(size, *shape, out)
    return as_batched(y)


def _whole(tensor: Tensor) -> tuple[Tensor, bool]:
    """A tensor with vmap's batch as its first dimension, and whether it has one."""
    own = is_batched(tensor)
    return (batch_of(tensor) if own else tensor), own
