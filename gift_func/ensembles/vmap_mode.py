"""Functions that `torch.vmap` has no good rule for, run for all members: decisions by values, and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import batch_of, is_batched, vmap_level
from ..kernels.stacked_attention import attention

_QUESTIONS: frozenset[Callable[..., Any]] = frozenset(
    [Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item]
)


class DisagreementError(Exception):
    """The network read a value in which the members differ.

    Attributes:
        groups: the indices of the members, grouped by value.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__("the network decides by a value in which the members differ")
        by_value: dict[Any, list[int]] = {}
        for index, value in enumerate(values):
            by_value.setdefault(value, []).append(index)
        self.groups = list(by_value.values())


class VmapMode(TorchFunctionMode):
    """Active inside a `torch.vmap` over members; it must be made there.

    A network may read a value (transformers tests whether a mask masks anything) if it is the same for all members.
    """

    def __init__(self) -> None:
        super().__init__()
        self._level = vmap_level()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS and is_batched(args[0]) and vmap_level() == self._level and args[0].numel() == 1:
            return func(_agreed(args[0]))
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


def _agreed(tensor: Tensor) -> Tensor:
    values = batch_of(tensor).detach().flatten()
    if not bool((values == values[0]).all()):
        raise DisagreementError(values.tolist())
    return values[0]
