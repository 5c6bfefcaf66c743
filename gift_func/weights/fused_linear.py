"""`x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ` in one piece: what a low-rank linear layer costs where there are many tokens.

As separate operations the change is a fresh output, a scaling and an addition, each one more pass over activations in
new memory. Here it is added into the base's own fresh output; only x and the r-wide product are kept. It is the layer of
a stack of adapters whose members are the same one, each with its piece of the tokens: on a CPU the r-wide products of
pieces cost less than those of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._torch import as_batched, batch_of, below_vmap, in_one_vmap, is_batched, is_transformed, whole_numel
from .stacked_linear import StackedLinear
from .value import autocasts

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
    made: Tensor = StackedLinear.apply(x3, weight, bias, left3, right3, scale)[0]  # type: ignore[no-untyped-call]
    return made.view(*x.shape[:-1], weight.shape[0])


def _of_members(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The layer of all members of the only `torch.vmap` under way, outside of it."""
    shape, own = x.shape[:-1], (x, left, right, bias)
    wholes = [t if t is None or not is_batched(t) else batch_of(t) for t in own]
    batched = [t is not None and is_batched(t) for t in own]
    size = next(whole.shape[0] for whole, is_one in zip(wholes, batched, strict=True) if is_one and whole is not None)
    x, left, right, bias = wholes  # type: ignore[assignment]  # the bias alone may be None
    with below_vmap():
        shift = None if bias is None or not batched[3] else bias.unsqueeze(1)
        x = x.reshape(size, -1, x.shape[-1]) if batched[0] else x.reshape(-1, x.shape[-1])
        if batched[1] or batched[2]:
            left, right = (
                t if is_one else t.expand(size, -1, -1) for t, is_one in zip((left, right), batched[1:3], strict=True)
            )
        else:  # a batch of x for one adapter is one longer x
            x, left, right = x.reshape(1, -1, x.shape[-1]), left.unsqueeze(0), right.unsqueeze(0)
        y = StackedLinear.apply(x, weight, None if shift is not None else bias, left, right, scale)[0]  # type: ignore[no-untyped-call]
        if x.ndim == 3 and x.shape[0] == 1 and not (batched[1] or batched[2]):
            y = y.view(size if batched[0] else 1, -1, weight.shape[0])
        y = y if shift is None else y + shift
        y = y.view(size, *shape, weight.shape[0])
    return as_batched(y)
