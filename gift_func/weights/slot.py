"""The slot: a tensor that takes a parameter's place and passes every torch function to a structured weight.

A slot is a NaN placeholder with the parameter's shape, element type and device. A function with a
slot rule calls the weight's methods; any other gets the dense weight; metadata is read from the
placeholder itself; a write is an error. An operation that bypasses all of this computes NaN, which
is noticed, and never silently with the base's value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import AdaptError
from .call import current
from .names import METADATA, WRITES
from .value import Weight

Function = TypeVar("Function", bound=Callable[..., Any])
TorchFunction = Callable[..., Any]

SLOT_RULES: dict[TorchFunction, Callable[..., Any]] = {}


def rule(*functions: TorchFunction) -> Callable[[Function], Function]:
    """Register how torch functions act on slots.

    The rule is called with the torch function's own arguments, some of which are slots
    (`weight_of(argument)` gives their weights), and returns the function's result, or
    `NotImplemented` to let the function run on the dense weights.

    Args:
        functions: as `__torch_function__` sees them: `torch.matmul`, `torch.Tensor.matmul`, `F.linear`, ...

    Example:
        >>> import torch
        >>> from gift_func.weights import rule, weight_of
        >>> @rule(torch.trace)
        ... def trace(weight, weight_of=weight_of):
        ...     return weight_of(weight).dense().diagonal().sum()
    """

    def register(function: Function) -> Function:
        for torch_function in functions:
            SLOT_RULES[torch_function] = function
        return function

    return register


class Slot(Tensor):
    """The placeholder tensor; `weight` is its structured weight."""

    weight: Weight
    _is_param: bool

    @staticmethod
    def of(weight: Weight) -> Slot:
        """A new slot for a weight."""
        fill = float("nan") if weight.dtype.is_floating_point or weight.dtype.is_complex else 0
        made = torch.full((), fill, dtype=weight.dtype, device=weight.device).expand(weight.shape).as_subclass(Slot)
        made.weight = weight
        made._is_param = True  # model code may test for an nn.Parameter, and this is how torch recognizes one
        return made

    @classmethod
    def __torch_function__(
        cls, func: TorchFunction, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not torch.compiler.is_compiling():
            call = current()
            if call is not None and call.grad:
                call.look(_weights_in((*args, *kwargs.values())))
        act = SLOT_RULES.get(func)
        if act is not None:
            result = act(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if not torch.compiler.is_compiling():
            _refuse_writes(func, args, kwargs)
        return func(*dense_tree(args), **dense_tree(kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return f"Slot({self.weight!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        made = memo[id(self)] = Slot.of(self.weight.map(lambda tensor: tensor.detach().clone()))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Slot.of, (self.weight,)


def weight_of(tensor: Tensor) -> Weight:
    """The weight behind a slot.

    Raises:
        TypeError: if the tensor is not a slot.
    """
    if not isinstance(tensor, Slot):
        raise TypeError(f"expected a slot, got a {type(tensor).__name__} of shape {tuple(tensor.shape)}")
    return tensor.weight


def dense_of(argument: Any) -> Any:
    """A slot's dense weight; anything else unchanged."""
    return argument.weight.dense() if isinstance(argument, Slot) else argument


def dense_tree(tree: Any) -> Any:
    """The same arguments with every slot, also in nested lists, replaced by its dense weight."""
    if type(tree) is tuple and not any(isinstance(item, (list, tuple, dict)) for item in tree):
        return tuple(dense_of(item) for item in tree)
    return tree_map_only(Slot, lambda slot: slot.weight.dense(), tree)


def _weights_in(arguments: Iterable[Any]) -> Iterator[Weight]:
    """The weights among a function's arguments, and in lists of them, as RNNs pass theirs."""
    for argument in arguments:
        if isinstance(argument, Slot):
            yield argument.weight
        elif isinstance(argument, (list, tuple)):
            yield from _weights_in(argument)


def _refuse_writes(func: TorchFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    target = kwargs.get("out")
    if target is None and (name in WRITES or (name.endswith("_") and not name.endswith("__"))):
        target = next(iter((*args, *kwargs.values())), None)
    slots = [item for item in (target if isinstance(target, (tuple, list)) else [target]) if isinstance(item, Slot)]
    if slots:
        raise AdaptError(
            f"{name or func!r} would write to an adapted weight of shape {tuple(slots[0].shape)}, which is computed from "
            "the frozen base and the adapter and holds no memory of its own. Change the adapter's tensors instead "
            "(adapted.adapter[...]), or merge() the model and write to the result."
        )
