"""`adapt`: a model and a strategy in, an adapted model out, the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapted_model import AdaptedModel, filled
from .adapter import AdaptedParameter, AdaptedParameters, Adapter
from .gift_protocol import Rules, caps_of, is_protocol, operate
from .initialise import Initial, Shapes, parts_of
from .methods import Full, Method
from .network.base_view import BaseView, frozen_base_of
from .network.copy_pool import CopyPool
from .network.frozen_base import FrozenBase
from .network.module_tree import ModuleTree, clone
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
            `Strategy`, or GIFt's protocol, an iterable of (check, action[, paras]).
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
    return AdaptedModel(new_adapter(model, strategy, generator))


def new_adapter(model: nn.Module | FrozenBase | BaseView, strategy: Any, generator: torch.Generator | None = None) -> Adapter:
    """The adapter of the model that `adapt` makes; the network is not copied unless the strategy changes its modules."""
    plain = model if isinstance(model, nn.Module) and not isinstance(model, AdaptedModel) else None
    return draw_adapter(base_of(model), strategy, Initial(generator), plain)


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
        like = draw_adapter(base, strategy, Shapes())
        rules = like.strategy
        if rules is not None and rules.is_data and like.tree is None:
            # Files of one base mostly have one strategy. The base itself is no part, lest it keeps itself alive.
            base.plans = {rules: (tuple(like.parameters), like.tensors)}
    else:
        parameters, tensors_like = known
        like = Adapter(AdaptedParameters(base, parameters), strategy, tensors_like)
    held = (like.tree or base.tree).held()
    tensors, buffers = filled(like.parameters, held, like.tensors, state, owned)
    if like.tree is not None:
        like.tree.hold(buffers)
    return AdaptedModel(like.replace_tensors(tensors), CopyPool(base, like.tree, buffers))


def draw_adapter(base: FrozenBase, strategy: Any, initial: Initial, model: nn.Module | None = None) -> Adapter:
    """The adapter that a strategy makes of a base.

    Args:
        base: the frozen base.
        strategy: as of `adapt`.
        initial: where its initial tensors come from.
        model: the user's model, whose own modules selectors are shown; None for the base's.
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
    """The frozen base that a model makes; of an adapted model, one that holds its adapter as it is now."""
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
    """A copy of the network with modules added to it, and their parameters by name; none where nothing is to be added."""
    if not added:
        return None, {}
    tree = base.tree.copy(clone)
    known = {id(tree.tensor(name)) for name in tree.places}
    with seeded(generator):
        for placement in added:
            placement.method.add_to(tree.modules[placement.name])
    tree = ModuleTree(tree.module)
    return tree, {name: tree.tensor(name) for name in tree.places if id(tree.tensor(name)) not in known}
