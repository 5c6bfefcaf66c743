"""An adapter's initial tensors, drawn or as names and shapes only, and their global names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapter import AdaptedParameter
from .errors import AdaptError
from .methods import WeightMethod
from .select import Site
from .strategy import Placement

_FILLS = frozenset([Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_, Tensor.div_, Tensor.mul_])


class SkipFills(TorchFunctionMode):
    """Skip filling tensors on the meta device, which takes torch much longer than doing nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class Initial:
    """Initial tensors, drawn from a generator or from torch's global one."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._without_values: dict[object, dict[str, Tensor]] = {}

    def site(self, site: Site) -> Site:
        """The site that the method is given."""
        return site

    def own(self, placement: Placement) -> dict[str, Tensor]:
        """The tensors of one placement, by their short names."""
        site = placement.site
        if site.parameter.is_meta:
            return {name: _like(tensor) for name, tensor in self.without_values(placement.method, site).items()}
        return placement.method.init_tensors(self.site(site), self.generator)

    def without_values(self, method: WeightMethod, site: Site) -> dict[str, Tensor]:
        """The method's tensors without values, by their short names; the same tensors for all sites that are alike."""
        if not getattr(type(method).init_tensors, "by_shape", False):
            return self._init_without_values(method, site)
        options = (getattr(method, item.name) for item in fields(method))
        key = type(method), *options, site.parameter.shape, site.parameter.dtype
        found = self._without_values.get(key)
        if found is None:
            found = self._without_values[key] = self._init_without_values(method, site)
        return found

    def _init_without_values(self, method: WeightMethod, site: Site) -> dict[str, Tensor]:
        site = self.site(site)
        with SkipFills() if site.parameter.is_meta else nullcontext():
            return method.init_tensors(site, self.generator)

    def shared(self, group: Sequence[Placement]) -> dict[str, Tensor]:
        """The tensors that all placements of one rule share, by their short names."""
        rule = group[0].rule
        if type(rule).shared_tensors is WeightMethod.shared_tensors:
            return {}
        return rule.shared_tensors([self.site(placement.site) for placement in group], self.generator)

    def parameter(self, tensor: Tensor, trained: bool) -> nn.Parameter:
        """A tensor as a parameter of the adapter."""
        return nn.Parameter(tensor.detach(), requires_grad=trained)


class Shapes(Initial):
    """Tensors without values, which draw from no generator: the names, shapes and types that a state must have."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__(generator or torch.Generator())
        self._parameters: dict[tuple[Tensor, bool], nn.Parameter] = {}

    def site(self, site: Site) -> Site:
        """The site with its parameter on the meta device."""
        if site.parameter.is_meta:
            return site
        return replace(site, parameter=torch.empty(site.parameter.shape, dtype=site.parameter.dtype, device="meta"))

    def own(self, placement: Placement) -> dict[str, Tensor]:
        """The tensors of one placement, by their short names; the same tensors for all sites that are alike."""
        return self.without_values(placement.method, placement.site)

    def parameter(self, tensor: Tensor, trained: bool) -> nn.Parameter:
        """A tensor as a parameter; the same one each time."""
        found = self._parameters.get((tensor, trained))
        if found is None:
            found = self._parameters[tensor, trained] = super().parameter(tensor, trained)
        return found


def _like(tensor: Tensor) -> Tensor:
    # On the meta device `torch.empty_like` takes ten times as long.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def shared_name(local: str, before: int) -> str:
    """The global name of a tensor that one rule's sites share, which `before` earlier rules have used for theirs."""
    return f"{local}_{before + 1}" if before else local


def parts_of(
    placements: Sequence[Placement], initial: Initial, taken: Iterable[str]
) -> tuple[list[AdaptedParameter], dict[str, nn.Parameter]]:
    """The adapted parameters of a list of placements, and their tensors by global name.

    Raises:
        AdaptError: if two tensors would have one name, or one that is taken.
    """
    taken = set(taken)
    tensors: dict[str, nn.Parameter] = {}

    def add(name: str, tensor: Tensor, trained: bool) -> None:
        if name in tensors or name in taken:
            raise AdaptError(f"two adapted parameters would both name a tensor {name!r}; adapt one of them by another method")
        tensors[name] = initial.parameter(tensor, trained)

    groups: dict[int, list[Placement]] = {}
    for placement in placements:
        groups.setdefault(id(placement.rule), []).append(placement)
    names: dict[int, dict[str, str]] = {}
    used = Counter[str]()
    with torch.no_grad():
        for group in groups.values():
            shared = {}
            for local, tensor in initial.shared(group).items():
                shared[local] = shared_name(local, used[local])
                used[local] += 1
                add(shared[local], tensor, trained=False)
            names |= {id(placement): dict(shared) for placement in group}
        for placement in placements:
            for local, tensor in initial.own(placement).items():
                name = names[id(placement)][local] = placement.full_name(local)
                add(name, tensor, trained=local not in placement.method.frozen)
    parts = []
    for placement in placements:
        from_lead = names[id(placement.lead)] if placement.lead else {}
        parts.append(AdaptedParameter(placement.name, placement.method, {**from_lead, **names[id(placement)]}))
    return parts, tensors
