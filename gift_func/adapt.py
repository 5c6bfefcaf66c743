"""`adapt`: a model and a strategy in, an adapted model out, the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapted_model import AdaptedModel, filled
from .gift_protocol import Rules, caps_of, is_protocol, operate
from .initialise import Initial, Shapes, parts_of
from .methods import Full, Method, ModuleMethod
from .network.frozen_base import BaseView, FrozenBase, as_tensor
from .network.module_tree import ModuleTree, clone
from .network.runner import AdaptedParameter
from .seeding import seeded
from .strategy import ModulePlacement, Strategy


def adapt(
    model: nn.Module | FrozenBase | BaseView,
    strategy: Method | Mapping[str, Method] | Strategy | Iterable[Any] | Rules,
    *,
    generator: torch.Generator | None = None,
) -> AdaptedModel:
    """Adapt a model without touching it.

    Args:
        model: any module; it is read and never written to, and its tensors are shared, not copied. An `AdaptedModel` is
            adapted on top: its own adapter is frozen as it is now. A `FrozenBase`, or another adapted model's `base`, spares
            copying and looking through the model again.
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

    return _adapt(model, strategy, Initial(generator))


def readapt(
    model: nn.Module | FrozenBase | BaseView, strategy: Any, state: Mapping[str, Tensor], *, owned: bool = False
) -> AdaptedModel:
    """Adapt a model with tensors that are already there; nothing is drawn.

    Args:
        model: as of `adapt`.
        strategy: as of `adapt`.
        state: the tensors, and buffers, under global names.
        owned: the tensors are nobody else's, and need not be copied.

    Raises:
        StateError: if the tensors are not those that the strategy asks for.
    """
    base = base_of(model)
    known = base.plans.get(strategy) if isinstance(strategy, Strategy) else None
    if known is None:
        base, body, parts, shapes, rules = _plan(base, strategy, Shapes())
        if rules is not None and rules.is_data and not any(isinstance(method, ModuleMethod) for _, method in rules.rules):
            base.plans = {rules: (parts, shapes)}  # files of one base mostly have one strategy
    else:
        (parts, shapes), body, rules = known, None, strategy
    tensors, buffers = filled(base, (body or base.structure).held(), parts, shapes, state, owned)
    if body is not None:
        body.hold(buffers)
    return AdaptedModel(base, body, parts, tensors, rules, buffers)


def _adapt(model: nn.Module | FrozenBase | BaseView, strategy: Any, initial: Initial) -> AdaptedModel:
    return AdaptedModel(*_plan(model, strategy, initial))


class _Plan(NamedTuple):
    base: FrozenBase
    body: ModuleTree | None
    parts: list[AdaptedParameter]
    tensors: dict[str, nn.Parameter]
    rules: Strategy | None


def _plan(model: nn.Module | FrozenBase | BaseView, strategy: Any, initial: Initial) -> _Plan:
    rules = None if is_protocol(strategy) else Strategy.of(strategy)
    base = base_of(model)
    if rules is not None:
        plain = model if isinstance(model, nn.Module) and not isinstance(model, AdaptedModel) else None
        placements, added = rules.place(base, plain)
        body, fresh = _with_added(base, added, initial.generator)
    else:
        operation = operate(base, caps_of(strategy), initial.generator)
        body, fresh, placements = operation.body, operation.fresh, operation.placements
        rules = None if operation.changed else Strategy.by_name(placements)
    parts, tensors = parts_of(placements, initial, fresh)
    parts.extend(AdaptedParameter(name, Full(), {"": name}) for name in fresh)
    return _Plan(base, body, parts, {**tensors, **fresh}, rules)


def base_of(model: nn.Module | FrozenBase | BaseView) -> FrozenBase:
    """The frozen base that a model makes; of an adapted model, one that holds its adapter as it is now."""
    if isinstance(model, FrozenBase):
        return model
    if isinstance(model, BaseView):
        return model._frozen
    if isinstance(model, AdaptedModel):
        return _frozen(model)
    if isinstance(model, nn.Module):
        return FrozenBase.of(model)
    raise TypeError(f"adapt takes a torch.nn.Module, got a {type(model).__name__}")


def _frozen(adapted: AdaptedModel) -> FrozenBase:
    """An adapted model as the base of further ones: structured weights and buffers as they are now."""
    body = adapted._body
    tensors = {name: clone(tensor) for name, tensor in adapted.adapter.items()}
    structure = ModuleTree(body.structure.detached())
    for name, weight in body.weights(tensors).items():
        structure.bind(name, as_tensor(weight.eval()))
    trainable = frozenset(structure.places) & (body.base.trainable | {part.name for part in body.parts})
    return FrozenBase(structure, trainable)


def _with_added(
    base: FrozenBase, added: Sequence[ModulePlacement], generator: torch.Generator | None
) -> tuple[ModuleTree | None, dict[str, nn.Parameter]]:
    """A copy of the network with modules added to it, and their parameters by name; none where nothing is to be added."""
    if not added:
        return None, {}
    body = base.structure.copy(clone)
    known = {id(body.tensor(name)) for name in body.places}
    with seeded(generator):
        for placement in added:
            placement.method.add_to(body.modules[placement.name])
    body = ModuleTree(body.module)
    return body, {name: body.tensor(name) for name in body.places if id(body.tensor(name)) not in known}
