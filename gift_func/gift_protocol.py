"""GIFt's protocol: (check, action) pairs, called for the modules of a private copy, which they may replace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import AdaptError
from .methods import Method, WeightMethod
from .network.frozen_base import FrozenBase
from .network.module_tree import ModuleTree, clone, join
from .seeding import seeded
from .select import Selector, Site
from .strategy import Placement, Strategy

Check = Callable[[nn.Module, str, str, str, nn.Module], bool]
Action = Callable[..., Any]
Cap = tuple[Check, Action, dict[str, Any]]


class Rules(Protocol):
    """What can only be iterated over by index, such as GIFt's own strategies."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Pure:
    """Base of actions that only read their arguments and return methods.

    A strategy of such actions alone is given the base's own tensors instead of clones of them. Such an action is also called
    for the model itself, others only for the modules in it.
    """


def is_pure(caps: Iterable[Cap]) -> bool:
    """Whether no action of the strategy can write to its arguments."""
    return all(isinstance(action, Pure) for _, action, _ in caps)


def is_protocol(strategy: object) -> bool:
    """Whether a strategy is an iterable of GIFt's (check, action[, paras]) and not of (selector, method)."""
    iterable = isinstance(strategy, Iterable) or hasattr(strategy, "__getitem__")
    if isinstance(strategy, (Strategy, Method, Mapping, str)) or not iterable:
        return False
    return any(not (isinstance(cap[0], (Selector, str)) or cap[0] is None or _takes_a_site(cap)) for cap in _items(strategy))


def caps_of(strategy: object) -> list[Cap]:
    """The strategy's (check, action, paras) triples.

    Raises:
        AdaptError: if an item has neither two nor three parts.
    """
    found = []
    for cap in _items(strategy):
        if len(cap) not in (2, 3):
            raise AdaptError(f"a rule is (check, action) or (check, action, paras), got {len(cap)} parts: {cap!r}")
        check, action, *rest = cap
        found.append((check, action, dict(rest[0] or {}) if rest else {}))
    return found


@dataclass(frozen=True)
class Operation:
    """The result of a strategy's actions on a private copy.

    Attributes:
        body: the copy, with the base's tensors where no action changed them.
        placements: the parameters that an action gave a method for.
        fresh: the parameters that actions added or wrote to, by name.
        changed: whether an action replaced or changed anything, so that the placements are not the whole result.
    """

    body: ModuleTree
    placements: list[Placement]
    fresh: dict[str, nn.Parameter]
    changed: bool


def operate(base: FrozenBase, caps: Sequence[Cap], generator: torch.Generator | None = None) -> Operation:
    """Visit the modules of a private copy, parents first; for each, run the action of the first check that is true.

    An action may return a module, which replaces the one it was called for; a method, or a dict from names of that
    module's parameters to methods, which adapt them; or None, if it changed the parent or the module itself, or leaves the
    module as it is. The modules inside are visited if the action returned a method or no check was true. A module that is
    used in several places is replaced by one module in all of them.

    Args:
        base: the model that the copy is made of; it is not changed.
        caps: the strategy, as of `caps_of`.
        generator: seeds the global random state while the actions run, which is restored afterwards.

    Raises:
        AdaptError: if no action changes or adapts anything, if one returns anything else, or if actions contradict each other.
    """
    if is_pure(caps):
        body = base.tree.copy(clone)
        walk = _Walk(body, caps)
        walk.run()
        walk.check_found()
        return Operation(body, walk.placements, {}, changed=False)
    # Copies of the parameters, since actions may write to them.
    body = ModuleTree(base.tree.detached(lambda p: nn.Parameter(clone(p), requires_grad=p.dtype.is_floating_point)))
    origins = {id(tensor): name for name, tensor in zip(base.tree.places, _by_name(body).values(), strict=True)}
    handed = list(_by_name(body).values())  # a reference to each, so that no new tensor has its id
    versions = {id(tensor): tensor._version for tensor in handed}
    before = _census(body.module)
    walk = _Walk(body, caps)
    with seeded(generator):
        root = walk.run()
    after = _census(root)
    changed = len(before) != len(after) or not all(map(is_, before, after))
    body = ModuleTree(root)
    fresh: dict[str, nn.Parameter] = {}
    for name, tensor in _by_name(body).items():
        origin = origins.get(id(tensor))
        if is_lazy(tensor):
            raise AdaptError(f"an action made {name!r}, which is not initialised yet; give its module its sizes")
        if origin is None or tensor._version != versions[id(tensor)] or _was_written_to(tensor, base.weights[origin].dense()):
            fresh[name] = nn.Parameter(clone(tensor), requires_grad=tensor.requires_grad)
    changed = changed or bool(fresh)
    walk.check_found(changed)
    _check_placements(walk.placements, body, fresh)
    for name, tensor in _by_name(body).items():
        if name not in fresh:
            body.bind(name, base.tensors[origins[id(tensor)]])
    return Operation(body, walk.placements, fresh, changed)


