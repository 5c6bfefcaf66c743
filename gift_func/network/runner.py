"""Runs a network with structured weights in the places of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..weights import Dense, Slot, Weight
from ..weights.call import Call, calling
from .copy_pool import CopyPool, PooledCopy
from .fast_path import FastPath
from .frozen_base import FrozenBase
from .module_tree import ModuleTree, join

Tensors = Mapping[str, Tensor]


class MakesWeights(Protocol):
    """What makes structured weights of adapter tensors."""

    base: FrozenBase
    """What they are made of."""

    names: tuple[str, ...]
    """The adapted parameters."""

    def weights(self, tensors: Tensors, trains: Callable[[str], bool]) -> dict[str, Weight]:
        """The structured weights, by the name of the parameter; `trains` tells whether a module is in training mode."""

    def refresh(self) -> None:
        """Look up anew what follows from the base alone, after the base was written to."""


class Runner:
    """Runs private copies of a network on the weights that adapter tensors make.

    Between calls the weights of the model's own tensors are bound in the pool's resting copy. A call on those needs no
    binding, and a checkpoint that runs a part of the copy again in backward finds them in place. A call on other tensors
    gets a copy of its own, so calls may overlap, in threads or in generators.

    Args:
        pool: the private copies.
        maker: makes weights of tensors.

    Attributes:
        computes: whether a weight that is bound between calls holds a tensor that its method computed, so that it must be
            made anew for each call.
    """

    def __init__(self, pool: CopyPool, maker: MakesWeights) -> None:
        self.pool = pool
        self.computes = False
        self._maker = maker
        self._tensors: Tensors = {}
        self._weights: dict[str, Weight] | None = None
        self._on_base = False
        self._epoch = -1
        pool.when_made(self._adopt)

    # --- between calls

    def bind_between_calls(self, tensors: Tensors) -> None:
        """Leave the weights that these adapter tensors make bound between calls."""
        with self.pool.lock:
            self._refresh()
            self._tensors, self._on_base = tensors, False
            # The views that weights are made of must carry gradients, whatever mode the model is made or moved in.
            with torch.inference_mode(False), torch.enable_grad():
                self._weights = None if self.pool.is_undecided else self.weights(tensors)
            if self.pool.is_made:
                self._bind(self.pool.tree)

    def bind_base(self) -> None:
        """Leave the base's tensors bound between calls; every call brings its own adapter tensors."""
        with self.pool.lock:
            self._refresh()
            self._tensors, self._on_base = {}, True
            if self.pool.is_made:
                self._bind(self.pool.tree)

    def rebind_if_replaced(self, tensors: Tensors) -> None:
        """Bind the tensors that are in the adapter now between calls, if they were put there for good."""
        self.pool.ready()
        if not self._are_bound(tensors) and all(isinstance(tensor, nn.Parameter) for tensor in tensors.values()):
            self.bind_between_calls(tensors)

    def rebase(self, maker: MakesWeights, tensors: Tensors) -> None:
        """Exchange the base for a moved or cast one, of which weights are then made."""
        base = maker.base
        with self.pool.lock:
            self.pool.rebase(base)
            self._maker = maker
            if self.pool.is_made:
                self._fast_path = FastPath(base, self.pool.tree, maker.names)
        if self._on_base:
            self.bind_base()
        else:
            self.bind_between_calls(tensors)

    def _are_bound(self, tensors: Tensors) -> bool:
        return all(map(is_, tensors.values(), self._tensors.values())) and not self.computes

    def _adopt(self, tree: ModuleTree) -> None:
        """Find the adapted parameters in the resting copy, which was just made, and bind their weights there."""
        names = self._maker.names
        self._fast_path = FastPath(self.pool.base, tree, names)
        paths = {id(module): path for path, module in tree.modules.items()}
        # Every place of every adapted parameter, by the first dotted name of the module that holds it.
        self._places = {join(paths[id(module)], attribute): name for name in names for module, attribute in tree.places[name]}
        if self._epoch >= 0:
            self._bind(tree)

    def _bind(self, tree: ModuleTree) -> None:
        base = self.pool.base
        if self._on_base:
            self.computes = False
            # Modules of the adapter's own have parameters that the base has not.
            slots: dict[str, Tensor] = {name: base.tensors.get(name, tree.tensor(name)) for name in self._maker.names}
        else:
            weights = self._weights
            if weights is None:
                with torch.enable_grad():
                    weights = self._maker.weights(self._tensors, lambda name: tree.modules[name].training)
            self.computes = holds_computed(weights, self._tensors.values())
            # Parameters that are trained themselves are slots too: only a slot notices a checkpoint that drops its gradient.
            slots = {name: Slot.of(weight) for name, weight in weights.items()}
        self._weights = None
        self.pool.bind(tree, {**slots, **self._fast_path.guarded()})

    def _refresh(self) -> None:
        self._epoch = self.pool.base.epoch
        self._maker.refresh()

    def _watch_base(self) -> None:
        if self.pool.base.watch() != self._epoch:
            if self._tensors:
                self.bind_between_calls(self._tensors)
            else:
                self._refresh()

    # --- calls

    def weights(self, tensors: Tensors) -> dict[str, Weight]:
        """The structured weights that adapter tensors make in the network's modes, by the name of the parameter."""
        return self._maker.weights(tensors, self.pool.trains)

    def forward(self, tensors: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the network on the tensors that are in the adapter now."""
        if torch.compiler.is_compiling():
            return self._traced(tensors, {}, args, kwargs)
        module = self.pool.module
        if self._are_bound(tensors) and not (self._fast_path.fused and self._fast_path.is_taken(tensors.values())):
            with self.calling():
                return module(*args, **kwargs)
        # torch.func.functional_call put others there, say: as with any module, buffers are then written in place.
        with self._bound(tensors, {}, private_buffers=False) as (copy, call):
            return call.returns(copy.tree.module(*args, **kwargs))

    def functional_call(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward on any tensors and buffers; nothing of the model is written to."""
        if torch.compiler.is_compiling():
            return self._traced(tensors, buffers, args, kwargs)
        with self._bound(tensors, buffers, private_buffers=True) as (copy, call):
            return call.returns(copy.tree.module(*args, **kwargs))

    def stateful_call(
        self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any], private_buffers: bool = True
    ) -> tuple[Any, dict[str, Tensor], bool]:
        """The forward on any tensors and buffers, what became of these buffers, and whether a checkpoint will run it again.

        Args:
            private_buffers: whether the other buffers are copies, so that nothing of the model is written to.
        """
        if torch.compiler.is_compiling():
            return self._traced(tensors, buffers, args, kwargs), dict(buffers), False
        with self._bound(tensors, buffers, private_buffers) as (copy, call):
            made = copy.tree.module(*args, **kwargs)
            after: dict[str, Tensor] = {}
            for name in buffers:
                module_name, _, attribute = name.rpartition(".")
                after[name] = copy.tree.modules[module_name].get_buffer(attribute)
            return made, after, call.checkpointed

    @contextmanager
    def calling(self) -> Iterator[Call]:
        """Around every use of the resting copy: notice writes to the base, and checkpoints."""
        self._watch_base()
        with calling() as call:
            yield call

    @contextmanager
    def _bound(self, tensors: Tensors, buffers: Tensors, private_buffers: bool) -> Iterator[tuple[PooledCopy, Call]]:
        self._watch_base()
        self.pool.ready()
        bindings = self._fast_path.bindings(self.weights(tensors), tensors.values())
        with self.pool.checkout(bindings, buffers, private_buffers) as found:
            yield found

    def _traced(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A trace knows neither threads nor checkpoints that outlive it, so torch's own binding will do.
        self.pool.ready()
        weights = self.weights(tensors)
        slots = {name: w.tensor if isinstance(w, Dense) else Slot.of(w) for name, w in weights.items()}
        placed = {place: slots[name] for place, name in self._places.items()}
        return torch.func.functional_call(self.pool.module, {**placed, **buffers}, args, kwargs, tie_weights=False)


def holds_computed(weights: Mapping[str, Weight], tensors: Collection[Tensor]) -> bool:
    """Whether a weight holds a tensor that its method computed of these, which the next optimizer step would make stale."""
    leaves = [leaf for weight in weights.values() for leaf in weight.leaves() if leaf.grad_fn is not None]
    if not leaves:
        return False
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return any(leaf.untyped_storage().data_ptr() not in known for leaf in leaves)
