"""Binds structured weights into private copies of a network, and runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..weights import Dense, Slot, Weight
from ..weights.call import Call, calling
from .copy_pool import CopyPool
from .fast_path import FastPath
from .frozen_base import FrozenBase
from .module_tree import ModuleTree, NamedTensors, join


class MakesWeights(Protocol):
    """Makes structured weights from a frozen base and adapter tensors, as `AdaptedParameters` does."""

    base: FrozenBase
    """The frozen base."""

    names: tuple[str, ...]
    """The names of the adapted parameters."""

    def weights(self, tensors: NamedTensors, trains: Callable[[str], bool]) -> dict[str, Weight]:
        """The structured weights, by parameter name; `trains` returns whether a module is in training mode."""

    def refresh(self) -> None:
        """Compute again what depends on the base alone, after the base was written to."""


class Runner:
    """Runs private copies of a network on the weights of adapter tensors.

    Between calls the weights of the model's own tensors are bound in the pool's main copy. A call on those binds nothing,
    and a checkpoint that runs a part of the copy again in backward uses the same weights. A call on other tensors gets a
    copy of its own, so calls may overlap, in threads or in generators.

    Args:
        pool: the private copies.
        maker: makes weights from adapter tensors.

    Attributes:
        computes: whether a weight that is bound between calls has a tensor that its method computed, so that it must be
            computed again for each call.
    """

    def __init__(self, pool: CopyPool, maker: MakesWeights) -> None:
        self.pool = pool
        self.computes = False
        self._maker = maker
        self._tensors: NamedTensors = {}
        self._weights: dict[str, Weight] | None = None
        self._on_base = False
        self._epoch = -1
        pool.when_made(self._adopt)

    # --- between calls

    def bind_between_calls(self, tensors: NamedTensors) -> None:
        """Leave the weights of these adapter tensors bound between calls."""
        with self.pool.lock:
            self._refresh()
            self._tensors, self._on_base = tensors, False
            # The views that weights are made of must carry gradients, whatever mode the model is made or moved in.
            with torch.inference_mode(False), torch.enable_grad():
                self._weights = None if self.pool.is_undecided else self.weights(tensors)
            if self.pool.is_made:
                self._bind(self.pool.tree)

    def bind_base(self) -> None:
        """Leave the base's tensors bound between calls; every call has its own adapter tensors."""
        with self.pool.lock:
            self._refresh()
            self._tensors, self._on_base = {}, True
            if self.pool.is_made:
                self._bind(self.pool.tree)

    def rebind_if_replaced(self, tensors: NamedTensors) -> None:
        """Bind the adapter's present tensors between calls, if they are parameters, and so no temporary replacement."""
        self.pool.ready()
        if not self._are_bound(tensors) and all(isinstance(tensor, nn.Parameter) for tensor in tensors.values()):
            self.bind_between_calls(tensors)

    def rebase(self, maker: MakesWeights, tensors: NamedTensors) -> None:
        """Replace the base by a moved or cast one."""
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

    def _are_bound(self, tensors: NamedTensors) -> bool:
        return all(map(is_, tensors.values(), self._tensors.values())) and not self.computes

    def _adopt(self, tree: ModuleTree) -> None:
        """Find the adapted parameters in the main copy, which was just made, and bind their weights there."""
        names = self._maker.names
        self._fast_path = FastPath(self.pool.base, tree, names)
        paths = {id(module): path for path, module in tree.modules.items()}
        # Every place of every adapted parameter, by the first dotted name of its module.
        self._places = {join(paths[id(module)], attribute): name for name in names for module, attribute in tree.places[name]}
        if self._epoch >= 0:
            self._bind(tree)

    def _bind(self, tree: ModuleTree) -> None:
        base = self.pool.base
        if self._on_base:
            self.computes = False
            # The parameters of modules that the adapter adds are not the base's.
            slots: dict[str, Tensor] = {name: base.tensors.get(name, tree.tensor(name)) for name in self._maker.names}
        else:
            weights = self._weights
            if weights is None:
                with torch.enable_grad():
                    weights = self._maker.weights(self._tensors, lambda name: tree.modules[name].training)
            self.computes = has_computed(weights, self._tensors.values())
            # Parameters that are trained themselves are slots too: only a slot detects a checkpoint that drops its gradient.
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

    def weights(self, tensors: NamedTensors) -> dict[str, Weight]:
        """The structured weights of adapter tensors in the network's training modes, by parameter name."""
        return self._maker.weights(tensors, self.pool.trains)

    def forward(self, tensors: NamedTensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's forward on the adapter's present tensors."""
        if torch.compiler.is_compiling():
            return self._traced(tensors, {}, args, kwargs)
        module = self.pool.module
        if self._are_bound(tensors) and not (self._fast_path.fused and self._fast_path.is_taken(tensors.values())):
            with self.calling():
                return module(*args, **kwargs)
        # Other tensors, as torch.func.functional_call binds them: as in any module, buffers are then written in place.
        return self.pool.run("__call__", args, kwargs, self._bindings(tensors), {}, private_buffers=False)

    def functional_call(
        self, tensors: NamedTensors, buffers: NamedTensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The forward on any tensors and buffers; nothing of the model is written to."""
        return self.stateful_call(tensors, buffers, args, kwargs)[0]

    def stateful_call(
        self,
        tensors: NamedTensors,
        buffers: NamedTensors,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        private_buffers: bool = True,
    ) -> tuple[Any, dict[str, Tensor], bool]:
        """The forward on any tensors and buffers, these buffers after it, and whether a checkpoint will run it again.

        Args:
            tensors: the adapter's tensors, by global names.
            buffers: buffers by global names.
            args: positional arguments.
            kwargs: keyword arguments.
            private_buffers: whether the other buffers are copies, so that nothing of the model is written to.
        """
        if torch.compiler.is_compiling():
            return self._traced(tensors, buffers, args, kwargs), dict(buffers), False
        with self.pool.checkout(self._bindings(tensors), buffers, private_buffers) as (copy, call):
            output = call.returns(copy.tree.module(*args, **kwargs))
            after = {name: copy.tree.module.get_buffer(name) for name in buffers}
            return output, after, call.checkpointed

    @contextmanager
    def calling(self) -> Iterator[Call]:
        """A call of the main copy: detects writes to the base, and checkpoints."""
        self._watch_base()
        with calling() as call:
            yield call

    def _bindings(self, tensors: NamedTensors) -> dict[str, Tensor]:
        self._watch_base()
        self.pool.ready()
        return self._fast_path.bindings(self.weights(tensors), tensors.values())

    def _traced(self, tensors: NamedTensors, buffers: NamedTensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # No thread and no checkpoint uses the module while it is traced, so torch's own binding is enough.
        self.pool.ready()
        weights = self.weights(tensors)
        slots = {name: w.tensor if isinstance(w, Dense) else Slot.of(w) for name, w in weights.items()}
        placed = {place: slots[name] for place, name in self._places.items()}
        return torch.func.functional_call(self.pool.module, {**placed, **buffers}, args, kwargs, tie_weights=False)


def has_computed(weights: Mapping[str, Weight], tensors: Collection[Tensor]) -> bool:
    """Whether a weight has a tensor that its method computed from these, which an optimizer's next step makes stale."""
    leaves = [leaf for weight in weights.values() for leaf in weight.leaves() if leaf.grad_fn is not None]
    if not leaves:
        return False
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return any(leaf.untyped_storage().data_ptr() not in known for leaf in leaves)