class _Walk:
    """One pass of a strategy over a private copy."""

    def __init__(self, body: ModuleTree, caps: Sequence[Cap]) -> None:
        self.body = body
        self.caps = caps
        self.placements: list[Placement] = []
        self.ran = 0
        self._canonical = {alias: name for name, aliases in body.names.items() for alias in aliases}
        self._taken: set[str] = set()
        self._own = {id(module) for module in body.modules.values()}
        # (module, cap) -> the module that replaced it where it was visited first.
        self._replaced: dict[tuple[int, int], nn.Module] = {}

    def run(self) -> nn.Module:
        """Visit all modules, and return the root, which is another module if an action replaced it."""
        root = self.body.module
        holder = nn.Module()
        holder.add_module("model", root)
        self._visit(holder, "model", "", [cap for cap in self.caps if isinstance(cap[1], Pure)] if root._modules else self.caps)
        if root._modules and holder.get_submodule("model") is root:
            self._below(root, "")
        return holder.get_submodule("model")

    def check_found(self, changed: bool = False) -> None:
        """Raise if the actions changed and adapted nothing."""
        if changed or self.placements:
            return
        kinds = sorted({type(module).__name__ for module in self.body.modules.values()})
        if self.ran:
            raise AdaptError(
                f"actions of the strategy ran for {self.ran} modules, but none replaced or changed anything or gave a method "
                "for a parameter, so nothing would be adapted"
            )
        raise AdaptError(
            f"no check of the strategy's {len(self.caps)} rules holds for any module, so nothing would be adapted. The model's "
            f"module classes are {', '.join(kinds)}."
        )

    def _below(self, parent: nn.Module, path: str) -> None:
        for name in list(parent._modules):
            child = parent._modules.get(name)
            # A child that is None, or that an action removed or put there, is not visited.
            if child is not None and id(child) in self._own and self._visit(parent, name, join(path, name), self.caps):
                self._below(child, join(path, name))

    def _visit(self, parent: nn.Module, name: str, global_name: str, caps: Sequence[Cap]) -> bool:
        """Run the action of the first check that is true, and return whether to visit the modules inside."""
        module: nn.Module = getattr(parent, name)
        kind = type(module).__name__
        for cap in caps:
            check, action, paras = cap
            if not check(parent, name, global_name, kind, module):
                continue
            if (id(module), id(cap)) in self._replaced:
                setattr(parent, name, self._replaced[id(module), id(cap)])
                return False
            self.ran += 1
            outcome = action(parent, name, global_name, kind, module, **paras)
            if isinstance(outcome, nn.Module):
                setattr(parent, name, outcome)
            current = getattr(parent, name, None)
            if current is not module:
                if isinstance(current, nn.Module):
                    self._replaced[id(module), id(cap)] = current
                return False
            if isinstance(outcome, (Method, Mapping)):
                self._place(module, global_name, outcome)
                return True
            if outcome is not None and not isinstance(outcome, nn.Module):
                given = outcome.__name__ + " itself" if isinstance(outcome, type) else f"a {type(outcome).__name__}"
                raise AdaptError(
                    f"the action for {global_name or 'the model'} returned {given}: an action returns a module, a method "
                    "such as gf.LoRA(), a dict from parameter names to methods, or nothing after it changed the parent"
                )
            return False
        return True

    def _place(self, module: nn.Module, module_name: str, outcome: Method | Mapping[str, Method]) -> None:
        where = f"{module_name or 'the model'}, a {type(module).__name__}"
        sites = {
            name: Site(join(module_name, name), module_name, name, module, parameter)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        if isinstance(outcome, Mapping):
            unknown = [name for name in outcome if name not in sites]
            if unknown:
                raise AdaptError(
                    f"an action gave a method for {unknown[0]!r} of {where}, which has {', '.join(sites) or 'none'}"
                )
            chosen = [(sites[name], _weight_method(method, where)) for name, method in outcome.items()]
            for site, method in chosen:
                reason = method.why_not(site)
                if reason is not None:
                    raise AdaptError(f"{method} cannot adapt {site.name!r}: it needs {reason}")
        else:
            method = _weight_method(outcome, where)
            usual = [site for site in sites.values() if method.is_default_site(site)]
            chosen = [(site, method) for site in usual or [s for s in sites.values() if not method.why_not(s)]]
            computed = method.computed_weight_name(module)
            if not usual and computed is not None:
                raise AdaptError(
                    f"{computed} of {where}, is computed from other parameters (a parametrization), so {method} has no "
                    "parameter to adapt. Remove the parametrization from a copy of the model, or leave the module out."
                )
            if sites and not chosen:
                raise AdaptError(f"{method} cannot adapt any parameter of {where}")
        for site, method in chosen:
            lead = self._add(site, method)
            for param_name, companion in method.for_site(site).companions(site).items():
                if lead and param_name in sites and not (isinstance(outcome, Mapping) and param_name in outcome):
                    self._add(sites[param_name], companion, lead)

    def _add(self, site: Site, method: WeightMethod, lead: Placement | None = None) -> Placement | None:
        name = self._canonical[site.name]
        if name in self._taken:  # a tied parameter is adapted once
            return None
        self._taken.add(name)
        self.placements.append(Placement(name, site, method.for_site(site), method, lead))
        return self.placements[-1]


def _weight_method(method: object, where: str) -> WeightMethod:
    """The method that an action returned, if it is one that adapts parameters."""
    if not isinstance(method, WeightMethod):
        raise AdaptError(
            f"an action returned {method} for {where}, which adapts no parameter. A method that adds a module is the right "
            "side of a rule with a pattern, as in gf.adapt(model, {'blocks.*': gf.Bottleneck()})"
        )
    return method


def _check_placements(placements: Iterable[Placement], body: ModuleTree, fresh: Mapping[str, nn.Parameter]) -> None:
    """Raise if a parameter that an action gave a method for is no longer there, or not as it was."""
    parameters = _by_name(body)
    for placement in placements:
        if parameters.get(placement.name) is not placement.site.parameter:
            raise AdaptError(
                f"an action gave a method for {placement.site.name!r}, and another one replaced {placement.name!r}, which is "
                "the same parameter. Let only one of the strategy's checks hold there."
            )
        if placement.name in fresh:
            raise AdaptError(
                f"{placement.method} was given for {placement.name!r}, and an action wrote to that parameter, which makes it a "
                "trained one. Do one or the other."
            )


def _was_written_to(tensor: Tensor, original: Tensor) -> bool:
    """Whether the values of a copy were changed, as through `.data`, which does not change its version."""
    if tensor.shape != original.shape or tensor.dtype != original.dtype or tensor.device != original.device:
        return True
    if tensor.is_meta or torch.equal(tensor, original):
        return False
    return not (tensor.dtype.is_floating_point and torch.allclose(tensor, original, rtol=0, atol=0, equal_nan=True))


def _census(root: nn.Module) -> list[object]:
    """All objects that the modules refer to, including hooks and parameters; other objects if anything was replaced."""
    found: list[object] = []
    for module in root.modules():
        found.append(module)
        for name, value in module.__dict__.items():
            if name not in ("training", "_parameters", "_buffers", "_modules"):
                found.append(value)
            if isinstance(value, dict):
                found.extend(value.values())
    return found


def _by_name(body: ModuleTree) -> dict[str, nn.Parameter]:
    return {name: body.tensor(name) for name in body.places}


def _items(strategy: Any) -> list[Any]:
    items = list(strategy)
    for item in items:
        if not isinstance(item, Sequence) or isinstance(item, str) or not item:
            raise TypeError(f"a strategy's rules are pairs such as (selector, method) or (check, action), got {item!r}")
    return items


def _takes_a_site(cap: Sequence[Any]) -> bool:
    """Whether a rule is a function of a Site and a method: its left side takes one argument, its right side is a method."""
    if len(cap) != 2 or not isinstance(cap[1], Method) or not callable(cap[0]):
        return False
    try:
        parameters = inspect.signature(cap[0]).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(required) == 1
