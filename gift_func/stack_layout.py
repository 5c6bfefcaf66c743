"""How the adapters of several models share one stack: which are wider, which lack a place, which tensors are one.

Every member's weight at a place is `method.weight(base, tensors)` of one method, the *wide* one, and of its share of
stacked tensors. A member of smaller rank has zeros there, and the tensor in which the change is linear is multiplied by
its own scale over the wide one's, and by 0 where it has nothing: so the zeros get no gradient, and whatever an optimizer
did to them would change nothing. A member without the place has the base's own weight there, as the method starts it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapted_model import AdaptedModel
from .adapter import AdaptedParameter, AdaptedParameters
from .errors import AdaptError
from .methods import WeightMethod
from .network.frozen_base import FrozenBase
from .network.module_tree import clone
from .strategy import Strategy

_MEANT_BY_RANK = ("rank", "alpha", "rslora", "init", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Member:
    """What makes of a member's share of a stack a model again.

    Attributes:
        parameters: its adapted parameters.
        strategy: its strategy.
        shapes: global name -> the shape of its own tensor.
    """

    parameters: AdaptedParameters
    strategy: Strategy | None
    shapes: dict[str, torch.Size]


@dataclass(frozen=True)
class StackLayout:
    """The places of a stack and what its members make of them.

    Attributes:
        parameters: the adapted parameters, with the wide methods.
        members: one for each.
        gains: global name -> `(N, ...)` factors of the stacked tensor, where members differ in rank or scale.
        stand_ins: global name -> (which members have the place, `(N,)`; what stands for it in the others).
        once: names of the tensors that are frozen and equal in all members, and so are kept once.
    """

    parameters: AdaptedParameters
    members: tuple[Member, ...]
    gains: dict[str, Tensor]
    stand_ins: dict[str, tuple[Tensor, Tensor]]
    once: frozenset[str] = frozenset()

    def extras(self) -> dict[str, Tensor]:
        """The tensors that go along with the stacked ones, one share for each member."""
        return {
            **{f"gain {name}": tensor for name, tensor in self.gains.items()},
            **{f"present {name}": present for name, (present, _) in self.stand_ins.items()},
        }

    def applied(self, tensors: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One member's tensors as the wide methods take them."""
        made = dict(tensors)
        for name in self.gains:
            made[name] = made[name] * extras[f"gain {name}"]
        for name, (_, base) in self.stand_ins.items():
            made[name] = torch.where(extras[f"present {name}"], made[name], base)
        return made

    def taken(self, index: Sequence[int]) -> StackLayout:
        """The layout of some of the members."""
        rows = torch.tensor(index)
        gains = {name: tensor[rows.to(tensor.device)] for name, tensor in self.gains.items()}
        there = {name: (mask[rows.to(mask.device)], base) for name, (mask, base) in self.stand_ins.items()}
        return replace(self, members=tuple(self.members[i] for i in index), gains=gains, stand_ins=there)

    def to(self, base: FrozenBase, like: Mapping[str, Tensor]) -> StackLayout:
        """The layout on a moved or cast base, with its tensors where the stacked ones are."""
        gains = {name: tensor.to(like[name]) for name, tensor in self.gains.items()}
        there = {name: (mask.to(like[name].device), base.to(like[name])) for name, (mask, base) in self.stand_ins.items()}
        members = tuple(replace(member, parameters=member.parameters.on(base)) for member in self.members)
        return replace(self, parameters=self.parameters.on(base), members=members, gains=gains, stand_ins=there)


