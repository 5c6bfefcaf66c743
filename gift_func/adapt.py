"""`adapt`: makes an adapted model from a model and a strategy, and does not change the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .adapted_model import AdaptedModel, parameters_of
from .adapter import AdaptedParameter, AdaptedParameters, Adapter
from .adapter_dict import check_state
from .gift_protocol import Rules, caps_of, is_protocol, operate
from .initialise import Initial, Shapes, parts_of
from .methods import Full, Method
from .network.base_view import BaseView, frozen_base_of
from .network.frozen_base import FrozenBase
from .network.module_tree import ModuleTree, NamedTensors, clone, persistent_buffers
from .seeding import seeded
from .strategy import ModulePlacement, Strategy


def adapt(
    model: nn.Module | FrozenBase | BaseView,
    strategy: Method | Mapping[str, Method] | Strategy | Iterable[Any] | Rules,
    *,
    generator: torch.Generator | None = None,
) -> AdaptedModel:
    """Adapt a model without changing it.

    Args:
        model: any module; it is read and never written to, and its tensors are shared, not copied. An `AdaptedModel` is
            adapted on top: its own adapter is frozen as it is now. With a `FrozenBase`, or another adapted model's `base`,
            the model is not copied again.
        strategy: a method (for its default sites), a dict from glob patterns to methods (first match wins), a
            `Strategy`, or GIFt's protocol, an iterable of (check, action[, paras]).
        generator: the generator of all initial values, also in modules that actions make; None for torch's global one.

    Returns:
        The adapted model: an ordinary `nn.Module` whose parameters are exactly the adapter's.

    Raises:
        AdaptError: if a rule matches nothing, a method cannot adapt a site that it is given, or the model cannot be copied.
        TypeError: if the strategy is none.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> adapted = gf.adapt(model, {"1": gf.LoRA(rank=2), "*.bias": gf.Full()})
        >>> sorted(adapted.adapter_state_dict())
        ['0.bias', '1.bias', '1.lora_A', '1.lora_B']
    """
    return AdaptedModel(new_adapter(model, strategy, generator))


def new_adapter(model: nn.Module | FrozenBase | BaseView, strategy: Any, generator: torch.Generator | None = None) -> Adapter:
    """The adapter of the model that `adapt` makes. The network is copied only if the strategy changes its modules."""
    plain = model if isinstance(model, nn.Module) and not isinstance(model, AdaptedModel) else None
    return draw_adapter(base_of(model), strategy, Initial(generator), plain)


def readapt(
    model: nn.Module | FrozenBase | BaseView, strategy: Any, state: NamedTensors, *, owned: bool = False
) -> AdaptedModel:
    """Adapt a model with given tensors; nothing is drawn.

    Args:
        model: as for `adapt`.
        strategy: as for `adapt`.
        state: the tensors and buffers under global names.
        owned: no one else uses the tensors, so they need not be copied.

    Raises:
        StateError: if the strategy needs other tensors.
    """
    base = base_of(model)
    plan = base.plans.get(strategy) if isinstance(strategy, Strategy) else None
    if plan is not None:
        return AdaptedModel(fill_adapter(Adapter(AdaptedParameters(base, plan[0]), strategy, plan[1]), state, owned=owned))
    like = draw_adapter(base, strategy, Shapes())
    if like.strategy is not None and like.strategy.is_data and like.tree is None:
        # Files of one base mostly have one strategy. The base is left out, since it would keep itself alive.
        base.plans = {like.strategy: (tuple(like.parameters), like.tensors)}
    return AdaptedModel(fill_adapter(like, state, owned=owned))


def fill_adapter(like: Adapter, state: NamedTensors, *, owned: bool = False) -> Adapter:
    """An adapter like another, with the tensors and buffers of a state.

    Args:
        like: the other adapter; its tensors need no values.
        state: the tensors and buffers under global names; buffers that are not in it are the base's.
        owned: no one else uses the state's tensors, so they need not be copied.

    Raises:
        StateError: if a name is missing or unknown, or a shape differs.
    """
    buffers = persistent_buffers((like.tree or like.base.tree).buffer_dicts())
    check_state(state, like.tensors, buffers, strict=True)
    filled = like.replace_tensors(parameters_of(state, like.parameters, like.tensors, owned=owned))
    filled.buffers = {name: clone(tensor.to(buffers[name])) for name, tensor in state.items() if name not in like.tensors}
    return filled


def draw_adapter(base: FrozenBase, strategy: Any, initial: Initial, model: nn.Module | None = None) -> Adapter:
    """The adapter of a base and a strategy.

    Args:
        base: the frozen base.
        strategy: as for `adapt`.
        initial: makes the initial tensors.
        model: the user's model, whose modules selectors are called with; None for the base's.
    """
    tree: ModuleTree | None
    if is_protocol(strategy):
        operation = operate(base, caps_of(strategy), initial.generator)
        tree, fresh, placements = operation.body, operation.fresh, operation.placements
        rules = None if operation.changed else Strategy.by_name(placements)
    else:
        rules = Strategy.of(strategy)
        placements, added = rules.place(base, model)
        tree, fresh = _with_modules(base, added, initial.generator)
    parameters, tensors = parts_of(placements, initial, fresh)
    parameters.extend(AdaptedParameter(name, Full(), {"": name}) for name in fresh)
    return Adapter(AdaptedParameters(base, parameters), rules, {**tensors, **fresh}, tree=tree)


def base_of(model: nn.Module | FrozenBase | BaseView) -> FrozenBase:
    """The frozen base of a model; of an adapted model, one with its adapter as it is now."""
    if isinstance(model, FrozenBase):
        return model
    if isinstance(model, BaseView):
        return frozen_base_of(model)
    if isinstance(model, AdaptedModel):
        return model.frozen_with_adapter()
    if isinstance(model, nn.Module):
        return FrozenBase.of(model)
    raise TypeError(f"adapt takes a torch.nn.Module, got a {type(model).__name__}")


def _with_modules(
    base: FrozenBase, added: Sequence[ModulePlacement], generator: torch.Generator | None
) -> tuple[ModuleTree | None, dict[str, nn.Parameter]]:
    """A copy of the network with modules added to it, and their parameters by name; None if there is nothing to add."""
    if not added:
        return None, {}
    tree = base.tree.copy(clone)
    known = {id(tree.tensor(name)) for name in tree.places}
    with seeded(generator):
        for placement in added:
            placement.method.add_to(tree.modules[placement.name])
    tree = ModuleTree(tree.module)
    return tree, {name: tree.tensor(name) for name in tree.places if id(tree.tensor(name)) not in known}
