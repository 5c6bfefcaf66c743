"""An adapter as a bank keeps it: tensors and what they are for, without a copy of the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import is_transformed, lasting_outside
from ..adapted_model import AdaptedModel, persistent_buffers
from ..kernels.function import apply
from ..network.frozen_base import FrozenBase
from ..network.modes import Modes
from ..network.module_tree import ModuleTree, clone, copied
from ..network.runner import AdaptedParameter
from ..strategy import Strategy
from ..weights import Dense, Weight


@dataclass(eq=False)
class Adapter:
    """One adapter.

    Attributes:
        base: the frozen base.
        parts: the adapted parameters.
        strategy: the strategy, or None where actions replaced modules.
        tensors: the adapter's tensors under global names: parameters, or views of stacked ones.
        buffers: the persistent buffers that are not the base's.
        structure: the network with the modules that the adapter brought in; None if it brought none.
    """

    base: FrozenBase
    parts: tuple[AdaptedParameter, ...]
    strategy: Strategy | None
    tensors: Mapping[str, Tensor]
    buffers: dict[str, Tensor]
    structure: ModuleTree | None
    _statistics: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _made: dict[Modes, tuple[int, dict[str, Weight]]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(model: AdaptedModel) -> Adapter:
        """An adapted model's adapter; its tensors are the model's own."""
        body = model._body
        state = model.adapter_state_dict()
        buffers = {name: clone(tensor) for name, tensor in state.items() if name not in model.adapter}
        own = body.is_made and own_modules(body.structure, body.base.structure)
        tensors = dict(model.adapter.items())
        return Adapter(body.base, model.parts, model.strategy, tensors, buffers, body.structure.copy(clone) if own else None)

    @property
    def address(self) -> int:
        """Where its first tensor lies in memory."""
        return next((tensor.data_ptr() for tensor in self.tensors.values()), 0)

    @property
    def apart(self) -> str | None:
        """Why the adapter cannot share a pass with others, or None."""
        if self.structure is not None:
            return "it brings modules of its own"
        if any(
            name not in self._statistics or tensor._version != self._statistics[name] for name, tensor in self.buffers.items()
        ):
            return "it keeps buffers of its own"
        return None

    def keep_statistics(self) -> None:
        """Let the adapter have persistent buffers of its own, which its models write to and share."""
        with self._lock:
            for name, buffer in persistent_buffers(self.base.structure).items():
                if name not in self.buffers:
                    with lasting_outside():
                        mine = clone(buffer)
                    self._statistics[name] = mine._version
                    self.buffers[name] = mine

    def on(self, base: FrozenBase, tensors: Mapping[str, Tensor]) -> Adapter:
        """The same adapter by other tensors, on the same base or another view of it."""
        if base is not self.base:
            base.adopt_derived(self.base)
        return Adapter(base, self.parts, self.strategy, dict(tensors), dict(self.buffers), self.structure)

    def apply(self, function: Callable[[Tensor], Tensor], base: FrozenBase) -> Adapter:
        """The same adapter with a function applied to all that is its own, on a base that it was applied to as well."""
        with lasting_outside():
            tensors = {
                name: nn.Parameter(function(tensor.detach()), requires_grad=tensor.requires_grad)
                for name, tensor in self.tensors.items()
            }
            buffers = {name: function(buffer.detach()) for name, buffer in self.buffers.items()}
            structure = None if self.structure is None else self.structure.copy(function)
        return Adapter(base, self.parts, self.strategy, tensors, buffers, structure)

    def __reduce__(self) -> tuple[Any, ...]:
        module = None
        if self.structure is not None:
            structure = self.structure.copy()
            for name in structure.places:
                found = self.tensors.get(name, self.base.tensors.get(name))
                if found is not None:
                    structure.bind(name, found)
            module = structure.module
        return _restore, (self.base, self.parts, self.strategy, self.tensors, self.buffers, module)

    def weights(self, modes: Modes) -> dict[str, Weight]:
        """The structured weights, by the name of the parameter; kept where they only view the tensors."""
        known = self._made.get(modes)
        if known is not None and known[0] == self.base.epoch:
            return known[1]
        made: dict[str, Weight] = {}
        with lasting_outside(), torch.enable_grad():
            for part in self.parts:
                weight: Weight
                own: dict[str, Tensor] = {local: self.tensors[name] for local, name in part.names.items()}
                if part.name in self.base.weights:
                    derived = self.base.derived(part.name, part.method)
                    weight = part.method.weight(self.base.weights[part.name], {**derived, **own})
                else:
                    weight = Dense(own[""])
                made[part.name] = weight if part.name.rpartition(".")[0] in modes else weight.eval()
        if not self._computes(made):
            self._made[modes] = self.base.epoch, made
        return made

    def rests(self, modes: Modes) -> bool:
        """Whether the weights of the last `weights` are kept."""
        return modes in self._made

    def _computes(self, weights: Mapping[str, Weight]) -> bool:
        """Whether a weight holds a tensor that its method computed, which training would make stale."""
        known = {tensor.untyped_storage().data_ptr() for tensor in self.tensors.values()}
        leaves = [leaf for weight in weights.values() for leaf in weight.leaves()]
        return any(leaf.grad_fn is not None and leaf.untyped_storage().data_ptr() not in known for leaf in leaves)

    def model(self) -> AdaptedModel:
        """The adapter as a model of its own, by the very same tensors."""
        structure = None
        if self.structure is not None:
            structure = ModuleTree(self.structure.detached())
            own = {part.name for part in self.parts}
            for name in structure.places:
                if name in self.base.tensors and name not in own:
                    structure.bind(name, self.base.tensors[name])
        held = copied(self.base.structure.held()) if structure is None else structure.held()
        for name, buffer in self.buffers.items():
            module_name, _, attribute = name.rpartition(".")
            held[module_name].tensors[attribute] = buffer
        tensors = {
            name: tensor
            if isinstance(tensor, nn.Parameter)
            else nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
            for name, tensor in self.tensors.items()
        }
        return AdaptedModel(self.base, structure, self.parts, tensors, self.strategy, held)


def side_by_side(entries: Sequence[Adapter], base: FrozenBase | None = None) -> list[Adapter]:
    """The same adapters with their tensors copied, those of one name and shape next to each other in memory.

    A batch that uses all of them then needs no copy of any: their tensors are one stack as they lie.

    Args:
        entries: adapters of bases that share their tensors.
        base: the one that all are put on; None leaves each on its own.
    """
    groups: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    for index, entry in enumerate(entries):
        for name, tensor in entry.tensors.items():
            groups.setdefault((name, tensor.shape, tensor.dtype, tensor.device), []).append((index, name))
    found: list[dict[str, nn.Parameter]] = [{} for _ in entries]
    for members in groups.values():
        with lasting_outside(), torch.no_grad():
            slab = torch.stack([entries[index].tensors[name] for index, name in members])
            for row, (index, name) in zip(slab.unbind(0), members, strict=True):
                found[index][name] = nn.Parameter(row.detach(), requires_grad=entries[index].tensors[name].requires_grad)
    return [
        entry.on(entry.base if base is None else base, {name: own[name] for name in entry.tensors})
        for entry, own in zip(entries, found, strict=True)
    ]


def stacked(tensors: Sequence[Tensor], lasting: bool = False) -> Tensor:
    """Tensors of one shape as one, `(K, ...)`: without a copy if they lie at equal distances in one memory.

    Args:
        tensors: of one shape.
        lasting: let a stack without a copy be of use after the tensors were written to, as an optimizer does. Autograd then
            cannot notice a write between a forward and its backward.
    """
    whole = None if lasting else _rows_of_stack(tensors)
    if whole is not None:
        return whole
    if len(tensors) == 1 and not lasting:
        return tensors[0].unsqueeze(0)
    if any(map(is_transformed, tensors)):
        return torch.stack(list(tensors))
    made: Tensor = apply(_Stack, lasting, *tensors)
    return made


def _rows_of_stack(tensors: Sequence[Tensor]) -> Tensor | None:
    """The parameter that the tensors are rows of, or these rows of it; None if they are no rows of one."""
    whole = tensors[0]._base
    if whole is None or not isinstance(whole, nn.Parameter) or any(tensor._base is not whole for tensor in tensors):
        return None
    shape, strides = tensors[0].shape, tensors[0].stride()
    for rows in (whole, whole.mT) if whole.ndim > 2 else (whole,):
        places = [divmod(int(tensor.storage_offset() - rows.storage_offset()), rows.stride(0)) for tensor in tensors]
        if rows.shape[1:] == shape and rows.stride()[1:] == strides and not any(rest for _, rest in places):
            index = [place for place, _ in places]
            if index == list(range(len(rows))):
                return rows
            return rows.index_select(0, torch.tensor(index, device=rows.device))
    return None


def lies_stacked(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie at equal distances in one memory."""
    first, second = tensors[0], tensors[1] if len(tensors) > 1 else tensors[0]
    step = second.data_ptr() - first.data_ptr()
    storage, strides = first.untyped_storage().data_ptr(), first.stride()
    start = first.data_ptr()
    return step >= 0 and all(
        tensor.data_ptr() == start + index * step
        and tensor.stride() == strides
        and tensor.untyped_storage().data_ptr() == storage
        for index, tensor in enumerate(tensors)
    )


