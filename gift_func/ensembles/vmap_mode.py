"""What `torch.vmap` would refuse or take apart, done for all members: decisions by values, and attention."""

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
    """The network asked for a value in which the members differ.

    Attributes:
        groups: the members' places, those of one value together.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__("the network decides by a value in which the members differ")
        places: dict[Any, list[int]] = {}
        for place, value in enumerate(values):
            places.setdefault(value, []).append(place)
        self.groups = list(places.values())


class VmapMode(TorchFunctionMode):
    """Inside of one `torch.vmap` over members: made when it has begun.

    A network that decides by a value (transformers looks whether a mask masks anything) is answered if the answer is one
    for all members, as each alone would be.
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
