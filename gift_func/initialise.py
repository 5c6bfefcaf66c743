"""An adapter's initial tensors: drawn, or only their names and shapes, and the global names they go by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapter import AdaptedParameter
from .errors import AdaptError
from .methods import Method
from .methods.method import is_by_shape
from .select import Site
from .strategy import Placement

_FILLS = frozenset([Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_, Tensor.div_, Tensor.mul_])


class Unfilled(TorchFunctionMode):
    """Within it nothing is written to tensors without values: torch takes much longer to do so than to do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class Initial:
    """Initial tensors, drawn from a generator or from torch's global one."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._bare: dict[object, dict[str, Tensor]] = {}

    def site(self, site: Site) -> Site:
        """The site as the method is shown it."""
        return site

    def own(self, placement: Placement) -> dict[str, Tensor]:
        """The tensors of one placement, by the method's names."""
        site = placement.site
        if site.parameter.is_meta:
            return {name: _like(tensor) for name, tensor in self.bare(placement.method, site).items()}
        return placement.method.init_tensors(self.site(site), self.generator)

    def bare(self, method: Method, site: Site) -> dict[str, Tensor]:
        """The method's tensors without values, by its names; not to be kept, for other places may have the same."""
        if not is_by_shape(method):
            return self._init_bare(method, site)
        options = (getattr(method, item.name) for item in fields(cast(Any, method)))
        key = type(method), *options, site.parameter.shape, site.parameter.dtype
        found = self._bare.get(key)
        if found is None:
            found = self._bare[key] = self._init_bare(method, site)
        return found

    def _init_bare(self, method: Method, site: Site) -> dict[str, Tensor]:
        site = self.site(site)
        with Unfilled() if site.parameter.is_meta else nullcontext():
            return method.init_tensors(site, self.generator)

    def common(self, group: Sequence[Placement]) -> dict[str, Tensor]:
        """The tensors that all placements of one rule share."""
        rule = group[0].rule
        if type(rule).shared_tensors is Method.shared_tensors:
            return {}
        return rule.shared_tensors([self.site(placement.site) for placement in group], self.generator)

    def parameter(self, tensor: Tensor, trained: bool) -> nn.Parameter:
        """A tensor of the adapter."""
        return nn.Parameter(tensor.detach(), requires_grad=trained)


class Shapes(Initial):
    """Tensors without values, and without a draw from any generator: for others that are about to be given."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__(generator or torch.Generator())
        self._parameters: dict[tuple[Tensor, bool], nn.Parameter] = {}

    def site(self, site: Site) -> Site:
        """The site with a parameter that has a shape and a type only."""
        if site.parameter.is_meta:
            return site
        bare = torch.empty(site.parameter.shape, dtype=site.parameter.dtype, device="meta")
        return replace(site, parameter=bare)

    def own(self, placement: Placement) -> dict[str, Tensor]:
        """The tensors of one placement, by the method's names; places that are alike have the same."""
        return self.bare(placement.method, placement.site)

    def parameter(self, tensor: Tensor, trained: bool) -> nn.Parameter:
        """What a tensor of the adapter is like."""
        found = self._parameters.get((tensor, trained))
        if found is None:
            found = self._parameters[tensor, trained] = super().parameter(tensor, trained)
        return found


def _like(tensor: Tensor) -> Tensor:
    # On the meta device `torch.empty_like` takes ten times as long.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def common_name(local: str, before: int) -> str:
    """The global name of a tensor that one rule's places share, after so many rules with a tensor of that name."""
    return f"{local}_{before + 1}" if before else local


def parts_of(
    placements: Sequence[Placement], initial: Initial, taken: Iterable[str]
) -> tuple[list[AdaptedParameter], dict[str, nn.Parameter]]:
    """The parts that placements make, and their tensors under global names.

    Args:
        placements: the adapted parameters.
        initial: where the tensors come from.
        taken: global names that are in use.

    Raises:
        AdaptError: if two tensors would go by one name.
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
    used: dict[str, int] = {}
    with torch.no_grad():
        for group in groups.values():
            shared = {}
            for local, tensor in initial.common(group).items():
                shared[local] = common_name(local, used.setdefault(local, 0))
                used[local] += 1
                add(shared[local], tensor, trained=False)
            for placement in group:
                names[id(placement)] = dict(shared)
        for placement in placements:
            for local, tensor in initial.own(placement).items():
                name = names[id(placement)][local] = placement.full_name(local)
                add(name, tensor, trained=local not in placement.method.frozen)
    parts = []
    for placement in placements:
        led = names[id(placement.lead)] if placement.lead else {}
        parts.append(AdaptedParameter(placement.name, placement.method, {**led, **names[id(placement)]}))
    return parts, tensors
