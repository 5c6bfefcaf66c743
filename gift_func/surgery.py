"""The seed's protocol: (check, action) pairs that walk a private copy and may replace its modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .errors import AdaptError
from .methods import Method
from .select import Selector, Site
from .strategy import Placement, Strategy
from .structure import Structure, join

Check = Callable[[nn.Module, str, str, str, nn.Module], bool]
Action = Callable[..., Any]
Cap = tuple[Check, Action, dict[str, Any]]


def is_protocol(strategy: object) -> bool:
    """Whether a strategy is an iterable of the seed's (check, action[, paras]) and not of (selector, method)."""
    if isinstance(strategy, (Strategy, Method, Mapping, str)) or not _iterable(strategy):
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


@dataclass
class Operation:
    """What walking a private copy led to.

    Attributes:
        placements: the parameters that an action gave a method for.
        changed: whether an action replaced or changed modules.
    """

    placements: list[Placement] = field(default_factory=list)
    changed: bool = False


def operate(body: Structure, caps: Sequence[Cap]) -> Operation:
    """Walk the copy from outside to inside; at every module the first check that holds has its action run.

    An action may return a module (which takes the place of the one it was called for), a method (which adapts that
    one's parameters), or nothing, having changed the parent it was handed. Below a module that was acted on, the walk
    does not go.

    Raises:
        AdaptError: if no check ever holds, or an action returns something else or changes nothing.
    """
    result = Operation()
    if not any(True for _ in body.module.children()):
        holder = nn.Module()
        holder.add_module("model", body.module)
        _visit(holder, "model", "", body, caps, result)
        if holder.model is not body.module:
            raise AdaptError("an action replaced the whole model; wrap it in a module to have it replaced")
    _walk(body.module, "", body, caps, result)
    if not result.placements and not result.changed:
        kinds = sorted({type(module).__name__ for module in body.modules.values()})
        raise AdaptError(
            f"no check of the strategy's {len(caps)} rules holds for any module, so nothing would be adapted. The model's "
            f"module classes are {', '.join(kinds)}."
        )
    return result


def _walk(parent: nn.Module, path: str, body: Structure, caps: Sequence[Cap], result: Operation) -> None:
    for name, child in list(parent.named_children()):
        if not _visit(parent, name, join(path, name), body, caps, result):
            _walk(child, join(path, name), body, caps, result)


def _visit(
    parent: nn.Module, name: str, global_name: str, body: Structure, caps: Sequence[Cap], result: Operation
) -> bool:
    module = getattr(parent, name)
    for check, action, paras in caps:
        if not check(parent, name, global_name, type(module).__name__, module):
            continue
        before = _census(parent)
        outcome = action(parent, name, global_name, type(module).__name__, module, **paras)
        if isinstance(outcome, nn.Module):
            setattr(parent, name, outcome)
            result.changed = True
        elif isinstance(outcome, Method):
            result.placements.extend(_placements(module, global_name, body, outcome))
        elif _census(parent) != before:
            result.changed = True
        elif outcome is not None:
            raise AdaptError(
                f"the action for {global_name!r} returned a {type(outcome).__name__}: an action returns a module, a method, "
                "or nothing after it changed the parent"
            )
        return True
    return False


def _placements(module: nn.Module, module_name: str, body: Structure, method: Method) -> list[Placement]:
    canonical = {alias: name for name, aliases in body.names.items() for alias in aliases}
    sites = []
    for param_name, parameter in module.named_parameters(recurse=False):
        sites.append(Site(join(module_name, param_name), module_name, param_name, module, parameter))
    chosen = [site for site in sites if method.takes(site)] or [site for site in sites if not method.refuses(site)]
    if not chosen:
        raise AdaptError(f"{method} cannot adapt any parameter of {module_name!r}, a {type(module).__name__}")
    found = [Placement(canonical[site.name], site, method.at(site)) for site in chosen]
    for placement in list(found):
        for param_name, companion in placement.method.companions(placement.site).items():
            for site in sites:
                if site.param_name == param_name:
                    found.append(Placement(canonical[site.name], site, companion.at(site)))
    return found


def _census(module: nn.Module) -> list[int]:
    return [id(child) for child in module.modules()] + [id(parameter) for parameter in module.parameters()]


def _iterable(strategy: object) -> bool:
    return isinstance(strategy, Iterable) or hasattr(strategy, "__getitem__")


def _items(strategy: Any) -> list[Any]:
    items = list(strategy)
    for item in items:
        if not isinstance(item, Sequence) or isinstance(item, str) or not item:
            raise TypeError(f"a strategy's rules are pairs such as (selector, method) or (check, action), got {item!r}")
    return items


def _takes_a_site(cap: Sequence[Any]) -> bool:
    """Whether a rule's left side is a function of a Site: a method stands at its right and it takes one argument."""
    if len(cap) != 2 or not isinstance(cap[1], Method) or not callable(cap[0]):
        return False
    try:
        parameters = inspect.signature(cap[0]).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(required) == 1
