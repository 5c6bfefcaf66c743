"""Strategies: ordered rules, each a selector and a method, and which parameters of a model they take."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from .errors import AdaptError, nearest
from .methods import Method, ModuleMethod, WeightMethod
from .network.frozen_base import FrozenBase
from .network.module_tree import join
from .select import Regex, Selector, Site, as_selector
from .select import from_dict as selector_from_dict

Rule = tuple[Selector | str | Callable[[Site], bool] | None, Method]


@dataclass(frozen=True)
class Placement:
    """One parameter and the method that adapts it.

    Attributes:
        name: the parameter's dotted name.
        site: where the parameter was found; another place of it, where it is tied.
        method: the method as it applies to the site.
        rule: the method as it is in the rule; placements of one rule share tensors.
        lead: the placement whose method named this one as a companion; its tensors are this one's too.
    """

    name: str
    site: Site
    method: WeightMethod
    rule: WeightMethod
    lead: Placement | None = None

    def full_name(self, tensor: str) -> str:
        """The global name of one of the method's tensors."""
        if not tensor:
            return self.name
        module_name, _, param_name = self.name.rpartition(".")
        return join(module_name if param_name == "weight" else self.name, tensor)


@dataclass(frozen=True)
class ModulePlacement:
    """One module and the method that adds another one to it.

    Attributes:
        name: the module's dotted name.
        host: the module.
        method: the method as it applies to the module.
    """

    name: str
    host: nn.Module
    method: ModuleMethod


