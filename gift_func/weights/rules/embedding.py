"""`F.embedding` and `F.embedding_bag`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..slot import Slot, rule
from ..value import Weight


@rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    # Renormalising, scaling by frequency and sparse gradients need the dense weight.
    if not isinstance(weight, Slot) or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]

    def pick(rows: Tensor) -> Tensor:
        return F.embedding(input, rows, padding_idx)

    return weight.weight.choose(pick, None if padding_idx is None else input == padding_idx)


@rule(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    # A bag's maximum is not linear in the weight. Torch itself leaves padding out of a bag.
    if not isinstance(weight, Slot) or mode == "max" or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented

    own = weight.weight
    if type(own).choose is not Weight.choose and padding_idx is None and input.numel() < weight.shape[0]:
        # A weight whose rows are not linear in its tensors: look rows up one by one, and put these in bags.
        chosen, flat = torch.arange(input.numel(), device=input.device), input.reshape(-1)
        table, index = own.choose(lambda rows: F.embedding(flat, rows), None), chosen.view(input.shape)
    else:
        table, index = None, input

    def pick(rows: Tensor) -> Tensor:
        return F.embedding_bag(
            index,
            rows,
            offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )

    return own.lookup(pick, None) if table is None else pick(table)
