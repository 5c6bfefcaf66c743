"""Transposes, parts and detached views of a weight, which are weights again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..names import getter
from ..slot import Slot, rule


@rule(Tensor.t, torch.t, getter("T"))
def t(input: Slot) -> Any:
    return Slot.of(input.weight.mT) if input.ndim == 2 else NotImplemented


@rule(getter("mT"))
def mt(input: Slot) -> Any:
    return Slot.of(input.weight.mT)


@rule(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims)
def transpose(input: Slot, dim0: int, dim1: int) -> Any:
    last = {input.ndim - 1, input.ndim - 2}
    named = {dim0 % input.ndim, dim1 % input.ndim} if isinstance(dim0, int) and isinstance(dim1, int) else set()
    return Slot.of(input.weight.mT) if named == last and len(last) == 2 else NotImplemented


@rule(Tensor.__getitem__)
def getitem(input: Tensor, index: Any) -> Any:
    if not isinstance(input, Slot) or isinstance(index, Slot):
        return NotImplemented
    one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
    if (input.ndim >= 3 and one) or (input.ndim >= 2 and isinstance(index, slice)):
        return Slot.of(input.weight[index])
    return NotImplemented


@rule(Tensor.detach, torch.detach, getter("data"))
def detach(input: Slot) -> Any:
    # Writes to a detached copy would be lost; a detached slot raises an error for them.
    return Slot.of(input.weight.detach())
