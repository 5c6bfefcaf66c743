"""What torch functions do with a routed weight.

A function of a routed weight runs on each segment's samples with that segment's own weight, by the slot rules of a single
adapter, and the outputs are concatenated: so all functions and all methods are supported. A linear layer whose weights are
all low-rank needs a few products for all segments. The sample axis of a tensor is never guessed from its shape: it is
tracked (`tracking.sample_axis`) from the network's input on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import AdaptError
from ..kernels.choice import autocasts
from ..tracking.sample_axis import SampleAxis, Untracked, sample_axis_of, tag
from ..weights import Dense, Slot
from ..weights.call import current
from .by_segment import by_experts, by_segment
from .routed_weight import Placeholder, RoutedWeight, member, one_of_equals
from .segments import Segments

_REMEDY = "Give this call samples of one adapter, bank[name](...)."


class ApartError(Exception):
    """The adapters of a batch cannot share a pass, so there must be one for each."""


def _route(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    product = _PRODUCTS.get(func)
    if product is not None and not kwargs:
        made = product(*args)
        if made is not None:
            return made
    if func is F.multi_head_attention_forward:
        kwargs = _with_padding_of_samples(kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    slots = [leaf for leaf in leaves if isinstance(leaf, RoutedSlot)]
    weight, segments = slots[0].weight, slots[0].segments
    segments.need_tracking()
    _look_for_checkpoints(slots)
    if getattr(func, "__name__", "").endswith("grouped_mm"):
        return by_experts(func, args, kwargs)
    found = [
        (place, sample_axis_of(leaf))
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and not isinstance(leaf, Slot)
    ]
    axes = {place: axis for place, axis in found if isinstance(axis, SampleAxis)}
    untracked = next((axis for _, axis in found if isinstance(axis, Untracked)), None)
    name = getattr(func, "__name__", repr(func))
    if untracked is not None:
        raise AdaptError(
            f"{weight.name!r} differs by sample, and {name} meets it with a tensor whose samples cannot be told apart "
            f"since {untracked.function or 'a function that mixed them'}. {_REMEDY}"
        )
    if not axes:
        for place, _ in found:
            leaf = leaves[place] = one_of_equals(leaves[place], segments.size, 1)
            if _may_be_of_the_batch(leaf, segments.size):
                raise AdaptError(
                    f"{weight.name!r} differs by sample, and {name} meets it with a tensor of shape {tuple(leaf.shape)} in "
                    "which the batch cannot be found: it did not come from the network's input by functions that torch "
                    f"shows (numpy or a scripted function hides it). {_REMEDY}"
                )
        return _each(func, leaves, spec, segments)
    return by_segment(func, leaves, spec, axes, segments)


class RoutedSlot(Placeholder):
    """The slot of a routed weight."""

    route = _route


def _with_padding_of_samples(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of attention with a tagged padding mask, which is `(samples, keys)` even if that was unclear before."""
    mask = kwargs.get("key_padding_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and sample_axis_of(mask) is None and mask.stride(0) != 0:
        return {**kwargs, "key_padding_mask": tag(mask, SampleAxis(0, 1))}
    return kwargs


def _look_for_checkpoints(slots: Sequence[RoutedSlot]) -> None:
    call = current()
    if call is not None and call.grad:
        call.look(slot.weight for slot in slots)
        if call.checkpointed:
            raise ApartError  # the checkpoint runs it again in backward, where the sample axis is unknown


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor | None:
    """The layer for all segments at once; None if its weights are not all low-rank."""
    if not isinstance(weight, RoutedSlot) or isinstance(input, Slot) or isinstance(bias, Slot) or input.ndim < 2:
        return None
    changes, segments = weight.weight.low_rank(transposed), weight.segments
    if changes is None or input.dtype != changes.base.dtype or autocasts(input) or not segments.lead(weight.weight.name, input):
        return None
    _look_for_checkpoints((weight,))
    return changes.linear(segments, input, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor | None:
    return _linear(input, other, None, transposed=True)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> Tensor | None:
    return _linear(mat1, mat2, input, transposed=True) if input.ndim == 1 else None


_PRODUCTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.linear, torch._C._nn.linear), _linear),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
}


def _each(func: Callable[..., Any], leaves: list[Any], spec: Any, segments: Segments) -> Any:
    """A function of routed weights alone, whose tensors are routed weights again."""
    results = []
    for index in range(len(segments.counts)):
        own = [member(leaf, index) for leaf in leaves]
        args, kwargs = tree_unflatten(own, spec)
        results.append(tree_flatten(func(*args, **kwargs)))
    name = next(leaf.weight.name for leaf in leaves if isinstance(leaf, RoutedSlot))
    first, out_spec = results[0]
    made = []
    for place, leaf in enumerate(first):
        if not isinstance(leaf, Tensor):
            made.append(leaf)
            continue
        values = [flat[place] for flat, _ in results]
        weights = [value.weight if isinstance(value, Slot) else Dense(value) for value in values]
        made.append(RoutedSlot.for_call(RoutedWeight(weights, name), segments))
    return tree_unflatten(made, out_spec)


def _may_be_of_the_batch(tensor: Tensor, size: int) -> bool:
    """Whether an untagged tensor may have been made from the batch by a function that a mode does not see."""
    if tensor.ndim == 0 or isinstance(tensor, nn.Parameter):
        return False
    length = tensor.shape[0]
    return tensor.is_floating_point() or tensor.is_complex() or length == size or (tensor.ndim == 1 and length % size == 0)
