"""The adapted model: a frozen base and an adapter, and the network they make together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from types import MethodType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .adapter import AdapterDict
from .base import BaseView, FrozenBase
from .errors import StateError, nearest
from .fused import fused_names, guards, runs_fused
from .methods import Method
from .show import summary, tree
from .strategy import Strategy
from .structure import Structure, clone, join
from .weights import Dense, Slot, Weight
from .weights.call import Call, calling

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One adapted parameter of an adapted model.

    Attributes:
        name: the parameter's dotted name.
        method: the method, settled for the parameter's site.
        names: the method's own name of each tensor -> its global name.
    """

    name: str
    method: Method
    names: dict[str, str]


class IncompatibleKeys(NamedTuple):
    """Names that a non-strict load left out: the adapter's that the state lacks, and the state's that it lacks."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class Twin:
    """A second private copy, for calls with other tensors than the model's own.

    Attributes:
        structure: the copy.
        signature: the body's, when the copy was made.
        buffers: the modules that hold buffers, of the body and of the copy.
    """

    structure: Structure
    signature: list[object]
    buffers: list[tuple[nn.Module, nn.Module]]


class AdaptedModel(nn.Module):
    """A frozen base and an adapter: an ordinary module whose parameters are exactly the adapter's.

    `adapt` makes it. Its forward is the base's, with the name of every adapted parameter bound to a structured weight.
    Attributes and methods of the model are reached through it (`adapted.config`, `adapted.generate(...)`); they are
    those of a private copy of the model's structure, with the adapter bound.

    Attributes:
        adapter: the adapter's tensors under dotted global names, an `nn.ParameterDict`.
        strategy: the strategy, or None where actions of the seed's protocol replaced modules.
        parts: the adapted parameters.
    """

    adapter: AdapterDict

    def __init__(
        self,
        base: FrozenBase,
        body: Structure,
        parts: Sequence[Part],
        tensors: Mapping[str, nn.Parameter],
        strategy: Strategy | None,
    ) -> None:
        super().__init__()
        self._base = base
        self._body = body
        self._view: BaseView | None = None
        self._twins: list[Twin] = []
        self.parts = tuple(parts)
        self.strategy = strategy
        self.training = body.module.training
        self.adapter = AdapterDict(tensors, body)
        adapted = [part.name for part in parts]
        self._fused = fused_names(body, adapted)
        self._guards = guards(body, adapted)
        paths = {id(module): path for path, module in body.modules.items()}
        # Every place of every adapted parameter, by the first dotted name of the module that holds it.
        self._places = {
            join(paths[id(module)], attribute): name for name in adapted for module, attribute in body.places[name]
        }
        self._rest()

    # --- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted network's forward, in the base model's own signature."""
        tensors = self.adapter.current()
        if torch.compiler.is_compiling():
            return self._traced(tensors, {}, args, kwargs)
        own = all(map(is_, tensors.values(), self._resting))
        if own and not (self._fused and runs_fused(self._body, tensors.values())):
            with self._calling():
                return self._body.module(*args, **kwargs)
        # Others stand in the adapter's places for this call (torch.func.functional_call, say): as with any module,
        # buffers are then written in place.
        with self._bound(tensors, {}, private_buffers=False) as module:
            return module(*args, **kwargs)

    def _functional_call(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return self._traced(tensors, buffers, args, kwargs)
        with self._bound(tensors, buffers, private_buffers=True) as module:
            return module(*args, **kwargs)

    def _traced(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A trace knows neither threads nor checkpoints that outlive it, so torch's own binding will do.
        weights = self._weights(tensors)
        slots = {name: w.tensor if isinstance(w, Dense) else Slot.of(w) for name, w in weights.items()}
        placed = {place: slots[name] for place, name in self._places.items()}
        return torch.func.functional_call(self._body.module, {**placed, **buffers}, args, kwargs, tie_weights=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_body" not in self.__dict__:
                raise
        module = self._body.module
        try:
            found = getattr(module, name)
        except AttributeError:
            raise AttributeError(f"neither AdaptedModel nor the adapted {type(module).__name__} has {name!r}") from None
        if isinstance(found, MethodType) and found.__self__ is module and not torch.compiler.is_compiling():
            return self._reached(found)
        return found

    def _reached(self, method: MethodType) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._calling():
                return method(*args, **kwargs)

        return call

    # --- adapters

    @property
    def base(self) -> BaseView:
        """The frozen base, unadapted: `adapted.base(x)`."""
        if self._view is None:
            self._view = BaseView(self._base, self._body)
        return self._view

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
        for name, buffer in self._buffers_kept().items():
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
        self._check(state, strict=True)
        pristine = self._pristine()
        body = self._body.copy()
        for name, attribute, module, buffer in body.buffers():
            source = state[name] if name in state else pristine.get(name, buffer)
            module._buffers[attribute] = source.detach().to(buffer).clone()
        tensors = {
            name: nn.Parameter(state[name].detach().to(old).clone(), requires_grad=old.requires_grad)
            for name, old in self.adapter.items()
        }
        return AdaptedModel(self._base, body, self.parts, tensors, self.strategy)

    def load_adapter_state_dict(self, state: Tensors, strict: bool = True) -> IncompatibleKeys:
        """Copy tensors into this model's parameters and buffers in place, so that an optimizer keeps them.

        Args:
            state: as `adapter_state_dict` gives it. With `strict`, buffers that it does not name become the base's.
            strict: refuse missing and unknown names; otherwise leave them out and return them.

        Raises:
            StateError: before anything is written.
        """
        left_out = self._check(state, strict)
        pristine = self._pristine() if strict else {}
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                if name in state:
                    parameter.copy_(state[name])
            for name, buffer in self._buffers_kept().items():
                source = state[name] if name in state else pristine.get(name)
                if source is not None:
                    buffer.copy_(source)
        return left_out

    def merge(self) -> nn.Module:
        """A new plain module with the change folded into its weights; it shares no memory with base, adapter or this model.

        Its parameters require grad where the original model's did; its buffers are this model's. Where the adapter's
        element type is wider than the weight's, the sum is formed in the wider and rounded once.
        """
        learned = set()
        for name, ((module, attribute), *_) in self._body.places.items():
            if name in self._base.trainable or name not in self._base.weights:
                learned.add(id(module._parameters[attribute]))

        def folded(tensor: Tensor) -> nn.Parameter:
            with torch.no_grad():
                dense = tensor.weight.eval().dense() if isinstance(tensor, Slot) else tensor
                return nn.Parameter(clone(dense), requires_grad=id(tensor) in learned)

        return self._body.detached(folded)

    # --- as a module

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the adapter and the private copy of the network; the user's model is not touched."""
        super().train(mode)
        self._body.module.train(mode)
        self._rest()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        base = self._base.apply(fn)
        if base is not self._base:
            names = {id(tensor): name for name, tensor in self._base.tensors.items()}
            for name, ((module, attribute), *_) in self._body.places.items():
                origin = names.get(id(module._parameters[attribute]))
                if origin is not None:
                    self._body.bind(name, base.tensors[origin])
            self._base = base
        self._view = None
        self._rest()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModel:
        tensors = {}
        for name, parameter in self.adapter.items():
            tensors[name] = nn.Parameter(clone(parameter), requires_grad=parameter.requires_grad)
            tensors[name].grad = None if parameter.grad is None else clone(parameter.grad)
        body = Structure(self._body.detached())
        made = memo[id(self)] = AdaptedModel(self._base, body, self.parts, tensors, self.strategy)
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        body = self._body.copy()
        for part in self.parts:
            if part.name in self._base.tensors:
                body.bind(part.name, self._base.tensors[part.name])
        return _restore, (self._base, body.module, self.parts, dict(self.adapter.items()), self.strategy)

    def __repr__(self) -> str:
        return tree(self._body, {part.name: part.method for part in self.parts})

    def summary(self) -> str:
        """A table of the adapted parameters, their methods and sizes, and what is trained of the whole."""
        rows = [(part.name, part.method, [self.adapter[name] for name in part.names.values()]) for part in self.parts]
        return summary(self._base, rows)

    # --- binding

    def _weights(self, tensors: Tensors) -> dict[str, Weight]:
        """The structured weights that adapter tensors make of the base's, by the name of the parameter."""
        made: dict[str, Weight] = {}
        for part in self.parts:
            own = {local: tensors[name] for local, name in part.names.items()}
            if part.name in self._base.weights:
                weight = part.method.weight(self._base.weights[part.name], {**self._derived[part.name], **own})
                made[part.name] = weight if self._body.places[part.name][0][0].training else weight.eval()
            else:
                made[part.name] = Dense(own[""])
        return made

    def _rest(self) -> None:
        """Let the private copy hold the model's own weights between calls.

        A call on them then needs no binding, and a checkpoint that runs a part again in backward finds them.
        """
        self._epoch = self._base.epoch
        self._derived = {
            part.name: self._base.derived(part.name, part.method) for part in self.parts if part.name in self._base.weights
        }
        tensors = self.adapter.current()
        self._resting = list(tensors.values())
        self._resting_slots: dict[str, Tensor] = {}
        for name, weight in self._weights(tensors).items():
            self._resting_slots[name] = weight.tensor if isinstance(weight, Dense) else Slot.of(weight)
        for name in self._guards:
            self._resting_slots[name] = Slot.of(self._base.weights[name])
        for name, tensor in self._resting_slots.items():
            self._body.bind(name, tensor)
        self._twins = []

    @contextmanager
    def _calling(self) -> Iterator[Call]:
        if self._base.watch() != self._epoch:
            self._rest()
        with calling() as call:
            yield call

    @contextmanager
    def _bound(self, tensors: Tensors, buffers: Tensors, private_buffers: bool) -> Iterator[nn.Module]:
        """A private copy with these tensors in place, to this call alone.

        It goes back for the next call unless a checkpoint was met: that will run parts of the copy again in backward
        and must find the same tensors there, so the copy is left to it.
        """
        with self._calling() as call:
            twin = self._lease()
            for source, target in twin.buffers:
                fresh = private_buffers and source.training
                target._buffers.update({k: clone(b) if fresh and b is not None else b for k, b in source._buffers.items()})
            for name, buffer in buffers.items():
                module_name, _, attribute = name.rpartition(".")
                twin.structure.modules[module_name]._buffers[attribute] = buffer
            fused = self._fused if runs_fused(self._body, tensors.values()) else ()
            for name, weight in self._weights(tensors).items():
                twin.structure.bind(name, weight.dense() if name in fused else Slot.of(weight))
            if fused:
                for name in self._guards:
                    twin.structure.bind(name, self._base.tensors[name])
            yield twin.structure.module
            if not call.checkpointed:
                for name, tensor in self._resting_slots.items():
                    twin.structure.bind(name, tensor)
                self._twins.append(twin)

    def _lease(self) -> Twin:
        signature = self._body.signature()
        while self._twins:
            try:
                twin = self._twins.pop()
            except IndexError:  # another thread took the last one
                break
            if len(signature) == len(twin.signature) and all(map(is_, signature, twin.signature)):
                return twin
        structure = self._body.copy()
        pairs = zip(self._body.modules.values(), structure.modules.values(), strict=True)
        return Twin(structure, signature, [(mine, other) for mine, other in pairs if mine._buffers])

    # --- names

    def _pristine(self) -> dict[str, Tensor]:
        return {name: buffer for name, _, _, buffer in self._base.structure.buffers()}

    def _buffers_kept(self) -> dict[str, Tensor]:
        """The persistent buffers, by global name."""
        return {
            name: buffer
            for name, attribute, module, buffer in self._body.buffers()
            if attribute not in module._non_persistent_buffers_set
        }

    def _check(self, state: Tensors, strict: bool) -> IncompatibleKeys:
        """Refuse a state that does not fit, before anything is done with it."""
        buffers = self._buffers_kept()
        known: dict[str, Tensor] = {**buffers, **self.adapter}
        missing = [name for name in self.adapter if name not in state]
        unexpected = [name for name in state if name not in known]
        if strict and missing:
            raise StateError(
                f"the state lacks {len(missing)} of the adapter's {len(self.adapter)} tensors, {missing[0]!r} first; in the "
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


def functional_call(
    model: AdaptedModel,
    params: Tensors | Sequence[Tensors],
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
) -> Any:
    """Call an adapted model with other tensors in its adapter's places: pure, for `torch.func`.

    Nothing is written: not to the model, and not to its buffers (a BatchNorm in training writes to a copy; give its
    buffers among `params` to keep what it writes).

    Args:
        model: an adapted model.
        params: tensors under global names, as of `named_trainable_parameters()` or `adapter_state_dict()`, or several such
            dicts; names as of `named_parameters()` and `named_buffers()` are understood too. Those not named are the
            model's own.
        args: positional arguments; anything but a tuple is a single one.
        kwargs: keyword arguments.
        strict: require every name of the adapter.

    Returns:
        What the model's forward returns.

    Raises:
        StateError: for an unknown name, a name given twice, or, if strict, a missing one.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), gf.LoRA(rank=1, init="random"))
        >>> params = dict(adapted.named_trainable_parameters())
        >>> loss = lambda params, x: gf.functional_call(adapted, params, (x,)).sum()
        >>> per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, torch.randn(3, 4))
        >>> per_sample["lora_A"].shape
        torch.Size([3, 1, 4])
    """
    if not isinstance(model, AdaptedModel):
        raise TypeError(f"expected an AdaptedModel, got a {type(model).__name__}; use torch.func.functional_call for others")
    tensors = model.adapter.current()
    given: set[str] = set()
    buffers: dict[str, Tensor] = {}
    for group in [params] if isinstance(params, Mapping) else params:
        for name, tensor in group.items():
            plain = name
            if name not in tensors and name.startswith("adapter."):
                inner = name.removeprefix("adapter.")
                plain = model.adapter.tree_names.get(inner, inner)
            if plain in given:
                raise StateError(f"{plain!r} is given twice")
            given.add(plain)
            if plain in tensors:
                tensors[plain] = tensor
            elif plain in model._body.buffer_names:
                buffers[plain] = tensor
            else:
                raise StateError(f"the adapter has no {name!r}; {nearest(name, tensors)}")
    if strict and not given.issuperset(tensors):
        missing = next(name for name in tensors if name not in given)
        raise StateError(f"strict=True needs every tensor of the adapter, and {missing!r} is missing")
    args = () if args is None else args if isinstance(args, tuple) else (args,)
    return model._functional_call(tensors, buffers, args, dict(kwargs or {}))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.to(a.device))))


def _restore(
    base: FrozenBase, module: nn.Module, parts: Sequence[Part], tensors: dict[str, nn.Parameter], strategy: Strategy | None
) -> AdaptedModel:
    return AdaptedModel(base, Structure(module), parts, tensors, strategy)