def share(models: Sequence[AdaptedModel]) -> tuple[StackLayout, dict[str, nn.Parameter]]:
    """The layout of a stack of models, and their tensors stacked.

    Raises:
        AdaptError: if they cannot share one, with the place and what differs.
    """
    base = models[0].frozen_base
    at: dict[str, list[AdaptedParameter | None]] = {}
    for index, model in enumerate(models):
        for part in model.adapted_parameters:
            at.setdefault(part.name, [None] * len(models))[index] = part
    order = {name: position for position, name in enumerate(models[0].copy_pool.outline.places)}
    stacked: dict[str, nn.Parameter] = {}
    once: set[str] = set()
    gains: dict[str, Tensor] = {}
    stand_ins: dict[str, tuple[Tensor, Tensor]] = {}
    places = [_Place(name, at[name], models) for name in sorted(at, key=lambda name: order.get(name, len(order)))]
    parameters = [place.part for place in places]
    # Those that know where the rank is say what becomes of tensors that companions see too (a bias trained along).
    for place in sorted(places, key=lambda place: not place.axes):
        rows = place.rows(base, stacked)
        for local, (first, *others) in rows.items():
            full = place.part.names[local]
            trained = any(model.adapter[full].requires_grad for model in models if full in model.adapter)
            if not trained and all(row is first or torch.equal(row, first) for row in others):
                once.add(full)
            stacked[full] = nn.Parameter(clone(first) if full in once else torch.stack(rows[local]), requires_grad=trained)
        for local, gain in place.gains().items():
            if local in rows:
                gains[place.part.names[local]] = gain.to(rows[local][0])
        for local, stand_in in place.stand_ins(rows).items():
            stand_ins[place.part.names[local]] = stand_in
    members = tuple(
        Member(model.adapted_parameters, model.strategy, {name: tensor.shape for name, tensor in model.adapter.items()})
        for model in models
    )
    return StackLayout(AdaptedParameters(base, parameters), members, gains, stand_ins, frozenset(once)), stacked


