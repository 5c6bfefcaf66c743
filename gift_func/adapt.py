"""`adapt`: a model and a strategy in, an adapted model out, the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdaptedModel
from .base import FrozenBase, as_tensor
from .body import Part
from .errors import AdaptError
from .methods import Full, Method
from .strategy import Placement, Strategy
from .structure import Structure, clone
from .surgery import Rules, caps_of, is_protocol, operate


def adapt(
    model: nn.Module | FrozenBase,
    strategy: Method | Mapping[str, Method] | Strategy | Iterable[Any] | Rules,
    *,
    generator: torch.Generator | None = None,
) -> AdaptedModel:
    """Adapt a model without touching it.

    Args:
        model: any module; it is read and never written to, and its tensors are shared, not copied. An `AdaptedModel` is
            adapted on top: its own adapter is frozen as it is now. A `FrozenBase` spares copying the structure again.
        strategy: a method (which takes its usual sites), a dict from glob patterns to methods (first match wins), a
            `Strategy`, or the seed's protocol, an iterable of (check, action[, paras]).
        generator: what initial values are drawn from, those of modules that actions make too; without one they come from
            torch's global generator.

    Returns:
        The adapted model: an ordinary `nn.Module` whose parameters are exactly the adapter's.

    Raises:
        AdaptError: if a rule matches nothing, a method cannot adapt what it is pointed at, or the model cannot be copied;
            nothing was changed then.
        TypeError: if the strategy is none.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> adapted = gf.adapt(model, {"1": gf.LoRA(rank=2), "*.bias": gf.Full()})
        >>> sorted(adapted.adapter_state_dict())
        ['0.bias', '1.bias', '1.lora_A', '1.lora_B']
    """

    def draw(placement: Placement) -> dict[str, Tensor]:
        return placement.method.init(placement.site, generator)

    return _adapt(model, strategy, draw, generator)


def readapt(model: nn.Module | FrozenBase, strategy: Any, state: Mapping[str, Tensor]) -> AdaptedModel:
    """Adapt a model with tensors that are already there; nothing is drawn.

    Raises:
        StateError: if the tensors are not those that the strategy asks for.
    """
    return _adapt(model, strategy, _shapes, torch.Generator()).with_adapter(state)


def _adapt(
    model: nn.Module | FrozenBase,
    strategy: Any,
    initial: Callable[[Placement], dict[str, Tensor]],
    generator: torch.Generator | None = None,
) -> AdaptedModel:
    protocol = is_protocol(strategy)
    rules = None if protocol else Strategy.of(strategy)
    base = base_of(model)
    if rules is not None:
        plain = model if isinstance(model, nn.Module) and not isinstance(model, AdaptedModel) else None
        return _assemble(base, base.structure.copy(clone), rules.place(base, plain), {}, rules, initial)
    operation = operate(base, caps_of(strategy), generator)
    rules = None if operation.changed else Strategy.by_name(operation.placements)
    return _assemble(base, operation.body, operation.placements, operation.fresh, rules, initial)


def base_of(model: nn.Module | FrozenBase) -> FrozenBase:
    """The frozen base that a model makes; of an adapted model, one that holds its adapter as it is now."""
    if isinstance(model, FrozenBase):
        return model
    if isinstance(model, AdaptedModel):
        return _frozen(model)
    if isinstance(model, nn.Module):
        return FrozenBase.of(model)
    raise TypeError(f"adapt takes a torch.nn.Module, got a {type(model).__name__}")


def _frozen(adapted: AdaptedModel) -> FrozenBase:
    """An adapted model as the base of further ones: structured weights and buffers as they are now."""
    body = adapted._body
    tensors = {name: clone(tensor) for name, tensor in adapted.adapter.items()}
    structure = Structure(body.structure.detached())
    for name, weight in body.weights(tensors).items():
        structure.bind(name, as_tensor(weight.eval()))
    trainable = frozenset(structure.places) & (body.base.trainable | {part.name for part in body.parts})
    return FrozenBase(structure, trainable)


def _shapes(placement: Placement) -> dict[str, Tensor]:
    """The method's tensors without values, and without a draw from any generator."""
    parameter = placement.site.parameter
    bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return placement.method.init(replace(placement.site, parameter=bare), None)


def _assemble(
    base: FrozenBase,
    body: Structure,
    placements: list[Placement],
    fresh: Mapping[str, nn.Parameter],
    strategy: Strategy | None,
    initial: Callable[[Placement], dict[str, Tensor]],
) -> AdaptedModel:
    """Draw the adapter's tensors and put the adapted model together."""
    parts = []
    tensors: dict[str, nn.Parameter] = {}
    for placement in placements:
        method = placement.method
        with torch.no_grad():
            made = initial(placement)
        names = {}
        for local, tensor in made.items():
            name = names[local] = placement.full_name(local)
            if name in tensors or name in fresh:
                raise AdaptError(
                    f"two adapted parameters would both name a tensor {name!r}; adapt one of them by another method"
                )
            tensors[name] = nn.Parameter(tensor.detach(), requires_grad=local not in method.frozen)
        parts.append(Part(placement.name, method, names))
    for name, parameter in fresh.items():
        tensors[name] = parameter
        parts.append(Part(name, Full(), {"": name}))
    return AdaptedModel(base, body, parts, tensors, strategy)