class Strategy:
    """Ordered rules; for every parameter the first one that selects it and whose method can adapt it wins.

    Args:
        rules: pairs of a selector (a glob, anything of `gf.select`, a function of a `Site`, or None for the method's
            usual sites) and a method.

    Raises:
        TypeError: if a rule is not such a pair.
        AdaptError: if there are no rules.

    Example:
        >>> import gift_func as gf
        >>> strategy = gf.Strategy([("*.q_proj", gf.LoRA(rank=4)), ("*.bias", gf.Full())])
        >>> gf.Strategy.from_dict(strategy.to_dict()) == strategy
        True
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        made: list[tuple[Selector | None, Method]] = []
        for rule in rules:
            if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
                raise TypeError(f"a rule is a pair (selector, method), got {rule!r}")
            selector, method = rule
            if not isinstance(method, Method):
                raise TypeError(f"the right side of a rule is a method such as gf.LoRA(rank=8), got {method!r}")
            made.append((None if selector is None else as_selector(selector), method))
        if not made:
            raise AdaptError("a strategy needs at least one rule, such as ('*.q_proj', gf.LoRA(rank=8))")
        self.rules = tuple(made)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Strategy) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(self.rules)

    def __repr__(self) -> str:
        rules = ", ".join(f"({selector!r}, {method})" for selector, method in self.rules)
        return f"Strategy([{rules}])"

    def to_dict(self) -> dict[str, Any]:
        """The strategy as plain data that JSON can hold.

        Raises:
            AdaptError: if a selector is a Python function.
        """
        pairs = ((selector and selector.to_dict(), method.to_dict()) for selector, method in self.rules)
        return {"rules": [{"select": selector, "method": method} for selector, method in pairs]}

    @property
    def is_data(self) -> bool:
        """Whether `to_dict` can write it: no selector is a Python function."""
        try:
            self.to_dict()
        except AdaptError:
            return False
        return True

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Strategy:
        """Read back what `to_dict` wrote.

        Raises:
            AdaptError: if the data is not a strategy, or names a method that is not defined.
        """
        try:
            pairs = [(rule["select"], rule["method"]) for rule in data["rules"]]
        except (KeyError, TypeError):
            raise AdaptError(f"not a strategy: {data!r}") from None
        return Strategy([(s and selector_from_dict(s), Method.from_dict(m)) for s, m in pairs])

    @staticmethod
    def of(value: object) -> Strategy:
        """The strategy that `adapt`'s argument means: a method, a mapping of patterns, pairs, or a strategy.

        Raises:
            TypeError: for anything else.
        """
        if isinstance(value, Strategy):
            return value
        if isinstance(value, Method):
            return Strategy([(None, value)])
        if isinstance(value, Mapping):
            return Strategy(value.items())
        if isinstance(value, Iterable) and not isinstance(value, str):
            return Strategy(value)
        raise TypeError(
            "a strategy is a method (gf.LoRA(rank=8)), a dict from patterns to methods, a gf.Strategy, or an iterable of "
            f"(check, action) pairs, not {value!r}"
        )

    @staticmethod
    def by_name(placements: Iterable[Placement]) -> Strategy:
        """The strategy that makes just these placements."""
        names: dict[Method, list[str]] = {}
        for placement in placements:
            if placement.lead is None:  # the others are companions again
                names.setdefault(placement.method, []).append(re.escape(placement.name))
        return Strategy([(Regex("|".join(found)), method) for method, found in names.items()])

    def to_json(self) -> str:
        """The strategy as a JSON text."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> Strategy:
        """Read back what `to_json` wrote."""
        return Strategy.from_dict(json.loads(text))

    def explain(self, model: nn.Module) -> Explanation:
        """Which rule takes which parameter of the model, and which rule takes nothing."""
        return self.examine(FrozenBase.of(model), model)

    def examine(self, base: FrozenBase, model: nn.Module | None = None) -> Explanation:
        """`explain` for a model that is frozen already.

        Args:
            base: the frozen model.
            model: the model that the base was made of, for selectors that compare its own modules.
        """
        seen = [0] * len(self.rules)
        reasons: list[tuple[Site, str] | None] = [None] * len(self.rules)
        taken: dict[str, tuple[int, Placement]] = {}
        added: dict[str, tuple[int, ModulePlacement]] = {}
        left_out: dict[str, tuple[int, Site, str]] = {}
        groups = base.sites(model)
        for index, (selector, rule) in enumerate(self.rules):
            if isinstance(rule, ModuleMethod):
                for site in _hosts(base, model, selector or as_selector(rule.is_default_site)):
                    reason = rule.why_not(site)
                    if reason is not None:
                        reasons[index] = reasons[index] or (site, reason)
                        continue
                    seen[index] += 1
                    added.setdefault(site.name, (index, ModulePlacement(site.name, site.module, rule.for_site(site))))
        for group, (index, (selector, method)) in product(groups, enumerate(self.rules)):
            if not isinstance(method, WeightMethod):
                continue
            for site in group:
                if not (method.is_default_site(site) if selector is None else selector(site)):
                    continue
                reason = method.why_not(site)
                if reason is not None:
                    reasons[index] = reasons[index] or (site, reason)
                    if method.is_default_site(site):
                        left_out.setdefault(group[0].name, (index, site, reason))
                    continue
                seen[index] += 1
                if group[0].name not in taken:
                    taken[group[0].name] = index, Placement(group[0].name, site, method.for_site(site), method)
        sites: dict[str, list[Site]] = {}
        for index, placement in list(taken.values()):
            for param_name, method in placement.method.companions(placement.site).items():
                sites = sites or {site.name: group for group in groups for site in group}
                group = sites.get(join(placement.site.module_name, param_name), [])
                if group and group[0].name not in taken:
                    site = group[0]
                    taken[site.name] = index, Placement(site.name, site, method.for_site(site), method, placement)
        ordered = {group[0].name: taken[group[0].name] for group in groups if group[0].name in taken}
        left_out = {name: refusal for name, refusal in left_out.items() if name not in taken}
        return Explanation(self, groups, base.tree.modules, ordered, added, seen, reasons, left_out)

    def place(self, base: FrozenBase, model: nn.Module | None = None) -> tuple[list[Placement], list[ModulePlacement]]:
        """The placements, one for each adapted parameter, and the module placements, one for each host of an added module.

        Raises:
            AdaptError: if a rule takes nothing, or would have to leave a computed weight out.
        """
        found = self.examine(base, model)
        found.check()
        return [placement for _, placement in found.taken.values()], [placement for _, placement in found.added.values()]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Which rule of a strategy takes which parameter of a model; prints as a table.

    Attributes:
        strategy: the strategy.
        groups: every parameter, as its sites: several where it is tied.
        modules: every module, by dotted name.
        taken: parameter name -> (index of the rule, placement).
        added: module name -> (index of the rule, module placement).
        selected: for each rule, how many sites it selects that its method can adapt, those of earlier rules included.
        reasons: for each rule, a selected site that its method cannot adapt, and what is missing.
        left_out: usual sites of a rule's method that it cannot adapt and that no other rule takes:
            parameter name -> (index of the rule, site, what is missing).
    """

    strategy: Strategy
    groups: list[list[Site]]
    modules: dict[str, nn.Module]
    taken: dict[str, tuple[int, Placement]]
    added: dict[str, tuple[int, ModulePlacement]]
    selected: list[int]
    reasons: list[tuple[Site, str] | None]
    left_out: dict[str, tuple[int, Site, str]]

    def check(self) -> None:
        """Raise an `AdaptError` for the first rule that takes nothing or leaves a computed weight out."""
        for index, (selector, method) in enumerate(self.strategy.rules):
            if selector is None and isinstance(method, WeightMethod):
                self._check_computed(method)
            if self._count(index):
                continue
            label = self._label(index)
            reason = self.reasons[index]
            if reason is not None:
                raise self._cannot(index, *reason)
            if self.selected[index]:
                raise AdaptError(f"{label} takes nothing: earlier rules take all it selects. Move it up, or drop it.")
            wanted = "" if selector is None else getattr(selector, "pattern", "")
            names = [site.name for group in self.groups for site in group]
            known = {name.rpartition(".")[0]: None for name in names if "." in name} | dict.fromkeys(names)
            remedy = "Name a parameter to adapt it" if selector is None else "Patterns are globs on dotted names"
            raise AdaptError(
                f"{label} matches nothing in a model of {len(self.groups)} parameters. {remedy}; {nearest(wanted, known)}."
            )

        for index, site, reason_left in self.left_out.values():
            raise self._cannot(index, site, reason_left)

    def _count(self, index: int) -> int:
        """How many places a rule takes."""
        return sum(index == other for other, _ in (*self.taken.values(), *self.added.values()))

    def _label(self, index: int) -> str:
        selector, method = self.strategy.rules[index]
        return f"rule {index} ({'usual sites' if selector is None else repr(selector)}: {method})"

    def _cannot(self, index: int, site: Site, needed: str) -> AdaptError:
        return AdaptError(
            f"{self._label(index)} cannot adapt {site.name!r} of {type(site.module).__name__}: it needs {needed}, and the "
            f"parameter is {site.parameter.dtype} of shape {tuple(site.parameter.shape)}. Give it a rule of its own with "
            "another method, or leave it out of this one."
        )

    def _check_computed(self, method: WeightMethod) -> None:
        for module_name, module in self.modules.items():
            attribute = method.computed_weight_name(module)
            if attribute is not None:
                raise AdaptError(
                    f"{join(module_name, attribute)} of {type(module).__name__} is computed from other parameters "
                    f"(weight_norm, spectral_norm or another parametrization), so {method} has no parameter to adapt. "
                    "Remove the parametrization from a copy of the model "
                    "(torch.nn.utils.parametrize.remove_parametrizations), or name what is to be adapted."
                )

    def __str__(self) -> str:
        rows = [("parameter", "shape", "rule", "method")]
        for group in self.groups:
            index, placement = self.taken.get(group[0].name, (None, None))
            rule, method = ("-", "-") if placement is None else (str(index), str(placement.method))
            shape = "x".join(map(str, group[0].parameter.shape)) or "scalar"
            rows.append((" = ".join(site.name for site in group), shape, rule, method))
        for name, (index, added) in self.added.items():
            rows.append((name, type(added.host).__name__, str(index), str(added.method)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        for index, (selector, acts) in enumerate(self.strategy.rules):
            what = "usual sites" if selector is None else repr(selector)
            count = self._count(index)
            note = f"{count} parameter{'s' * (count != 1)}" if count else "takes nothing"
            lines.append(f"rule {index}: {what} -> {acts}: {note}")
        return "\n".join(lines)

    __repr__ = __str__


def _hosts(base: FrozenBase, model: nn.Module | None, selector: Selector) -> list[Site]:
    """The outermost modules that a selector selects, as sites; never the model itself."""
    root = base.tree.module if model is None else model
    nothing = torch.empty(0)
    found: list[Site] = []
    for name, module in root.named_modules():
        site = Site(name, name, "", module, next(module.parameters(), nothing))
        if name and not any(name.startswith(f"{outer.name}.") for outer in found) and selector(site):
            found.append(site)
    return found
