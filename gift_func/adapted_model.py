"""The adapted model: a frozen base and an adapter, and the network they make together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .adapter import AdaptedParameters, Adapter, brings_modules
from .adapter_dict import AdapterDict
from .errors import AdaptError, StateError, nearest
from .methods import Method
from .methods.module_method import AddedModule
from .network.base_view import BaseView
from .network.copy_pool import CopyPool
from .network.frozen_base import FrozenBase, as_tensor
from .network.module_tree import Buffers, ModuleTree, clone, copied, named, persistent
from .network.runner import Runner
from .printing import summary, tree
from .strategy import Strategy
from .weights import Slot, Weight

Tensors = Mapping[str, Tensor]


class IncompatibleKeys(NamedTuple):
    """Names that a non-strict load left out: the adapter's that the state lacks, and the state's that it lacks."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdaptedModel(nn.Module):
    """A frozen base and an adapter: an ordinary module whose parameters are exactly the adapter's.

    `adapt` makes it. Its forward is the base's, with the name of every adapted parameter bound to a structured weight.
    Attributes and methods of the model are reached through it (`adapted.config`, `adapted.generate(...)`); they are
    those of a private copy of the model's structure, with the adapter bound. What is made only to run, that copy among
    it, is made when the model is first used; what becomes of the user's model before that makes no difference.

    Attributes:
        adapter: the adapter's tensors under dotted global names, an `nn.ParameterDict`.
        adapted_parameters: the adapted parameters, with their methods and the names of their tensors.
        strategy: the strategy, or None where actions of GIFt's protocol replaced modules.
        copy_pool: the private copies of the network that calls run on.
    """

    adapter: AdapterDict

    def __init__(self, adapter: Adapter, pool: CopyPool | None = None) -> None:
        super().__init__()
        self.strategy = adapter.strategy
        self.adapted_parameters = adapter.parameters
        self.copy_pool = adapter.copy_pool() if pool is None else pool
        self._runner = Runner(self.copy_pool, adapter.parameters)
        self._view: BaseView | None = None
        self.training = self.copy_pool.mode
        tensors = {name: _parameter(tensor) for name, tensor in adapter.tensors.items()}
        self.adapter = AdapterDict(tensors, self.copy_pool.buffers)
        self._runner.bind_between_calls(self.adapter.current())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted network's forward, in the base model's own signature."""
        return self._runner.forward(self.adapter.current(), args, kwargs)

    def functional_call(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            own = getattr(type(module), name, None)
            if isinstance(own, property) and own.fget is not None:
                return own.fget(module)  # which raises an error of its own, hidden by nn.Module
            raise AttributeError(f"neither AdaptedModel nor the adapted {type(module).__name__} has {name!r}") from error
        if isinstance(found, MethodType) and found.__self__ is module and not torch.compiler.is_compiling():
            return self._reached(found)
        return found

    def _reached(self, method: MethodType) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._runner.calling():
                return method(*args, **kwargs)

        return call

    # --- adapters

    @property
    def frozen_base(self) -> FrozenBase:
        """The frozen base, as `adapt` takes it for further adapters."""
        return self.copy_pool.base

    @property
    def base(self) -> BaseView:
        """The frozen base, unadapted: `adapted.base(x)`."""
        if self._view is None:
            self._view = BaseView(self.frozen_base, self.copy_pool)
        return self._view

    def to_adapter(self) -> Adapter:
        """The adapter as a value; its tensors are this model's own."""
        state = self.adapter_state_dict()
        buffers = {name: clone(tensor) for name, tensor in state.items() if name not in self.adapter}
        pool = self.copy_pool
        own = pool.is_made and brings_modules(pool.tree, pool.base.tree)
        modules = pool.tree.copy(clone) if own else None
        return Adapter(self.adapted_parameters, self.strategy, dict(self.adapter.items()), buffers, modules)

    def structured_weights(self, tensors: Tensors | None = None) -> dict[str, Weight]:
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

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters that require grad: what an optimizer gets."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters that require grad, under their global names."""
        return ((name, parameter) for name, parameter in self.adapter.items() if parameter.requires_grad)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Everything that sets this model apart from its base, under global names, detached.

        Returns:
            The parameters, the methods' frozen tensors, and the persistent buffers that differ from the base's (the
            statistics of a BatchNorm that was trained, say). As those of `state_dict`, the tensors are the live ones.
        """
        state = {name: parameter.detach() for name, parameter in self.adapter.items()}
        pristine = self._pristine()
        for name, buffer in persistent(self.copy_pool.buffers).items():
            if name not in pristine or not _equal(buffer, pristine[name]):
                state[name] = buffer.detach()
        return state

    def with_adapter(self, state: Tensors) -> AdaptedModel:
        """A new model on the same base, adapted in the same places by other tensors, which are copied.

        Args:
            state: as `adapter_state_dict` gives it. Buffers that it does not name are the base's.

        Raises:
            StateError: if a name is missing or unknown, or a shape differs.
        """
        adapter = dict(self.adapter.items())
        tensors, buffers = filled(self.adapted_parameters, self.copy_pool.buffers, adapter, state)
        return self._like(tensors, buffers)

    def load_adapter_state_dict(self, state: Tensors, strict: bool = True) -> IncompatibleKeys:
        """Copy tensors into this model's parameters and buffers in place, so that an optimizer keeps them.

        Args:
            state: as `adapter_state_dict` gives it. With `strict`, buffers that it does not name become the base's.
            strict: refuse missing and unknown names; otherwise leave them out and return them.

        Raises:
            StateError: before anything is written.
        """
        left_out = check_state(state, dict(self.adapter.items()), persistent(self.copy_pool.buffers), strict)
        pristine = self._pristine() if strict else {}
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                if name in state:
                    parameter.copy_(state[name])
            for name, buffer in persistent(self.copy_pool.buffers).items():
                source = state[name] if name in state else pristine.get(name)
                if source is not None:
                    buffer.copy_(source)
        return left_out

    def merge(self) -> nn.Module:
        """A new plain module with the change folded into its weights; it shares no memory with base, adapter or this model.

        Its parameters require grad where the original model's did; its buffers are this model's. Where the adapter's
        element type is wider than the weight's, the sum is formed in the wider and rounded once.

        Raises:
            AdaptError: if a method added modules (Bottleneck), which no weight can take in.
        """
        self._runner.rebind_if_replaced(self.adapter.current())
        base, modules = self.frozen_base, self.copy_pool.tree
        for name, module in modules.modules.items():
            if isinstance(module, AddedModule):
                raise AdaptError(f"{name!r} was added to the network and is part of no weight, so it cannot be merged")
        learned = {id(modules.tensor(name)) for name in modules.places if name in base.trainable or name not in base.weights}

        def folded(tensor: Tensor) -> nn.Parameter:
            with torch.no_grad():
                dense = tensor.weight.eval().dense() if isinstance(tensor, Slot) else tensor
                return nn.Parameter(clone(dense), requires_grad=id(tensor) in learned)

        return modules.detached(folded)

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
        self._view = None
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModel:
        tensors = {}
        for name, parameter in self.adapter.items():
            known = memo.get(id(parameter))
            other = nn.Parameter(clone(parameter), requires_grad=parameter.requires_grad)
            other.grad = None if parameter.grad is None else clone(parameter.grad)
            tensors[name] = known if isinstance(known, nn.Parameter) else memo.setdefault(id(parameter), other)
        made = memo[id(self)] = self._like(tensors, copied(self.copy_pool.buffers))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        base, modules = self.frozen_base, self.copy_pool.tree.copy()
        for name in self.adapted_parameters.names:
            if name in base.tensors:
                modules.bind(name, base.tensors[name])
        return _restore, (modules.module, self.adapted_parameters, dict(self.adapter.items()), self.strategy)

    def __repr__(self) -> str:
        return tree(self.copy_pool.outline, {part.name: part.method for part in self.adapted_parameters})

    def summary(self) -> str:
        """A table of the adapted parameters, their methods and sizes, and what is trained of the whole."""
        rows: list[tuple[str, Method, list[Tensor]]] = []
        counted: set[str] = set()
        for parameter in self.adapted_parameters:
            own = [name for name in parameter.names.values() if name not in counted]
            counted.update(own)
            rows.append((parameter.name, parameter.method, [self.adapter[name] for name in own]))
        return summary(self.frozen_base, rows)

    def _like(self, tensors: Mapping[str, nn.Parameter], buffers: dict[str, Buffers]) -> AdaptedModel:
        """This model with other tensors, and with these buffers."""
        return AdaptedModel(Adapter(self.adapted_parameters, self.strategy, tensors), self.copy_pool.fork(buffers))

    def _pristine(self) -> dict[str, Tensor]:
        return named(self.frozen_base.tree.held())


def filled(
    parameters: AdaptedParameters,
    held: Mapping[str, Buffers],
    adapter: Tensors,
    state: Tensors,
    owned: bool = False,
) -> tuple[dict[str, nn.Parameter], dict[str, Buffers]]:
    """Parameters like an adapter's with copies of a state's values, and buffers with its values, or with the base's.

    Args:
        parameters: the adapted parameters.
        held: what buffers there are.
        adapter: parameters under their global names; only their shapes, types and `requires_grad` count.
        state: the values.
        owned: the state's tensors are nobody else's, and need not be copied.

    Raises:
        StateError: if a name is missing or unknown, or a shape differs; nothing is written then.
    """
    base = parameters.base
    check_state(state, adapter, persistent(held), strict=True)
    buffers = copied(held, {**named(base.tree.held()), **{name: state[name] for name in state if name not in adapter}})
    tensors: dict[str, nn.Parameter] = {}
    for parameter in parameters:
        weight = base.weights.get(parameter.name)
        home = None if weight is None else weight.device
        for name in parameter.names.values():
            if name not in tensors:
                old, tensor = adapter[name], state[name]
                if not (owned and tensor.dtype == old.dtype and tensor.device == (home or old.device)):
                    tensor = tensor.detach().to(home or old.device, old.dtype, copy=not owned)
                tensors[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    return tensors, buffers


def check_state(state: Tensors, adapter: Tensors, buffers: Tensors, strict: bool) -> IncompatibleKeys:
    """Refuse a state that does not fit, before anything is done with it."""
    known = {**buffers, **adapter}
    missing = [name for name in adapter if name not in state]
    unexpected = [name for name in state if name not in known]
    if strict and missing:
        raise StateError(
            f"the state lacks {len(missing)} of the adapter's {len(adapter)} tensors, {missing[0]!r} first; in the "
            f"state {nearest(missing[0], state)}. Is it a state of another strategy?"
        )
    if strict and unexpected:
        raise StateError(f"the adapter has no {unexpected[0]!r}; {nearest(unexpected[0], known)}")
    for name, tensor in state.items():
        if name in known and tensor.shape != known[name].shape:
            raise StateError(
                f"{name!r} has shape {tuple(known[name].shape)} in this adapter and {tuple(tensor.shape)} in the state"
            )
    return IncompatibleKeys(missing, unexpected)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.to(a.device))))


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def _restore(
    module: nn.Module, parameters: AdaptedParameters, tensors: dict[str, nn.Parameter], strategy: Strategy | None
) -> AdaptedModel:
    return AdaptedModel(Adapter(parameters, strategy, tensors), CopyPool(parameters.base, ModuleTree(module)))
