"""`adapt`: a model and a strategy in, an adapted model out, the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdaptedModel
from .base import FrozenBase, as_tensor
from .body import Part
from .errors import AdaptError
from .methods import Full, Graft, Method
from .select import Site
from .strategy import Placement, Strategy
from .structure import Structure, clone
from .surgery import Rules, caps_of, is_protocol, operate, seeded


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

    return _adapt(model, strategy, Drawn(generator), generator)


def readapt(model: nn.Module | FrozenBase, strategy: Any, state: Mapping[str, Tensor]) -> AdaptedModel:
    """Adapt a model with tensors that are already there; nothing is drawn.

    Raises:
        StateError: if the tensors are not those that the strategy asks for.
    """
    return _adapt(model, strategy, Shapes(), torch.Generator()).with_adapter(state)


def _adapt(
    model: nn.Module | FrozenBase,
    strategy: Any,
    initial: Initial,
    generator: torch.Generator | None = None,
) -> AdaptedModel:
    protocol = is_protocol(strategy)
    rules = None if protocol else Strategy.of(strategy)
    base = base_of(model)
    if rules is not None:
        plain = model if isinstance(model, nn.Module) and not isinstance(model, AdaptedModel) else None
        placements = rules.place(base, plain)
        body, fresh = _grafted(base, placements, generator)
        placements = [placement for placement in placements if not isinstance(placement.method, Graft)]
        return _assemble(base, body, placements, fresh, rules, initial)
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


def _grafted(
    base: FrozenBase, placements: Sequence[Placement], generator: torch.Generator | None
) -> tuple[Structure, dict[str, nn.Parameter]]:
    """A body with the modules that placements add, and those modules' parameters."""
    body = base.structure.copy(clone)
    grafts = [(placement.name, placement.method) for placement in placements if isinstance(placement.method, Graft)]
    if not grafts:
        return body, {}
    known = {id(body.tensor(name)) for name in body.places}
    with seeded(generator):
        for name, method in grafts:
            method.graft(body.modules[name])
    body = Structure(body.module)
    return body, {name: body.tensor(name) for name in body.places if id(body.tensor(name)) not in known}


class Initial:
    """Where an adapter's initial tensors come from."""

    generator: torch.Generator | None = None

    def site(self, site: Site) -> Site:
        """The site as the method is shown it."""
        return site

    def own(self, placement: Placement) -> dict[str, Tensor]:
        """The tensors of one placement."""
        return placement.method.init(self.site(placement.site), self.generator)

    def common(self, rule: Method, placements: Sequence[Placement]) -> dict[str, Tensor]:
        """The tensors that all placements of a rule share."""
        return rule.common([self.site(placement.site) for placement in placements], self.generator)


class Drawn(Initial):
    """Drawn from a generator, or from torch's global one."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator


class Shapes(Initial):
    """Without values, and without a draw from any generator: for tensors that are about to be given."""

    def site(self, site: Site) -> Site:
        """The site with a parameter that has a shape and a type only."""
        bare = torch.empty(site.parameter.shape, dtype=site.parameter.dtype, device="meta")
        return replace(site, parameter=bare)


def _assemble(
    base: FrozenBase,
    body: Structure,
    placements: list[Placement],
    fresh: Mapping[str, nn.Parameter],
    strategy: Strategy | None,
    initial: Initial,
) -> AdaptedModel:
    """Draw the adapter's tensors and put the adapted model together."""
    parts = []
    tensors: dict[str, nn.Parameter] = {}

    def add(name: str, tensor: Tensor, trained: bool) -> None:
        if name in tensors or name in fresh:
            raise AdaptError(f"two adapted parameters would both name a tensor {name!r}; adapt one of them by another method")
        tensors[name] = nn.Parameter(tensor.detach(), requires_grad=trained)

    names: dict[int, dict[str, str]] = {}
    shared_names: dict[int, list[str]] = {}
    groups: dict[int, list[Placement]] = {}
    for placement in placements:
        groups.setdefault(id(placement.rule), []).append(placement)
    for placement in placements:
        with torch.no_grad():
            made = initial.own(placement)
            group = groups[id(placement.rule)]
            shared = initial.common(placement.rule, group) if placement is group[0] else {}
        for local, tensor in shared.items():
            add(local, tensor, trained=False)
        for local, tensor in made.items():
            add(placement.full_name(local), tensor, trained=local not in placement.method.frozen)
        common = shared_names.setdefault(id(placement.rule), list(shared))
        names[id(placement)] = {local: placement.full_name(local) for local in made} | {local: local for local in common}
    for placement in placements:
        led = names[id(placement.lead)] if placement.lead else {}
        parts.append(Part(placement.name, placement.method, {**led, **names[id(placement)]}))
    for name, parameter in fresh.items():
        tensors[name] = parameter
        parts.append(Part(name, Full(), {"": name}))
    return AdaptedModel(base, body, parts, tensors, strategy)
