"""`functional_call`: runs an adapted model as a pure function of its adapter's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .adapter_dict import AdapterDict
from .errors import StateError, nearest
from .network.module_tree import NamedTensors


class Adapted(Protocol):
    """A model that `functional_call` takes: an `AdaptedModel` or an `Ensemble`."""

    adapter: AdapterDict

    def functional_call(
        self, tensors: NamedTensors, buffers: NamedTensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Its forward on any tensors and buffers."""


def functional_call(
    model: Adapted,
    params: NamedTensors | Sequence[NamedTensors],
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
) -> Any:
    """Call an adapted model, or an ensemble, with other tensors in place of its adapter's; for `torch.func`.

    Neither the model nor its buffers are written to: a BatchNorm in training writes to a copy, or to the buffers that are
    given among `params`.

    Args:
        model: an adapted model; or an ensemble, with stacked tensors.
        params: tensors under global names, as in `named_trainable_parameters()` or `adapter_state_dict()`, or several such
            dicts; names as in `named_parameters()` and `named_buffers()` are accepted too. The other tensors are the
            model's own.
        args: positional arguments; anything but a tuple is a single argument.
        kwargs: keyword arguments.
        strict: require every name of the adapter.

    Returns:
        What the model's forward returns.

    Raises:
        StateError: for an unknown name, a name given twice, or, if strict, a missing one.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), gf.LoRA(rank=1, init="random"))
        >>> params = dict(adapted.named_trainable_parameters())
        >>> loss = lambda params, x: gf.functional_call(adapted, params, (x,)).sum()
        >>> per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, torch.randn(3, 4))
        >>> per_sample["lora_A"].shape
        torch.Size([3, 1, 4])
    """
    if not isinstance(getattr(model, "adapter", None), AdapterDict):
        raise TypeError(f"expected an AdaptedModel, got a {type(model).__name__}; use torch.func.functional_call for others")
    tensors = model.adapter.current()
    given: set[str] = set()
    buffers: dict[str, Tensor] = {}
    names_of_buffers = model.adapter.buffer_names()
    for group in [params] if isinstance(params, Mapping) else params:
        for name, tensor in group.items():
            plain = name
            if name not in tensors and name.startswith("adapter."):
                inner = name.removeprefix("adapter.")
                plain = model.adapter.tree_names.get(inner, inner)
            if plain in given:
                raise StateError(f"{plain!r} is given twice")
            given.add(plain)
            if plain in tensors:
                tensors[plain] = tensor
            elif plain in names_of_buffers:
                buffers[plain] = tensor
            else:
                raise StateError(f"the adapter has no {name!r}; {nearest(name, tensors)}")
    if strict and not given.issuperset(tensors):
        missing = next(name for name in tensors if name not in given)
        raise StateError(f"strict=True needs every tensor of the adapter, and {missing!r} is missing")
    args = () if args is None else args if isinstance(args, tuple) else (args,)
    return model.functional_call(tensors, buffers, args, dict(kwargs or {}))
