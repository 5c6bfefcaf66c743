"""Lays the tensors of several adapters next to each other in memory, so that they are one stack without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .._torch import is_transformed, lasting_outside
from ..adapter import Adapter
from ..kernels.function import apply
from ..network.frozen_base import FrozenBase


def side_by_side(adapters: Sequence[Adapter], base: FrozenBase | None = None) -> list[Adapter]:
    """The same adapters with copied tensors, those of one name and shape next to each other in memory.

    Args:
        adapters: adapters of bases that share their tensors.
        base: the base of the copies; None for each adapter's own.
    """
    copies: list[dict[str, Tensor]] = [dict(adapter.tensors) for adapter in adapters]
    for name, indices in _alike(adapters):
        with lasting_outside(), torch.no_grad():
            stack = torch.stack([adapters[index].tensors[name] for index in indices])
        for index, tensor in zip(indices, stack.unbind(0), strict=True):
            copies[index][name] = nn.Parameter(tensor.detach(), requires_grad=adapters[index].tensors[name].requires_grad)
    return [adapter.replace_tensors(tensors, base) for adapter, tensors in zip(adapters, copies, strict=True)]


def lay_side_by_side(adapters: Sequence[Adapter]) -> None:
    """Move the tensors of adapters next to each other in memory, unless they are; the parameters stay the same objects."""
    for name, indices in _alike(adapters):
        tensors = [adapters[index].tensors[name] for index in indices]
        if not lies_stacked(tensors):
            with lasting_outside(), torch.no_grad():
                stack = torch.stack(tensors)
            for tensor, moved in zip(tensors, stack.unbind(0), strict=True):
                tensor.data = moved
    for adapter in adapters:
        adapter.clear_cached_weights()


def _alike(adapters: Sequence[Adapter]) -> Iterator[tuple[str, list[int]]]:
    """For all tensors of one name, shape, dtype and device the name, and the indices of the adapters."""
    groups: dict[tuple[str, torch.Size, torch.dtype, torch.device], list[int]] = {}
    for index, adapter in enumerate(adapters):
        for name, tensor in adapter.tensors.items():
            groups.setdefault((name, tensor.shape, tensor.dtype, tensor.device), []).append(index)
    return ((name, indices) for (name, *_), indices in groups.items())


def stacked(tensors: Sequence[Tensor], lasting: bool = False) -> Tensor:
    """Tensors of one shape as one stack, `(K, ...)`; without a copy if they are at equal distances in one memory.

    Args:
        tensors: the tensors.
        lasting: keep a stack without a copy usable after the tensors were written to, as by an optimizer. Autograd then
            does not detect writes between forward and backward.
    """
    parts = None if lasting else _parts_of_stack(tensors)
    if parts is not None:
        return parts
    if len(tensors) == 1 and not lasting:
        return tensors[0].unsqueeze(0)
    if any(map(is_transformed, tensors)):
        return torch.stack(list(tensors))
    made: Tensor = apply(_Stack, lasting, *tensors)
    return made


def _parts_of_stack(tensors: Sequence[Tensor]) -> Tensor | None:
    """The stacked parameter that the tensors are views of, or a selection of it; None if they are no such views."""
    whole = tensors[0]._base
    if whole is None or not isinstance(whole, nn.Parameter) or any(tensor._base is not whole for tensor in tensors):
        return None
    shape, strides = tensors[0].shape, tensors[0].stride()
    for stack in (whole, whole.mT) if whole.ndim > 2 else (whole,):
        offsets = [divmod(int(tensor.storage_offset() - stack.storage_offset()), stack.stride(0)) for tensor in tensors]
        if stack.shape[1:] == shape and stack.stride()[1:] == strides and not any(remainder for _, remainder in offsets):
            index = [place for place, _ in offsets]
            if index == list(range(len(stack))):
                return stack
            return stack.index_select(0, torch.tensor(index, device=stack.device))
    return None


def lies_stacked(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape are at equal distances in one memory."""
    first, second = tensors[0], tensors[1] if len(tensors) > 1 else tensors[0]
    step = second.data_ptr() - first.data_ptr()
    storage, strides = first.untyped_storage().data_ptr(), first.stride()
    start = first.data_ptr()
    return step >= 0 and all(
        tensor.data_ptr() == start + index * step
        and tensor.stride() == strides
        and tensor.untyped_storage().data_ptr() == storage
        for index, tensor in enumerate(tensors)
    )


class _Stack(torch.autograd.Function):
    """`torch.stack`, but a view of tensors that are a stack in memory, and with contiguous gradients."""

    @staticmethod
    def forward(ctx: object, lasting: bool, *tensors: Tensor) -> Tensor:
        if not lies_stacked(tensors):
            return torch.stack(tensors)
        first, second = tensors[0].data if lasting else tensors[0].detach(), tensors[min(1, len(tensors) - 1)]
        step = (second.data_ptr() - first.data_ptr()) // first.element_size()
        return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd copies gradients that are not laid out as the parameters.
        return None, *grad.contiguous().unbind(0)
