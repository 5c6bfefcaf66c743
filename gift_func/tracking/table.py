"""The table of rules, which say for a torch function where the samples lie in its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights.names import getter
from ..weights.slot import TorchFunction
from .layout import TAG_KEY, UNTRACKED, SampleAxis, Tag, Untracked, merge, placed

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class BatchInfo:
    """What rules know of the batch.

    Attributes:
        size: the number of samples.
        layouts: the sample axes without owners so far, by their size: candidates for a buffer that is written to by index.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.layouts: dict[int, list[SampleAxis]] = {}

    def note(self, tag: Tag, shape: Sequence[int]) -> None:
        """Remember the sample axis of a tensor of this shape, if it has no owners."""
        if isinstance(tag, SampleAxis) and tag.owners is None:
            known = self.layouts.setdefault(shape[tag.axis], [])
            if all(other.inner != tag.inner for other in known):
                known.append(tag)


TrackingRule = Callable[[BatchInfo, Args, Kwargs, Any], Any]
"""Returns the tag of a torch function's result, or a list of tags for several tensors, given its arguments and the result."""

AxisRule = Callable[[Tensor, SampleAxis, BatchInfo, Args, Kwargs, Any], Any]
"""A rule that is also given the first argument and its sample axis."""

AnyTrackingRule = TypeVar("AnyTrackingRule", bound=TrackingRule)

TRACKING_RULES: dict[TorchFunction, TrackingRule] = {}
TOLERANT: set[TorchFunction] = set()
"""Functions whose rule is called even if an argument is untracked, since the result may not depend on that argument."""

_SPACES = (torch, Tensor, F, torch.special, torch.linalg, torch._C._nn, torch._C._VariableFunctions)


def functions(names: str | TorchFunction) -> Iterator[TorchFunction]:
    """The torch functions with these names: of torch, Tensor and nn.functional; `.mT` is reading an attribute."""
    if not isinstance(names, str):
        yield names
        return
    for name in names.split():
        if name.startswith("."):
            yield getter(name[1:])
            continue
        for space in _SPACES:
            function = getattr(space, name, None)
            if callable(function):
                yield function


def rule_for(names: str | TorchFunction, tolerant: bool = False) -> Callable[[AnyTrackingRule], AnyTrackingRule]:
    """Register a rule for all torch functions with these names.

    Args:
        names: such as `"softmax log_softmax"`: the functions of torch, Tensor and nn.functional with these names, of which some
            need not exist. Or one function, where functions of one name differ.
        tolerant: call the rule even if an argument is untracked.
    """

    def register(rule: AnyTrackingRule) -> AnyTrackingRule:
        for function in functions(names):
            TRACKING_RULES[function] = rule
            if tolerant:
                TOLERANT.add(function)
        return rule

    return register


def axis_rule(rule: AxisRule) -> TrackingRule:
    """The rule for functions of one tensor with a sample axis; if another argument has a tag, the result is untracked."""

    def checked(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Any:
        x, tag = only_first(args, kwargs)
        return rule(x, tag, batch, args, kwargs, result) if isinstance(tag, SampleAxis) else tag

    return checked


def axis_rule_for(names: str | TorchFunction) -> Callable[[AxisRule], TrackingRule]:
    """Register an `axis_rule` for all torch functions with these names."""
    return lambda rule: rule_for(names)(axis_rule(rule))


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:
    """An argument by its position or name; numpy's `axis` stands for `dim` in torch too."""
    if len(args) > position:
        return args[position]
    if name in kwargs:
        return kwargs[name]
    return kwargs.get("axis", default) if name == "dim" else default


def tag_of(value: Any) -> Tag:
    """The tag of an argument; None if it is no tensor."""
    found: Tag = value.__dict__.get(TAG_KEY) if isinstance(value, Tensor) else None
    return found


def tensors(args: Args, kwargs: Kwargs) -> Iterator[Tensor]:
    """The tensors among arguments and in their lists."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


def only_first(args: Args, kwargs: Kwargs) -> tuple[Tensor, Tag]:
    """The first argument and its tag, or `UNTRACKED` if another argument has a tag."""
    first = args[0] if args else kwargs["input"]
    if len(args) < 3 and not kwargs and not isinstance(args[-1], (Tensor, list, tuple)):
        return first, tag_of(first)
    if any(value is not first and TAG_KEY in value.__dict__ for value in tensors(args, kwargs)):
        return first, UNTRACKED
    return first, tag_of(first)


def aligned(tensor: Tensor, shape: Sequence[int], batch: BatchInfo) -> Tag:
    """A tensor's tag after it is broadcast to a shape."""
    tag = tag_of(tensor)
    if tag is None or isinstance(tag, Untracked):
        return tag
    axis = tag.axis + len(shape) - tensor.dim()
    return placed(tag, axis, tensor.shape[tag.axis], shape[axis], batch.size)


def broadcast(operands: Iterable[Tensor], shape: Sequence[int], batch: BatchInfo) -> Tag:
    """The tag of a result for which several tensors are broadcast to a shape."""
    found: Tag = None
    for tensor in operands:
        found = merge(found, aligned(tensor, shape, batch), shape, batch.size)
    return found


def contract(
    operands: Sequence[tuple[Tensor | None, Sequence[Any]]], out: Sequence[Any], shape: Sequence[int], batch: BatchInfo
) -> Tag:
    """The tag of a product of tensors whose axes are labelled as in an einsum.

    Args:
        operands: tensors, each with a label for every axis; None is skipped.
        out: the labels of the result. A sample axis whose label is not among them is summed over.
        shape: of the result.
        batch: the call's batch.
    """
    found: Tag = None
    for tensor, labels in operands:
        tag = tag_of(tensor)
        if tag is None or tensor is None:
            continue
        if isinstance(tag, Untracked) or list(labels).count(labels[tag.axis]) != 1 or labels[tag.axis] not in out:
            return UNTRACKED
        axis = list(out).index(labels[tag.axis])
        found = merge(found, placed(tag, axis, tensor.shape[tag.axis], shape[axis], batch.size), shape, batch.size)
    return found
