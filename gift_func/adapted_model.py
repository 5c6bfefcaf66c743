"""The adapted model: the module that runs a frozen base with an adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn

from .adapter import AdaptedParameters, Adapter, adds_modules
from .adapter_dict import AdapterDict, AdapterModule, check_state
from .errors import AdaptError
from .methods.module_method import AddedModule
from .network.copy_pool import CopyPool
from .network.frozen_base import FrozenBase, as_tensor
from .network.module_tree import ModuleBuffers, ModuleTree, NamedTensors, clone, copy_buffers, persistent_buffers
from .network.runner import Runner
from .printing import summary, tree
from .weights import Slot, Weight


class AdaptedModel(AdapterModule):
    """A frozen base and an adapter: an ordinary module whose parameters are exactly the adapter's.

    `adapt` makes it. Its forward is the base's, with a structured weight bound in the place of every adapted parameter.
    Other attributes and methods (`adapted.config`, `adapted.generate(...)`) are those of a private copy of the model, with
    the adapter bound. That copy is made at the first use; what is done to the user's model before that has no effect.

    Attributes:
        adapted_parameters: the adapted parameters, with their methods and the names of their tensors.
        strategy: the strategy, or None where actions of GIFt's protocol replaced modules.
    """

    def __init__(self, adapter: Adapter, pool: CopyPool | None = None) -> None:
        super().__init__()
        self.strategy = adapter.strategy
        self.adapted_parameters = adapter.parameters
        self.copy_pool = adapter.copy_pool() if pool is None else pool
        self._runner = Runner(self.copy_pool, adapter.parameters)
        self.training = self.copy_pool.mode
        tensors = {
            name: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), tensor.requires_grad)
            for name, tensor in adapter.tensors.items()
        }
        self.adapter = AdapterDict(tensors, self.copy_pool.buffers)
        self._runner.bind_between_calls(self.adapter.current())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted network's forward, in the base model's own signature."""
        return self._runner.forward(self.adapter.current(), args, kwargs)

    def functional_call(
        self, tensors: NamedTensors, buffers: NamedTensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`forward` on any tensors and buffers, under global names; nothing is written to. See `gf.functional_call`."""
        return self._runner.functional_call(tensors, buffers, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_runner" not in self.__dict__:
                raise
        if torch.compiler.is_compiling():
            self.copy_pool.ready()
        self._runner.rebind_if_replaced(self.adapter.current())
        module = self.copy_pool.module
        try:
            found = getattr(module, name)
        except AttributeError as error:
            of_class = getattr(type(module), name, None)
            if isinstance(of_class, property) and of_class.fget is not None:
                return of_class.fget(module)  # raises the property's own error, which nn.Module hides
            raise AttributeError(f"neither AdaptedModel nor the adapted {type(module).__name__} has {name!r}") from error
        if not isinstance(found, MethodType) or found.__self__ is not module or torch.compiler.is_compiling():
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._runner.calling():
                return found(*args, **kwargs)

        return call

    # --- adapters

    def to_adapter(self) -> Adapter:
        """The adapter as a value; its tensors are this model's own."""
        state = self.adapter_state_dict()
        buffers = {name: clone(tensor) for name, tensor in state.items() if name not in self.adapter}
        pool = self.copy_pool
        modules = pool.tree.copy(clone) if pool.is_made and adds_modules(pool.tree, pool.base.tree) else None
        return Adapter(self.adapted_parameters, self.strategy, dict(self.adapter.items()), buffers, modules)

    def structured_weights(self, tensors: NamedTensors | None = None) -> dict[str, Weight]:
        """The adapted parameters' structured weights, by dotted name.

        Args:
            tensors: adapter tensors under global names; None for this model's own.
        """
        return self._runner.weights(self.adapter.current() if tensors is None else tensors)

    def frozen_with_adapter(self) -> FrozenBase:
        """This model as the frozen base of further adapters: weights and buffers as they are now."""
        weights = self.structured_weights({name: clone(tensor) for name, tensor in self.adapter.items()})
        modules = ModuleTree(self.copy_pool.tree.detached())
        for name, weight in weights.items():
            modules.bind(name, as_tensor(weight.eval()))
        trainable = self.frozen_base.trainable | set(self.adapted_parameters.names)
        return FrozenBase(modules, frozenset(modules.places) & trainable)

    def with_adapter(self, state: NamedTensors) -> AdaptedModel:
        """A new model on the same base with the same adapted parameters and copies of other tensors.

        Args:
            state: as `adapter_state_dict` returns it. Buffers that are not in it are the base's.

        Raises:
            StateError: if a name is missing or unknown, or a shape differs.
        """
        adapter, buffers = dict(self.adapter.items()), self.copy_pool.buffers
        check_state(state, adapter, persistent_buffers(buffers), strict=True)
        new = {**self.frozen_base.buffers(), **{name: state[name] for name in state if name not in adapter}}
        return self._like(parameters_of(state, self.adapted_parameters, adapter), copy_buffers(buffers, new))

    def merge(self) -> nn.Module:
        """A new plain module with the changed weights; it shares no memory with base, adapter or this model.

        Its parameters require grad where the original model's did; its buffers are copies of this model's. Where the
        adapter's dtype is wider than the weight's, the sum is computed in the wider and rounded once.

        Raises:
            AdaptError: if a method added modules (Bottleneck), which no weight can contain.
        """
        self._runner.rebind_if_replaced(self.adapter.current())
        base, modules = self.frozen_base, self.copy_pool.tree
        for name, module in modules.modules.items():
            if isinstance(module, AddedModule):
                raise AdaptError(f"{name!r} was added to the network and is part of no weight, so it cannot be merged")
        trained = {id(modules.tensor(name)) for name in modules.places if name in base.trainable or name not in base.weights}

        def merged(tensor: Tensor) -> nn.Parameter:
            with torch.no_grad():
                dense = tensor.weight.eval().dense() if isinstance(tensor, Slot) else tensor
                return nn.Parameter(clone(dense), requires_grad=id(tensor) in trained)

        return modules.detached(merged)

    # --- as a module

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the adapter and the private copy of the network; the user's model is not touched."""
        super().train(mode)
        self.copy_pool.train(mode)
        self._runner.bind_between_calls(self.adapter.current())
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.adapted_parameters = self.adapted_parameters.on(self.frozen_base.apply(fn))
        self._runner.rebase(self.adapted_parameters, self.adapter.current())
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModel:
        tensors = {}
        for name, parameter in self.adapter.items():
            known = memo.get(id(parameter))
            other = nn.Parameter(clone(parameter), requires_grad=parameter.requires_grad)
            other.grad = None if parameter.grad is None else clone(parameter.grad)
            tensors[name] = known if isinstance(known, nn.Parameter) else memo.setdefault(id(parameter), other)
        made = memo[id(self)] = self._like(tensors, copy_buffers(self.copy_pool.buffers))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        base, modules = self.frozen_base, self.copy_pool.tree.copy()
        for name in self.adapted_parameters.names:
            if name in base.tensors:
                modules.bind(name, base.tensors[name])
        return AdaptedModel._unpickled, (modules.module, self.adapted_parameters, self.strategy, dict(self.adapter.items()))

    @staticmethod
    def _unpickled(module: nn.Module, parameters: AdaptedParameters, *fields: Any) -> AdaptedModel:
        return AdaptedModel(Adapter(parameters, *fields), CopyPool(parameters.base, ModuleTree(module)))

    def __repr__(self) -> str:
        return tree(self.copy_pool.outline, {parameter.name: parameter.method for parameter in self.adapted_parameters})

    def summary(self) -> str:
        """A table of the adapted parameters with methods and sizes, and how many numbers are trained of how many."""
        parameters = [(parameter.name, parameter.method, parameter.names.values()) for parameter in self.adapted_parameters]
        return summary(self.frozen_base, parameters, self._named_tensors())

    def _like(self, tensors: Mapping[str, nn.Parameter], buffers: dict[str, ModuleBuffers]) -> AdaptedModel:
        return AdaptedModel(Adapter(self.adapted_parameters, self.strategy, tensors), self.copy_pool.fork(buffers))


def parameters_of(
    state: NamedTensors, parameters: AdaptedParameters, like: NamedTensors, *, owned: bool = False
) -> dict[str, nn.Parameter]:
    """The tensors of a state as parameters, each on the device of the weight that it changes.

    Args:
        state: the tensors; they are copied.
        parameters: the adapted parameters.
        like: tensors under the same names, for dtypes and `requires_grad`.
        owned: no one else uses the state's tensors, so they need not be copied.
    """
    made: dict[str, nn.Parameter] = {}
    for parameter in parameters:
        weight = parameters.base.weights.get(parameter.name)
        for name in parameter.names.values():
            if name not in made:
                old, tensor = like[name], state[name]
                device = old.device if weight is None else weight.device
                if not (owned and tensor.dtype == old.dtype and tensor.device == device):
                    tensor = tensor.detach().to(device, old.dtype, copy=not owned)
                made[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    return made
