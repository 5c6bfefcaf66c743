"""`F.multi_head_attention_forward`, which reads its weights without calling a linear layer.

Torch's own function cannot be called with slots: it checks for overrides first and would come back here,
and Dynamo does not dispatch a second time inside a rule. So it is written again with weights that
do their own projections. Shapes: L target and S source length, N batch, H heads, E embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ...kernels.stacked_attention import attention as scaled_attention
from ..slot import Slot, dense_of, rule
from ..value import Weight, as_weight


@rule(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    bias_k, bias_v = dense_of(bias_k), dense_of(bias_v)
    batched = query.ndim == 3
    if not batched:
        alike = query is key and key is value
        query = query.unsqueeze(1)
        key, value = (query, query) if alike else (key.unsqueeze(1), value.unsqueeze(1))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    batch = query.shape[1]
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask, so attn_mask must be given with it")
    if is_causal and key_padding_mask is None and not need_weights:
        mask = None  # scaled_dot_product_attention makes the causal mask itself
    else:
        mask = _additive(attn_mask, query.dtype)
        is_causal = is_causal and key_padding_mask is None

    bias = dense_of(in_proj_bias)
    if in_proj_weight is not None and query is key and key is value:
        q, k, v = _weight(in_proj_weight).linear(query, bias).chunk(3, dim=-1)
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = _projections(separate if use_separate_proj_weight else in_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (w.linear(x, b) for w, x, b in zip(weights, (query, key, value), biases, strict=True))

    padding = _additive(key_padding_mask, query.dtype)
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.repeat(1, batch, 1)]), torch.cat([v, bias_v.repeat(1, batch, 1)])
        mask, padding = _one_more(mask), _one_more(padding)
    q = _heads(q, num_heads)
    k = _heads(k, num_heads) if static_k is None else static_k
    v = _heads(v, num_heads) if static_v is None else static_v
    if add_zero_attn:
        nothing = torch.zeros(k.shape[0], 1, k.shape[2], dtype=k.dtype, device=k.device)
        k, v = torch.cat([k, nothing], dim=1), torch.cat([v, nothing], dim=1)
        mask, padding = _one_more(mask), _one_more(padding)
    if mask is not None and mask.ndim == 2:
        mask = mask.unsqueeze(0)
    if padding is not None:
        spread = padding.view(batch, 1, 1, -1).expand(-1, num_heads, -1, -1).reshape(batch * num_heads, 1, -1)
        mask = spread if mask is None else mask + spread

    dropout = dropout_p if training else 0.0
    attention: Tensor | None = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
        attention = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout:
            attention = F.dropout(attention, dropout)
        mixed = rearrange(attention @ v, "(n h) l d -> l n (h d)", h=num_heads)
        attention = rearrange(attention, "(n h) l s -> n h l s", h=num_heads)
        attention = attention.mean(dim=1) if average_attn_weights else attention
    else:
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else rearrange(mask, "(n h) l s -> n h l s", h=num_heads)
        q, k, v = (rearrange(t, "(n h) l d -> n h l d", h=num_heads) for t in (q, k, v))
        mixed = rearrange(scaled_attention(q, k, v, mask, dropout, is_causal), "n h l d -> l n (h d)")
    attended = _weight(out_proj_weight).linear(mixed, dense_of(out_proj_bias))
    if not batched:
        attended = attended.squeeze(1)
        attention = None if attention is None else attention.squeeze(0)
    return attended, attention


def _weight(tensor: Tensor) -> Weight:
    return tensor.weight if isinstance(tensor, Slot) else as_weight(tensor)


def _projections(packed: Any) -> list[Weight]:
    """The query's, key's and value's projections, from one packed weight or three."""
    if isinstance(packed, tuple):
        return [_weight(weight) for weight in packed]
    weight = _weight(packed)
    third = weight.shape[0] // 3
    return [weight[i * third : (i + 1) * third] for i in range(3)]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "l n (h d) -> (n h) l d", h=num_heads)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to be added to scores: minus infinity where a boolean one is true."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _one_more(mask: Tensor | None) -> Tensor | None:
    """The mask extended by one source position, which is not masked."""
    return None if mask is None else F.pad(mask, (0, 1))
