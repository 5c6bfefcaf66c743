"""Attention of N networks at once, as one longer batch, since `torch.vmap` has no rule for it on every device.

Torch's fused kernels of attention take four dimensions. Under `vmap` the one for CPUs runs once for each member; here the
members' samples are concatenated along the batch of one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch import is_batched
from .function import apply, with_signature
from .stacked_linear import batch_first


@with_signature
class _Folded(torch.autograd.Function):
    """`F.scaled_dot_product_attention` with a vmap rule; called only where `vmap` is the innermost transform."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, options: dict[str, Any]
    ) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        raise AssertionError("only vmap calls this function")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        query, key, value, mask, is_causal, options = inputs
        size = info.batch_size
        query, key, value = (batch_first(t, d, size) for t, d in zip((query, key, value), in_dims[:3], strict=True))
        alone = query.ndim == 3  # (N, L, E): one head of one sample each
        batch = query.shape[1]
        if mask is not None:
            mask = _folded_mask(mask, in_dims[3], size, 1 if query.ndim <= 4 else batch, query.ndim)
        if alone:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        if query.ndim > 4:
            query, key, value = (t.flatten(0, 1) for t in (query, key, value))
            made = attention(query, key, value, mask, 0.0, is_causal, **options)
            return made.unflatten(0, (size, batch)), 0
        made = attention(query, key, value, mask, 0.0, is_causal, **options)
        return (made.squeeze(1) if alone else made), 0


def _folded_mask(mask: Tensor, dim: int | None, size: int, batch: int, ndim: int) -> Tensor:
    """The mask for one longer batch; `ndim` is that of the stacked query."""
    own = mask.ndim - (dim is not None)
    lead = max(ndim, 4) - 1 - own  # how many leading axes the mask leaves to broadcasting
    if dim is None and (ndim <= 4 or lead or mask.shape[0] == 1):
        return mask
    mask = batch_first(mask, dim, size)
    mask = mask[(slice(None), *[None] * lead)]
    if ndim <= 4:
        return mask
    return mask.expand(-1, batch, *mask.shape[2:]).flatten(0, 1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`, in one kernel for all members under `torch.vmap`."""
    alike = query.ndim == key.ndim == value.ndim and query.shape[:-3] == key.shape[:-3] == value.shape[:-3]
    known = alike and 2 <= query.ndim <= 4 and not dropout_p and not torch.compiler.is_compiling()
    if known and any(t is not None and is_batched(t) for t in (query, key, value, attn_mask)):
        made: Tensor = apply(_Folded, query, key, value, attn_mask, is_causal, options)
        return made
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