class _Place:
    """One adapted parameter of a stack.

    Args:
        name: the parameter's name.
        parts: each member's part there, or None.
        models: the members.
    """

    def __init__(self, name: str, parts: Sequence[AdaptedParameter | None], models: Sequence[AdaptedModel]) -> None:
        self.name = name
        self.parts = parts
        self.models = models
        present = [(index, part) for index, part in enumerate(parts) if part is not None]
        self.whole = len(present) == len(parts)
        wide = present[0][1]
        for _, part in present:
            if getattr(part.method, "rank", 0) > getattr(wide.method, "rank", 0):
                wide = part
        self.part = wide
        uneven = any(part.method != wide.method for _, part in present) or not self.whole
        widest = next(index for index, part in present if part is wide)
        self.wide = {local: models[widest].adapter[full].detach() for local, full in wide.names.items()}
        self.axes = wide.method.rank_axes(self.wide) if uneven else {}
        self.scaled = wide.method.scaled_tensors(self.wide) if self.axes else {}
        for index, part in present:
            if part.names != wide.names:
                raise AdaptError(
                    f"members {widest} and {index} adapt {name!r} by other tensors ({', '.join(wide.names)}; "
                    f"{', '.join(part.names)}: {wide.method}; {part.method}), so they cannot share a stack. Stack those of "
                    "one method, or keep them side by side in a gf.AdapterBank."
                )
            reason = _differs(part.method, wide.method, bool(self.axes))
            if reason is not None:
                raise AdaptError(
                    f"members {widest} and {index} cannot share a stack: at {name!r} one has {wide.method} and the "
                    f"other {part.method}, and {reason}. Stack equal ones, or keep them side by side in a gf.AdapterBank."
                )

    def rows(self, base: FrozenBase, seen: Container[str]) -> dict[str, list[Tensor]]:
        """For each of the tensors that the method makes here one of every member, all of one shape.

        Args:
            base: the frozen base.
            seen: global names that other places have said already.
        """
        found: dict[str, list[Tensor]] = {}
        start: dict[str, Tensor] | None = None
        for local, full in self.part.names.items():
            like, rows = self.wide[local], []
            for model in self.models:
                if full in seen:  # it is another place's to say
                    break
                if full in model.adapter:  # without the place too, where tensors are shared by several places
                    rows.append(self._padded(model.adapter[full].detach(), like.shape, local))
                elif local in self.axes or local in self.scaled:
                    rows.append(torch.zeros_like(like))
                else:
                    start = self._start(base) if start is None else start
                    if local not in start:  # it comes with another parameter of the module, whose place says what it is
                        break
                    rows.append(start[local].reshape(like.shape))
            else:
                found[local] = rows
        return found

    def gains(self) -> dict[str, Tensor]:
        """What tensors are multiplied by, `(N, ...)`, where members differ.

        Those in which the change is linear: by the member's own scale over the wide one's, 0 where it has nothing. Of
        the others those that are trained, 0 where zeros were filled in: in a product of two changes (LoHa) what an
        optimizer did to the zeros of one would meet the other.
        """
        found = {}
        for local in self.axes | self.scaled:
            like, axes = self.wide[local], self.axes.get(local, ())
            full = self.part.names[local]
            gain = torch.zeros(len(self.parts), *(n if d in axes else 1 for d, n in enumerate(like.shape)), dtype=torch.float64)
            for row, model, part in zip(gain, self.models, self.parts, strict=True):
                own = model.adapter[full].shape if full in model.adapter else like.shape
                value = 1.0
                if local in self.scaled:
                    value = 0.0 if part is None else part.method.scaled_tensors(dict.fromkeys(part.names, like))[local]
                    value /= self.scaled[local]
                elif full in model.adapter and not model.adapter[full].requires_grad:
                    own = like.shape
                row[tuple(slice(own[d] if d in axes else 1) for d in range(like.ndim))] = value
            if not bool((gain == 1).all()):
                found[local] = gain
        return found

    def stand_ins(self, rows: Mapping[str, list[Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Which members have the place, and what the others' tensors are instead."""
        if self.whole:
            return {}
        here = torch.tensor([part is not None for part in self.parts])
        absent = next(index for index, part in enumerate(self.parts) if part is None)
        return {
            local: (here.to(found[0].device), found[absent].clone())
            for local, found in rows.items()
            if local not in self.axes and local not in self.scaled
        }

    def _padded(self, tensor: Tensor, shape: torch.Size, local: str) -> Tensor:
        if tensor.shape == shape:
            return tensor
        axes = self.axes.get(local, ())
        short = [(d in axes and n < m) or n == m for d, (n, m) in enumerate(zip(tensor.shape, shape, strict=False))]
        if tensor.ndim != len(shape) or not all(short):
            raise AdaptError(
                f"members cannot share a stack: {local} of {self.name!r} has shape {tuple(tensor.shape)} in one and "
                f"{tuple(shape)} in another, which zeros cannot make equal"
            )
        after = [(0, m - n) for n, m in zip(tensor.shape, shape, strict=True)]
        return F.pad(tensor, [n for pair in reversed(after) for n in pair])

    def _start(self, base: FrozenBase) -> dict[str, Tensor]:
        method = self.part.method
        absent = next(index for index, part in enumerate(self.parts) if part is None)
        site = next((site for group in base.sites() for site in group if site.name == self.name), None)
        if site is None or not method.starts_as_base:
            raise AdaptError(
                f"member {absent} does not adapt {self.name!r}, and {method} cannot stand there without changing anything, so "
                "it cannot share a stack with the others. Keep them side by side in a gf.AdapterBank."
            )
        with torch.no_grad():
            return method.init_tensors(site, torch.Generator(site.parameter.device).manual_seed(0))


def _differs(method: WeightMethod, wide: WeightMethod, ranked: bool) -> str | None:
    """Why two methods cannot stand in one stack; None where they differ in rank, scale and start at most."""
    if method == wide:
        return None
    if type(method) is not type(wide):
        return "methods cannot be mixed"
    free = _MEANT_BY_RANK if ranked else ("init",)
    own = {field.name: getattr(method, field.name) for field in fields(method) if field.name in free}
    if method == wide.replace(**own):
        return None
    return "only rank, scale and initialisation may differ" if ranked else "its tensors cannot be filled up with zeros"
