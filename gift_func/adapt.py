"""`adapt`: a model and a strategy in, an adapted model out, the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdaptedModel, Part
from .base import FrozenBase, as_tensor
from .errors import AdaptError
from .methods import Full, Method
from .strategy import Placement, Strategy
from .structure import Structure, clone
from .surgery import caps_of, is_protocol, operate


def adapt(
    model: nn.Module | FrozenBase,
    strategy: Method | Mapping[str, Method] | Strategy | Iterable[Any],
    *,
    generator: torch.Generator | None = None,
) -> AdaptedModel:
    """Adapt a model without touching it.

    Args:
        model: any module; it is read and never written to, and its tensors are shared, not copied. An `AdaptedModel` is
            adapted on top: its own adapter is frozen as it is now. A `FrozenBase` spares copying the structure again.
        strategy: a method (which takes its usual sites), a dict from glob patterns to methods (first match wins), a
            `Strategy`, or the seed's protocol, an iterable of (check, action[, paras]).
        generator: what initial values are drawn from; without one they come from torch's global generator.

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
    protocol = is_protocol(strategy)
    rules = None if protocol else Strategy.of(strategy)
    if isinstance(model, FrozenBase):
        base, users = model, None
    elif isinstance(model, AdaptedModel):
        base, users = frozen(model), None
    elif isinstance(model, nn.Module):
        base, users = FrozenBase.of(model), model
    else:
        raise TypeError(f"adapt takes a torch.nn.Module, got a {type(model).__name__}")
    if rules is not None:
        placements = rules.place(base, users)
        body = base.structure.copy(clone)
        return _assemble(base, body, placements, {}, rules, generator)
    body = Structure(base.structure.detached(clone_parameter))
    originals = dict(zip(body.places, base.structure.places, strict=True))
    caps = caps_of(strategy)
    before = {id(tensor): (originals[name], tensor, tensor._version) for name, tensor in _parameters(body).items()}
    operation = operate(body, caps)
    placements, fresh = operation.placements, {}
    body = Structure(body.module)
    for name, tensor in _parameters(body).items():
        origin, _, version = before.get(id(tensor), (None, None, None))
        if origin is not None and tensor._version == version:
            body.bind(name, base.tensors[origin])
        else:
            fresh[name] = nn.Parameter(clone(tensor), requires_grad=tensor.requires_grad or origin is not None)
    rules = None if operation.changed else Strategy.by_name(placements)
    return _assemble(base, body, placements, fresh, rules, generator)


def frozen(adapted: AdaptedModel) -> FrozenBase:
    """An adapted model as the base of further ones: structured weights and buffers as they are now."""
    tensors = {name: clone(tensor) for name, tensor in adapted.adapter.items()}
    structure = Structure(adapted._body.detached())
    for name, weight in adapted._weights(tensors).items():
        structure.bind(name, as_tensor(weight.eval()))
    trainable = frozenset(structure.places) & (adapted._base.trainable | {part.name for part in adapted.parts})
    return FrozenBase(structure, trainable)


def clone_parameter(parameter: Tensor) -> Tensor:
    """A trainable copy to hand to code that may write to it."""
    return nn.Parameter(clone(parameter), requires_grad=parameter.dtype.is_floating_point)


def _assemble(
    base: FrozenBase,
    body: Structure,
    placements: list[Placement],
    fresh: Mapping[str, nn.Parameter],
    strategy: Strategy | None,
    generator: torch.Generator | None,
) -> AdaptedModel:
    """Draw the adapter's tensors and put the adapted model together."""
    parts = []
    tensors: dict[str, nn.Parameter] = {}
    for placement in placements:
        method = placement.method
        with torch.no_grad():
            made = method.init(placement.site, generator)
        names = {}
        for local, tensor in made.items():
            name = names[local] = placement.full_name(local)
            if name in tensors or name in fresh:
                raise AdaptError(f"two adapted parameters would both name a tensor {name!r}; adapt one of them by another method")
            tensors[name] = nn.Parameter(tensor.detach(), requires_grad=local not in method.frozen)
        parts.append(Part(placement.name, method, names))
    for name, parameter in fresh.items():
        tensors[name] = parameter
        parts.append(Part(name, Full(), {"": name}))
    return AdaptedModel(base, body, parts, tensors, strategy)


def _parameters(body: Structure) -> dict[str, nn.Parameter]:
    found = {}
    for name, ((module, attribute), *_) in body.places.items():
        parameter = module._parameters[attribute]
        assert parameter is not None
        found[name] = parameter
    return found
