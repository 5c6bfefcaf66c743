"""How the adapters of several models are stacked, if they differ in rank, in scale and in which parameters they adapt.

Every member's weight of a parameter is `method.weight(base, tensors)` of one method, that of the largest rank (the *wide*
one), and of the member's share of stacked tensors. A smaller rank is padded with zeros. The tensor in which the change is
linear is multiplied by the member's scale divided by the wide method's, and by 0 where it is padded: so the padding gets no
gradient, and has no effect even if an optimizer changes it. A member that does not adapt the parameter has the method's
initial tensors, with which the weight is the base's.
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

_RANK_OPTIONS = ("rank", "alpha", "rslora", "init", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Member:
    """What is needed to make a model from a member's share of a stack.

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
    """The adapted parameters of a stack, and its padding and scales.

    Attributes:
        parameters: the adapted parameters, with the wide methods.
        members: the members.
        gains: global name -> `(N, ...)` factors of the stacked tensor, where members differ in rank or scale.
        stand_ins: global name -> (which members adapt the parameter, `(N,)`; the tensor of the others).
        once: names of the tensors that are frozen and equal in all members, and so are stored once.
    """

    parameters: AdaptedParameters
    members: tuple[Member, ...]
    gains: dict[str, Tensor]
    stand_ins: dict[str, tuple[Tensor, Tensor]]
    once: frozenset[str] = frozenset()

    def extras(self) -> dict[str, Tensor]:
        """Further stacked tensors, of which `applied` takes a member's share."""
        return {
            **{f"gain {name}": tensor for name, tensor in self.gains.items()},
            **{f"present {name}": present for name, (present, _) in self.stand_ins.items()},
        }

    def applied(self, tensors: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One member's tensors for the wide methods."""
        made = dict(tensors)
        for name in self.gains:
            made[name] = made[name] * extras[f"gain {name}"]
        for name, (_, base) in self.stand_ins.items():
            made[name] = torch.where(extras[f"present {name}"], made[name], base)
        return made

    def select(self, index: Sequence[int]) -> StackLayout:
        """The layout of some of the members."""
        members = torch.tensor(index)
        gains = {name: tensor[members.to(tensor.device)] for name, tensor in self.gains.items()}
        there = {name: (mask[members.to(mask.device)], base) for name, (mask, base) in self.stand_ins.items()}
        return replace(self, members=tuple(self.members[i] for i in index), gains=gains, stand_ins=there)

    def member_tensors(self, index: int, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One member's own tensors, as views of the stacked ones."""
        return {
            name: cut_to(stacked[name] if name in self.once else stacked[name][index], shape)
            for name, shape in self.members[index].shapes.items()
        }

    def to(self, base: FrozenBase, like: Mapping[str, Tensor]) -> StackLayout:
        """The layout on a moved or cast base, with its tensors on the devices of the stacked ones."""
        gains = {name: tensor.to(like[name]) for name, tensor in self.gains.items()}
        there = {name: (mask.to(like[name].device), base.to(like[name])) for name, (mask, base) in self.stand_ins.items()}
        members = tuple(replace(member, parameters=member.parameters.on(base)) for member in self.members)
        return replace(self, parameters=self.parameters.on(base), members=members, gains=gains, stand_ins=there)


def pad_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor padded with zeros at the end of its axes."""
    return F.pad(tensor, [n for d in reversed(range(tensor.ndim)) for n in (0, shape[d] - tensor.shape[d])])


def cut_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A view of a tensor without the padding of `pad_to`."""
    return tensor if tensor.shape == shape else tensor[tuple(slice(n) for n in shape)]


def make_layout(models: Sequence[AdaptedModel]) -> tuple[StackLayout, dict[str, nn.Parameter]]:
    """The layout of a stack of models, and their tensors stacked.

    Raises:
        AdaptError: if they cannot share one; it names the parameter and what differs.
    """
    base = models[0].frozen_base
    by_name: dict[str, list[AdaptedParameter | None]] = {}
    for index, model in enumerate(models):
        for parameter in model.adapted_parameters:
            by_name.setdefault(parameter.name, [None] * len(models))[index] = parameter
    order = {name: position for position, name in enumerate(models[0].copy_pool.outline.places)}
    stacked: dict[str, nn.Parameter] = {}
    once: set[str] = set()
    gains: dict[str, Tensor] = {}
    stand_ins: dict[str, tuple[Tensor, Tensor]] = {}
    stacked_parameters = [
        _StackedParameter(name, by_name[name], models) for name in sorted(by_name, key=lambda name: order.get(name, len(order)))
    ]
    # Tensors that several parameters share (a bias trained along) are padded by the one whose method has rank axes.
    for one in sorted(stacked_parameters, key=lambda one: not one.axes):
        tensors = one.tensors(base, stacked)
        for local, (first, *others) in tensors.items():
            full = one.parameter.names[local]
            trained = any(model.adapter[full].requires_grad for model in models if full in model.adapter)
            if not trained and all(other is first or torch.equal(other, first) for other in others):
                once.add(full)
            stacked[full] = nn.Parameter(clone(first) if full in once else torch.stack(tensors[local]), requires_grad=trained)
        for local, gain in one.gains().items():
            if local in tensors:
                gains[one.parameter.names[local]] = gain.to(tensors[local][0])
        for local, stand_in in one.stand_ins(tensors).items():
            stand_ins[one.parameter.names[local]] = stand_in
    members = tuple(
        Member(model.adapted_parameters, model.strategy, {name: tensor.shape for name, tensor in model.adapter.items()})
        for model in models
    )
    return StackLayout(
        AdaptedParameters(base, [one.parameter for one in stacked_parameters]), members, gains, stand_ins, frozenset(once)
    ), stacked


class _StackedParameter:
    """One adapted parameter of a stack.

    Args:
        name: the parameter's name.
        parameters: each member's adapted parameter, None for a member without it.
        models: the members.
    """

    def __init__(self, name: str, parameters: Sequence[AdaptedParameter | None], models: Sequence[AdaptedModel]) -> None:
        self.name = name
        self.parameters = parameters
        self.models = models
        present = [(index, parameter) for index, parameter in enumerate(parameters) if parameter is not None]
        self.whole = len(present) == len(parameters)
        wide = present[0][1]
        for _, parameter in present:
            if getattr(parameter.method, "rank", 0) > getattr(wide.method, "rank", 0):
                wide = parameter
        self.parameter = wide
        uneven = any(parameter.method != wide.method for _, parameter in present) or not self.whole
        widest = next(index for index, parameter in present if parameter is wide)
        self.wide = {local: models[widest].adapter[full].detach() for local, full in wide.names.items()}
        self.axes = wide.method.rank_axes(self.wide) if uneven else {}
        self.scaled = wide.method.scaled_tensors(self.wide) if self.axes else {}
        for index, parameter in present:
            if parameter.names != wide.names:
                raise AdaptError(
                    f"members {widest} and {index} adapt {name!r} by other tensors ({', '.join(wide.names)}; "
                    f"{', '.join(parameter.names)}: {wide.method}; {parameter.method}), so they cannot share a stack. Stack "
                    "those of one method, or keep them side by side in a gf.AdapterBank."
                )
            reason = _differs(parameter.method, wide.method, bool(self.axes))
            if reason is not None:
                raise AdaptError(
                    f"members {widest} and {index} cannot share a stack: at {name!r} one has {wide.method} and the "
                    f"other {parameter.method}, and {reason}. Stack equal ones, or keep them side by side in a gf.AdapterBank."
                )

    def tensors(self, base: FrozenBase, seen: Container[str]) -> dict[str, list[Tensor]]:
        """Every member's tensor for each of the method's tensors, padded to one shape.

        Args:
            base: the frozen base.
            seen: global names of tensors that are stacked already.
        """
        found: dict[str, list[Tensor]] = {}
        start: dict[str, Tensor] | None = None
        for local, full in self.parameter.names.items():
            like, members = self.wide[local], []
            for model in self.models:
                if full in seen:
                    break
                if full in model.adapter:  # also without the parameter, where several parameters share a tensor
                    members.append(self._padded(model.adapter[full].detach(), like.shape, local))
                elif local in self.axes or local in self.scaled:
                    members.append(torch.zeros_like(like))
                else:
                    start = self._start(base) if start is None else start
                    if local not in start:  # it is another parameter's of the module, which stacks it
                        break
                    members.append(start[local].reshape(like.shape))
            else:
                found[local] = members
        return found

    def gains(self) -> dict[str, Tensor]:
        """The factors of tensors, `(N, ...)`, where members differ.

        Tensors in which the change is linear are multiplied by the member's scale divided by the wide one's, 0 in members
        without the parameter. The others, if trained, are multiplied by 0 in the padding: in a product of two changes
        (LoHa) an optimizer's change of one factor's padding would have an effect through the other.
        """
        found = {}
        for local in self.axes | self.scaled:
            like, axes = self.wide[local], self.axes.get(local, ())
            full = self.parameter.names[local]
            gain = torch.zeros(
                len(self.parameters), *(n if d in axes else 1 for d, n in enumerate(like.shape)), dtype=torch.float64
            )
            for factors, model, parameter in zip(gain, self.models, self.parameters, strict=True):
                shape = model.adapter[full].shape if full in model.adapter else like.shape
                value = 1.0
                if local in self.scaled:
                    value = (
                        0.0
                        if parameter is None
                        else parameter.method.scaled_tensors(dict.fromkeys(parameter.names, like))[local]
                    )
                    value /= self.scaled[local]
                elif full in model.adapter and not model.adapter[full].requires_grad:
                    shape = like.shape
                factors[tuple(slice(shape[d] if d in axes else 1) for d in range(like.ndim))] = value
            if not bool((gain == 1).all()):
                found[local] = gain
        return found

    def stand_ins(self, tensors: Mapping[str, list[Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Which members adapt the parameter, and the tensors of the others."""
        if self.whole:
            return {}
        here = torch.tensor([parameter is not None for parameter in self.parameters])
        absent = next(index for index, parameter in enumerate(self.parameters) if parameter is None)
        return {
            local: (here.to(found[0].device), found[absent].clone())
            for local, found in tensors.items()
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
        return pad_to(tensor, shape)

    def _start(self, base: FrozenBase) -> dict[str, Tensor]:
        method = self.parameter.method
        absent = next(index for index, parameter in enumerate(self.parameters) if parameter is None)
        site = next((site for group in base.sites() for site in group if site.name == self.name), None)
        if site is None or not method.starts_as_base:
            raise AdaptError(
                f"member {absent} does not adapt {self.name!r}, and {method} cannot stand there without changing anything, so "
                "it cannot share a stack with the others. Keep them side by side in a gf.AdapterBank."
            )
        with torch.no_grad():
            return method.init_tensors(site, torch.Generator(site.parameter.device).manual_seed(0))


def _differs(method: WeightMethod, wide: WeightMethod, ranked: bool) -> str | None:
    """Why two methods cannot share a stack; None if they differ at most in rank, scale and initialisation."""
    if method == wide:
        return None
    if type(method) is not type(wide):
        return "methods cannot be mixed"
    free = _RANK_OPTIONS if ranked else ("init",)
    own = {field.name: getattr(method, field.name) for field in fields(method) if field.name in free}
    if method == wide.replace(**own):
        return None
    return "only rank, scale and initialisation may differ" if ranked else "its tensors cannot be filled up with zeros"
