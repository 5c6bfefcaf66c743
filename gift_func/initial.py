"""An adapter's initial tensors: drawn, or only their names and shapes, and the global names they go by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .body import Part
from .errors import AdaptError
from .select import Site
from .strategy import Placement


class Initial:
    """Initial tensors, drawn from a generator or from torch's global one."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def site(self, site: Site) -> Site:
        """The site as the method is shown it."""
        return site

    def own(self, placement: Placement) -> dict[str, Tensor]:
        """The tensors of one placement, by the method's names."""
        return placement.method.init(self.site(placement.site), self.generator)

    def common(self, group: Sequence[Placement]) -> dict[str, Tensor]:
        """The tensors that all placements of one rule share."""
        return group[0].rule.common([self.site(placement.site) for placement in group], self.generator)


class Shapes(Initial):
    """Tensors without values, and without a draw from any generator: for others that are about to be given."""

    def site(self, site: Site) -> Site:
        """The site with a parameter that has a shape and a type only."""
        bare = torch.empty(site.parameter.shape, dtype=site.parameter.dtype, device="meta")
        return replace(site, parameter=bare)


def parts_of(
    placements: Sequence[Placement], initial: Initial, taken: Iterable[str]
) -> tuple[list[Part], dict[str, nn.Parameter]]:
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
        tensors[name] = nn.Parameter(tensor.detach(), requires_grad=trained)

    groups: dict[int, list[Placement]] = {}
    for placement in placements:
        groups.setdefault(id(placement.rule), []).append(placement)
    names: dict[int, dict[str, str]] = {}
    with torch.no_grad():
        for group in groups.values():
            shared = initial.common(group)
            for local, tensor in shared.items():
                add(local, tensor, trained=False)
            for placement in group:
                names[id(placement)] = {local: local for local in shared}
        for placement in placements:
            for local, tensor in initial.own(placement).items():
                name = names[id(placement)][local] = placement.full_name(local)
                add(name, tensor, trained=local not in placement.method.frozen)
    parts = []
    for placement in placements:
        led = names[id(placement.lead)] if placement.lead else {}
        parts.append(Part(placement.name, placement.method, {**led, **names[id(placement)]}))
    return parts, tensors
