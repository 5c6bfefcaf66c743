"""`F.multi_head_attention_forward`, which reads its weights without calling a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..slot import Slot, dense_of, rule, weight_of


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
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Torch's own function, with every projection left to the weights.

    Torch looks for overrides only among the packed weights. Handed the three parts of a packed
    weight as separate ones, it runs its usual course and meets them again in `F.linear`.
    """
    separate = q_proj_weight, k_proj_weight, v_proj_weight
    if not use_separate_proj_weight and in_proj_weight is not None:
        third = in_proj_weight.shape[0] // 3
        parts = [slice(i * third, (i + 1) * third) for i in range(3)]
        if isinstance(in_proj_weight, Slot):
            separate = tuple(Slot.of(in_proj_weight.weight[part]) for part in parts)  # type: ignore[assignment]
        else:
            separate = tuple(in_proj_weight[part] for part in parts)  # type: ignore[assignment]
    out, out_bias = out_proj_weight, dense_of(out_proj_bias)
    project = isinstance(out, Slot) and out.weight.needs_input
    if project:
        # Dropout acts on the heads' output, so the projection must come after torch is done.
        identity = torch.eye(embed_dim_to_check, dtype=out.dtype, device=out.device)
    attended, weights = F.multi_head_attention_forward(
        *dense_of((query, key, value)),
        embed_dim_to_check,
        num_heads,
        None,
        dense_of(in_proj_bias),
        *dense_of((bias_k, bias_v)),
        add_zero_attn,
        dropout_p,
        identity if project else dense_of(out),
        None if project else out_bias,
        use_separate_proj_weight=True,
        q_proj_weight=separate[0],
        k_proj_weight=separate[1],
        v_proj_weight=separate[2],
        **kwargs,
    )
    if project:
        attended = weight_of(out).linear(attended, out_bias)
    return attended, weights