class _Stack(torch.autograd.Function):
    """`torch.stack`; of tensors that already are a stack a view, and gradients that are laid out as they are."""

    @staticmethod
    def forward(ctx: object, lasting: bool, *tensors: Tensor) -> Tensor:
        if not lies_stacked(tensors):
            return torch.stack(tensors)
        first, second = tensors[0].data if lasting else tensors[0].detach(), tensors[min(1, len(tensors) - 1)]
        step = (second.data_ptr() - first.data_ptr()) // first.element_size()
        return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        # SampleAxis laid out as the parameters are become their gradients as they are; others would be copied one by one.
        return None, *grad.contiguous().unbind(0)


def own_modules(structure: ModuleTree, base: ModuleTree) -> bool:
    """Whether the modules are others than the base's in kind, or hold other parameters or hooks."""
    ours, theirs = structure.modules, base.modules
    if ours.keys() != theirs.keys() or structure.names.keys() != base.names.keys():
        return True
    return not all(map(is_, map(type, ours.values()), (type(theirs[name]) for name in ours)))


def _restore(
    base: FrozenBase,
    parts: tuple[AdaptedParameter, ...],
    strategy: Strategy | None,
    tensors: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    module: nn.Module | None,
) -> Adapter:
    return Adapter(base, parts, strategy, tensors, buffers, None if module is None else ModuleTree(module))
