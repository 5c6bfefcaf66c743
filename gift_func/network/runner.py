"""The body of an adapted model: a private copy of the network with the adapter's weights bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import WeightMethod
from ..weights import Dense, Slot, Weight
from ..weights.call import Call, calling
from .copy_pool import PrivateCopy
from .fast_path import fused_names, guards, runs_fused
from .frozen_base import FrozenBase
from .module_tree import Buffers, ModuleTree, clone, join
from .snapshot import Snapshot

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdaptedParameter:
    """One adapted parameter.

    Attributes:
        name: the parameter's dotted name.
        method: the method, settled for the parameter's site.
        names: the method's own name of each tensor -> its global name.
    """

    name: str
    method: WeightMethod
    names: dict[str, str]


@dataclass(frozen=True)
class PooledCopy:
    """A second copy, for calls with other tensors than the model's own.

    Attributes:
        structure: the copy.
        source: what the body held when the copy was made.
        own: what the copy held then.
        buffers: the modules that hold buffers, of the body and of the copy.
    """

    structure: ModuleTree
    source: Snapshot
    own: Snapshot
    buffers: list[tuple[nn.Module, nn.Module]]


class Runner(PrivateCopy):
    """A private copy of the network in which, between calls, the model's own structured weights rest.

    A call on those needs no binding, and a checkpoint that runs a part of it again in backward finds them in place. A
    call on other tensors gets a copy of its own; so calls may overlap, in threads or in generators.

    Args:
        base: the frozen base.
        structure: the copy, with private buffers; its module may differ from the base's where modules were replaced. None
            for one of the base's that is made at first use.
        parts: the adapted parameters, by their names in this copy.
        buffers: for a copy that is to be made, its private buffers; None for copies of the base's.

    Attributes:
        computes: whether a weight holds a tensor that its method computed.
    """

    def __init__(
        self,
        base: FrozenBase,
        structure: ModuleTree | None,
        parts: Sequence[AdaptedParameter],
        buffers: dict[str, Buffers] | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.computes = False
        self._twins: list[PooledCopy] = []
        self._resting: Tensors = {}
        self._weights: dict[str, Weight] | None = None
        self._slots: dict[str, Tensor] = {}
        self._on_base = False
        self._epoch = -1
        super().__init__(base, structure, buffers)

    def furnish(self, structure: ModuleTree) -> None:
        """Learn where the adapted parameters stand in the copy, and put their weights there."""
        names = [part.name for part in self.parts]
        slots = [*names, *(name for name in self.base.slots if name in structure.places and name not in names)]
        self._fused = fused_names(structure, slots)
        self._guards = guards(structure, slots)
        paths = {id(module): path for path, module in structure.modules.items()}
        # Every place of every adapted parameter, by the first dotted name of the module that holds it.
        self._places = {
            join(paths[id(module)], attribute): name for name in names for module, attribute in structure.places[name]
        }
        if self._epoch >= 0:
            self._hold(structure)

    def prepare(self) -> None:
        """Look up what the methods derive from the base, as it is now."""
        self._epoch = self.base.epoch
        self._derived = {
            part.name: self.base.derived(part.name, part.method) for part in self.parts if part.name in self.base.weights
        }

    def bind_between_calls(self, tensors: Tensors) -> None:
        """Let the copy hold, between calls, the weights that these adapter tensors make."""
        with self._lock:
            self.prepare()
            self._resting, self._on_base = tensors, False
            # The views that weights are made of must carry gradients, whatever mode the model is made or moved in.
            with torch.inference_mode(False), torch.enable_grad():
                self._weights = None if self.is_undecided else self.weights(tensors)
            if self._own is not None:
                self._hold(self._own)

    def bind_base(self) -> None:
        """Let the copy hold the base's own tensors between calls, all of which bring theirs."""
        with self._lock:
            self.prepare()
            self._resting, self._on_base = {}, True
            if self._own is not None:
                self._hold(self._own)

    def _hold(self, structure: ModuleTree) -> None:
        if self._on_base:
            self.computes = False
            # Modules of the adapter's own have parameters that the base has not.
            self._slots = {part.name: self.base.tensors.get(part.name, structure.tensor(part.name)) for part in self.parts}
        else:
            weights = self._weights
            if weights is None:
                with torch.enable_grad():
                    weights = self._weights_in(self._resting, lambda name: structure.modules[name].training)
            self.computes = self._computes(weights.values())
            # Parameters that are trained themselves are slots too: only a slot notices a checkpoint that drops its gradient.
            self._slots = {name: Slot.of(weight) for name, weight in weights.items()}
        self._weights = None
        for name in self._guards:
            self._slots[name] = Slot.of(self.base.weights[name])
        for name, tensor in self._slots.items():
            structure.bind(name, tensor)
        self._twins = []

    def _computes(self, weights: Iterable[Weight]) -> bool:
        """Whether a weight holds a tensor that its method computed, which the next optimizer step would make stale."""
        leaves = [tensor for weight in weights for tensor in weight.leaves() if tensor.grad_fn is not None]
        if not leaves:
            return False
        given = [*self._resting.values(), *(t for made in self._derived.values() for t in made.values())]
        known = {t.untyped_storage().data_ptr() for t in given}
        known |= {t.untyped_storage().data_ptr() for w in self.base.weights.values() for t in w.leaves()}
        return any(tensor.untyped_storage().data_ptr() not in known for tensor in leaves)

    def rebind_if_replaced(self, tensors: Tensors) -> None:
        """Rest on the tensors that stand in the adapter's places, if others were put there for good."""
        self.ready()
        own = all(map(is_, tensors.values(), self._resting.values())) and not self.computes
        if not own and all(isinstance(tensor, nn.Parameter) for tensor in tensors.values()):
            self.bind_between_calls(tensors)

    def weights(self, tensors: Tensors) -> dict[str, Weight]:
        """The structured weights that adapter tensors make of the base's, by the name of the parameter."""
        return self._weights_in(tensors, self.trains)

    def _weights_in(self, tensors: Tensors, trains: Callable[[str], bool]) -> dict[str, Weight]:
        made: dict[str, Weight] = {}
        for part in self.parts:
            own = {local: tensors[name] for local, name in part.names.items()}
            if part.name in self.base.weights:
                weight = part.method.weight(self.base.weights[part.name], {**self._derived[part.name], **own})
                made[part.name] = weight if trains(part.name.rpartition(".")[0]) else weight.eval()
            else:  # a module that an action put in: its parameters are the adapter's
                made[part.name] = Dense(own[""])
        return made

    def forward(self, tensors: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the network on the tensors that stand in the adapter's places now."""
        if torch.compiler.is_compiling():
            return self._traced(tensors, {}, args, kwargs)
        own = self.structure
        resting = all(map(is_, tensors.values(), self._resting.values())) and not self.computes
        if resting and not (self._fused and runs_fused(own, tensors.values())):
            with self.calling():
                return own.module(*args, **kwargs)
        # torch.func.functional_call put others there, say: as with any module, buffers are then written in place.
        with self.bound(tensors, {}, private_buffers=False) as (twin, call):
            return call.returns(twin.structure.module(*args, **kwargs))

    def pure_forward(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward on any tensors and buffers; nothing of the model is written to."""
        if torch.compiler.is_compiling():
            return self._traced(tensors, buffers, args, kwargs)
        with self.bound(tensors, buffers, private_buffers=True) as (twin, call):
            return call.returns(twin.structure.module(*args, **kwargs))

    def stateful_forward(
        self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any], private_buffers: bool = True
    ) -> tuple[Any, dict[str, Tensor], bool]:
        """The forward on any tensors and buffers, what became of these buffers, and whether a checkpoint will run it again.

        Args:
            private_buffers: whether the other buffers are copies, so that nothing of the model is written to.
        """
        if torch.compiler.is_compiling():
            return self._traced(tensors, buffers, args, kwargs), dict(buffers), False
        with self.bound(tensors, buffers, private_buffers) as (twin, call):
            made = twin.structure.module(*args, **kwargs)
            after: dict[str, Tensor] = {}
            for name in buffers:
                module_name, _, attribute = name.rpartition(".")
                after[name] = twin.structure.modules[module_name].get_buffer(attribute)
            return made, after, call.checkpointed

    @contextmanager
    def calling(self) -> Iterator[Call]:
        """Around every use of the copy: look after the base, and for checkpoints."""
        self._look_after_base()
        with calling() as call:
            yield call

    def _look_after_base(self) -> None:
        if self.base.watch() != self._epoch:
            if self._resting:
                self.bind_between_calls(self._resting)
            else:
                self.prepare()

    def _traced(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A trace knows neither threads nor checkpoints that outlive it, so torch's own binding will do.
        self.ready()
        weights = self.weights(tensors)
        slots = {name: w.tensor if isinstance(w, Dense) else Slot.of(w) for name, w in weights.items()}
        placed = {place: slots[name] for place, name in self._places.items()}
        return torch.func.functional_call(self.module, {**placed, **buffers}, args, kwargs, tie_weights=False)

    @contextmanager
    def bound(self, tensors: Tensors, buffers: Tensors, private_buffers: bool) -> Iterator[tuple[PooledCopy, Call]]:
        """A copy with the weights that these tensors make in place, to this call alone."""
        self._look_after_base()
        structure = self.structure
        weights = self.weights(tensors)
        slots: dict[str, Tensor] = {name: Slot.of(weight) for name, weight in weights.items()}
        if self._fused and runs_fused(structure, tensors.values()):
            for name in (*self._fused, *self._guards):
                slots[name] = (weights.get(name) or self.base.weights[name]).dense()
        with self.checkout(slots, buffers, private_buffers) as found:
            yield found

    @contextmanager
    def checkout(self, slots: Tensors, buffers: Tensors, private_buffers: bool) -> Iterator[tuple[PooledCopy, Call]]:
        """A copy with these in the places of parameters, to this call alone.

        It goes back for the next call unless this one changed its attributes, or met a checkpoint: that will run parts
        of the copy again in backward and must find the same tensors there, so the copy is left to it; as it is to a
        forward that is a generator and has yet to run.
        """
        with self.calling() as call:
            twin = self._lease()
            for source, target in twin.buffers:
                for attribute, buffer in source._buffers.items():
                    target._buffers[attribute] = buffer if buffer is None or not private_buffers else clone(buffer)
            for name, buffer in buffers.items():
                module_name, _, attribute = name.rpartition(".")
                twin.structure.modules[module_name]._buffers[attribute] = buffer
            for name, slot in slots.items():
                twin.structure.bind(name, slot)
            yield twin, call
            if not (call.checkpointed or call.outlived) and twin.own.holds():
                for name in slots:
                    twin.structure.bind(name, self._slots[name] if name in self._slots else self.base.tensors[name])
                self._twins.append(twin)

    def _lease(self) -> PooledCopy:
        while self._twins:
            try:
                twin = self._twins.pop()
            except IndexError:  # another thread took the last one
                break
            if twin.source.holds():
                return twin
        resting = self.structure
        structure = resting.copy()
        pairs = zip(resting.modules.values(), structure.modules.values(), strict=True)
        buffers = [(mine, other) for mine, other in pairs if mine._buffers]
        source, own = (Snapshot(found.modules.values()) for found in (resting, structure))
        return PooledCopy(structure, source, own, buffers)
