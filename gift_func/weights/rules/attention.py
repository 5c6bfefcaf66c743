"""`F.multi_head_attention_forward`, which reads its weights without calling a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
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
    separate: Sequence[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight and in_proj_weight is not None:
        third = in_proj_weight.shape[0] // 3
        # A slice of a slot is a slot.
        separate = [in_proj_weight[i * third : (i + 1) * third] for i in range(3)]
    out_bias = dense_of(out_proj_bias)
    late = isinstance(out_proj_weight, Slot) and out_proj_weight.weight.needs_input
    if late:
        # Dropout acts on the heads' output, so the projection must come after torch is done.
        passed = torch.eye(embed_dim_to_check, dtype=out_proj_weight.dtype, device=out_proj_weight.device)
    else:
        passed = dense_of(out_proj_weight)
    attended, attention = F.multi_head_attention_forward(
        dense_of(query),
        dense_of(key),
        dense_of(value),
        embed_dim_to_check,
        num_heads,
        None,
        dense_of(in_proj_bias),
        dense_of(bias_k),
        dense_of(bias_v),
        add_zero_attn,
        dropout_p,
        passed,
        None if late else out_bias,
        use_separate_proj_weight=True,
        q_proj_weight=separate[0],
        k_proj_weight=separate[1],
        v_proj_weight=separate[2],
        **kwargs,
    )
    return (weight_of(out_proj_weight).linear(attended, out_bias) if late else attended), attention
