"""`x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ` in one piece: what a low-rank linear layer costs where there are many tokens.

As separate operations the change is a fresh output, a scaling and an addition, each one more pass over activations in
new memory. Here it is added into the base's own fresh output; only x and the r-wide product are kept. It is the layer of
a stack of adapters whose members are the same one, each with its piece of the tokens: on a CPU the r-wide products of
pieces cost less than those of the whole.
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

MANY = 128
"""Tokens from which on the saved passes are worth a Python function in the graph (measured: 32 lose, 1,024 win)."""

MANY_TRANSFORMED = 512
"""The same under `torch.func` transforms, whose machinery costs more (measured: 256 lose, 1,024 win)."""

PIECES, MANY_PIECES = 8, 512
"""Into how many pieces the tokens are cut, and from how many tokens on (measured on two cores: 4 to 16 gain alike)."""


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
    if torch.compiler.is_compiling():
        return None
    tokens = x.shape[:-1].numel()
    transformed = is_transformed(x) or is_transformed(right) or is_transformed(left)
    if tokens < MANY and right.requires_grad and not transformed and torch.is_grad_enabled():
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
        # A batch of x, or of adapters that share x, is hidden in the tensors' wholes.
        batch = max(whole_numel(t) // max(t.numel(), 1) for t in (x, left, right))
        if tokens * batch < MANY_TRANSFORMED:
            return None
        if in_one_vmap(tensors) and not is_transformed(weight):
            return _of_members(x, weight, bias, left, right, scale)
        pieces = 1
    elif not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        y = F.linear(flat, weight, bias)
        y.addmm_(F.linear(flat, right), left.mT, alpha=scale)
        return y.view(*x.shape[:-1], weight.shape[0])
    elif tokens >= MANY:
        pieces = PIECES if x.device.type == "cpu" and tokens >= MANY_PIECES and tokens % PIECES == 0 else 1
    else:
        return None
    x3, left3, right3 = flat.unflatten(0, (pieces, -1)), left.expand(pieces, -1, -1), right.expand(pieces, -1, -1)
    made: Tensor = apply(StackedLinear, x3, weight, bias, left3, right3, scale)[0]
    return made.view(*x.shape[:-1], weight.shape[0])


def _of_members(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The layer of all members of the only `torch.vmap` under way, outside of it."""
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
    """A tensor with the batch that hides in it first, and whether there is one."""
    own = is_batched(tensor)
    return (batch_of(tensor) if own else tensor), own
