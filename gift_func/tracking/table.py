"""The table of rules: for a torch function, where the samples lie in its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights.names import getter
from .layout import KEY, LOST, SampleAxis, Tag, Untracked, merge, placed

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class Batch:
    """What rules know of the whole call.

    Attributes:
        size: the number of samples.
        layouts: the regular layouts met so far, by the size of their axis: candidates for a buffer that is filled by index.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.layouts: dict[int, list[SampleAxis]] = {}

    def note(self, rows: Tag, shape: Sequence[int]) -> None:
        """Remember a layout."""
        if isinstance(rows, SampleAxis) and rows.owners is None:
            known = self.layouts.setdefault(shape[rows.axis], [])
            if all(other.inner != rows.inner for other in known):
                known.append(rows)


class Rule(Protocol):
    """Says where the samples lie in the result: one tag, or a list of tags for a result of several tensors."""

    def __call__(self, batch: Batch, args: Args, kwargs: Kwargs, result: Any, /) -> Any:
        """The tag or tags, given the call's arguments and what the function returned."""


AnyRule = TypeVar("AnyRule", bound=Rule)

RULES: dict[Function, Rule] = {}
TOLERANT: set[Function] = set()
"""Functions whose rule is asked although an argument's samples are lost, since it may be one that does not matter."""

_SPACES = (torch, Tensor, F, torch.special, torch.linalg, torch._C._nn, torch._C._VariableFunctions)


def functions(names: str | Function) -> Iterator[Function]:
    """The torch functions of some names: of torch, its methods and nn.functional; `.mT` is an attribute that is read."""
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


def follows(names: str | Function, tolerant: bool = False) -> Callable[[AnyRule], AnyRule]:
    """Register a rule for all torch functions of some names.

    Args:
        names: `"softmax log_softmax"` are torch's, the methods and nn.functional's; those that torch lacks are skipped. Or one
            function, where functions of one name differ.
        tolerant: ask the rule even if an argument is lost.
    """

    def register(rule: AnyRule) -> AnyRule:
        for function in functions(names):
            RULES[function] = rule
            if tolerant:
                TOLERANT.add(function)
        return rule

    return register


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:
    """An argument by its position or name; numpy's `axis` stands for `dim` in torch too."""
    if len(args) > position:
        return args[position]
    if name in kwargs:
        return kwargs[name]
    return kwargs.get("axis", default) if name == "dim" else default


def tag_of(value: Any) -> Tag:
    """The tag of an argument; None for what is no tensor."""
    if isinstance(value, Tensor):
        found: Tag = value.__dict__.get(KEY)
        return found
    return None


def tensors(args: Args, kwargs: Kwargs) -> Iterator[Tensor]:
    """The tensors among arguments and in their lists."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


def only_first(args: Args, kwargs: Kwargs, name: str = "input") -> tuple[Tensor, Tag]:
    """The first argument with its tag, which is lost if any other argument is of the batch."""
    first = args[0] if args else kwargs[name]
    if len(args) < 3 and not kwargs and not isinstance(args[-1], (Tensor, list, tuple)):
        return first, tag_of(first)
    found = tag_of(first)
    for value in tensors(args, kwargs):
        if value is not first and KEY in value.__dict__:
            return first, LOST
    return first, found


def aligned(tensor: Tensor, shape: Sequence[int], batch: Batch) -> Tag:
    """A tensor's tag in a result of a shape to which it broadcasts."""
    rows = tag_of(tensor)
    if rows is None or isinstance(rows, Untracked):
        return rows
    axis = rows.axis + len(shape) - tensor.dim()
    return placed(rows, axis, tensor.shape[rows.axis], shape[axis], batch.size)


def broadcast(values: Iterator[Any] | Sequence[Any], shape: Sequence[int], batch: Batch) -> Tag:
    """The tag of a result of a shape to which several arguments broadcast."""
    found: Tag = None
    for value in values:
        if isinstance(value, Tensor):
            found = merge(found, aligned(value, shape, batch), shape, batch.size)
            if isinstance(found, Untracked):
                break
    return found


def contract(
    operands: Sequence[tuple[Tensor | None, Sequence[Any]]], out: Sequence[Any], shape: Sequence[int], batch: Batch
) -> Tag:
    """The tag of a product of tensors whose axes are labelled as in an einsum.

    Args:
        operands: tensors, each with a label for every axis; those that are None do not count.
        out: the labels of the result. A sample axis whose label is not there is summed over.
        shape: of the result.
        batch: the call's.
    """
    found: Tag = None
    for tensor, labels in operands:
        rows = tag_of(tensor)
        if rows is None or tensor is None:
            continue
        if isinstance(rows, Untracked) or list(labels).count(labels[rows.axis]) != 1 or labels[rows.axis] not in out:
            return LOST
        axis = list(out).index(labels[rows.axis])
        found = merge(found, placed(rows, axis, tensor.shape[rows.axis], shape[axis], batch.size), shape, batch.size)
    return found
