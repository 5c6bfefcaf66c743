"""The ensemble: N adapters on one frozen base, run and trained as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._torch import outside_graphs
from ..adapted_model import AdaptedModel, IncompatibleKeys, check_state
from ..adapter import Adapter
from ..adapter_dict import AdapterDict
from ..errors import AdaptError
from ..methods import Method
from ..network.base_view import BaseView
from ..network.copy_pool import CopyPool
from ..network.frozen_base import FrozenBase
from ..network.module_tree import ModuleTree, clone, copied, named
from ..network.runner import Runner
from ..printing import summary, tree
from ..seeding import seeded
from ..stack_layout import StackLayout
from .mixed_batch import MixedMembers
from .vmap_or_loop import CannotBatchError, Member, batched, one_by_one, without_rule

Tensors = Mapping[str, Tensor]
Parameters = Mapping[str, nn.Parameter]
Randomness = Literal["different", "same"]


class Ensemble(nn.Module):
    """N adapters on one frozen base: an ordinary module whose parameters are theirs, stacked.

    `stack` and `adapt_ensemble` make it. One pass runs all members (`torch.vmap` over the adapters' tensors): the frozen
    weights meet the inputs of all members in one product each, and what lies below the first adapted layer is computed
    once where the members share an input. A module that torch has no batching rule for (an LSTM), and gradient
    checkpointing, let the members run one after another, with the same results; `fallback` then says why.

    Persistent buffers (a BatchNorm's statistics) are the members' own, stacked like the parameters; a frozen tensor that
    is equal in all members is kept once, without a leading axis.

    Attributes:
        adapter: the stacked tensors, `(N, ...)`, under the members' global names.
        chunk_size: how many members run at a time; None for all. Fewer need less memory.
        randomness: whether dropout and its like draw "different" numbers for each member or the "same".
        generator: what each call's random draws are seeded from; None for torch's global generator.
        fallback: why the members of the latest call ran one after another, or None if they ran at once.
    """

    adapter: AdapterDict

    def __init__(self, pool: CopyPool, layout: StackLayout, tensors: Parameters, buffers: Tensors) -> None:
        super().__init__()
        self.layout = layout
        self.chunk_size: int | None = None
        self.randomness: Randomness = "different"
        self.generator: torch.Generator | None = None
        self.copy_pool = pool
        self._unbatchable = without_rule(pool.outline)
        self._reasons: dict[tuple[bool, bool, bool], str] = {}
        self.fallback = self._unbatchable
        for name, stacked in buffers.items():
            module_name, _, attribute = name.rpartition(".")
            pool.buffers[module_name].tensors[attribute] = stacked
        self._runner = Runner(pool, layout.parameters)
        self._runner.bind_base()
        self._state = tuple(buffers)
        self._alike: dict[str, tuple[Tensor, int, bool]] = {}
        self._view: BaseView | None = None
        self._mixed: MixedMembers | None = None
        self.training = pool.mode
        self.adapter = AdapterDict(tensors, pool.buffers)

    # --- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every member on the same input.

        Returns:
            What the network returns, its tensors with a leading axis N.
        """
        return self._call(self.adapter.current(), None, args, kwargs, mapped=False)

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """Member i on `args[i]`: every tensor among the arguments has a leading axis N, which the results have too.

        Raises:
            AdaptError: if a tensor has another leading axis.
        """
        return self._call(self.adapter.current(), None, args, kwargs, mapped=True)

    @outside_graphs("no graph holds it; gf.AdapterBank(...).prepare() is for that")
    def mix(self, *args: Any, members: Sequence[int | None] | Tensor, **kwargs: Any) -> Any:
        """A batch whose samples have members of their own, in one pass, as a bank runs them: forward and backward.

        A member without samples has a gradient of zeros, by which an optimizer with momentum or weight decay still moves it.

        Args:
            args: the network's arguments; tensors have the samples as leading axis.
            members: for each sample the index of its member, or None for the base alone; or int64 `(batch,)`, -1 for the
                base alone.
            kwargs: the network's keyword arguments.

        Returns:
            What the network returns, its samples in the order given.

        Raises:
            AdaptError: for an index that no member has, as many indices as there are no samples, or as of `AdapterBank`.

        Example:
            >>> import torch, gift_func as gf
            >>> ens = gf.adapt_ensemble(torch.nn.Linear(4, 2), gf.LoRA(rank=1), 3)
            >>> ens.mix(torch.randn(4, 4), members=[2, 0, None, 2]).shape
            torch.Size([4, 2])
        """
        given = self.copy_pool, self.layout, self.adapter.current(), {name: self._buffer(name) for name in self._state}
        found = self._mixed
        if found is None or not found.are_of(*given):
            found = self._mixed = MixedMembers(*given)
        with self._drawing():
            return found.run(members, args, kwargs)

    def functional_call(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward` on any tensors and buffers; nothing is written to."""
        return self._call(tensors, buffers, args, kwargs, mapped=False)

    def _call(
        self, tensors: Tensors, buffers: Tensors | None, args: tuple[Any, ...], kwargs: dict[str, Any], mapped: bool
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if mapped:
            self._check_mapped(leaves)
        writes = buffers is None and self.copy_pool.training
        state, fixed = self._states(buffers or {})
        once = {name: tensors[name] for name in self.layout.once}
        own = {name: tensor for name, tensor in tensors.items() if name not in self.layout.once}

        def member(
            share: Tensors, extras: Tensors, state: Tensors, given: Sequence[Any]
        ) -> tuple[Any, dict[str, Tensor], bool]:
            made = self.layout.applied({**once, **share}, extras)
            inner_args, inner_kwargs = tree_unflatten(list(given), spec)
            return self._runner.stateful_call(made, {**fixed, **state}, inner_args, inner_kwargs, buffers is not None)

        stacks = [own, self.layout.extras(), state]
        with self._drawing():
            made, after = self._run(member, stacks, leaves, mapped)
        if writes:
            with torch.no_grad():
                for name in state:
                    self._buffer(name).copy_(after[name])
        return made

    def _run(
        self, member: Member, stacks: Sequence[dict[str, Tensor]], leaves: Sequence[Any], mapped: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        if torch.compiler.is_compiling() and self._unbatchable is None:
            return batched(member, stacks, leaves, mapped, self.randomness, len(self), self.chunk_size)
        # What cannot be batched in one mode may be in another: a checkpoint is there in training only.
        kind = mapped, self.copy_pool.training, torch.is_grad_enabled()
        reason = self._unbatchable or self._reasons.get(kind)
        if reason is None:
            try:
                found = batched(member, stacks, leaves, mapped, self.randomness, len(self), self.chunk_size)
                self.fallback = None
                return found
            except CannotBatchError as error:
                reason = str(error)
        # A mistake in the arguments shows here once more, as the network itself tells of it.
        found = one_by_one(member, stacks, leaves, mapped, self.randomness, len(self))
        self.fallback = self._reasons[kind] = reason
        return found

    def _check_mapped(self, leaves: Sequence[Any]) -> None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if tensor.ndim == 0 or tensor.shape[0] != len(self):
                raise AdaptError(
                    f"map gives member i the i-th part of every tensor, so each needs a leading axis of {len(self)}, and one "
                    f"has shape {tuple(tensor.shape)}. Call the ensemble itself to give all members the same input."
                )
        if not tensors:
            raise AdaptError("map was given no tensor; call the ensemble itself to give all members the same input")

    def _states(self, given: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The buffers that differ by member, and those that do not and will not: one member's."""
        state, fixed = {}, {}
        for name in self._state:
            buffer = given.get(name, self._buffer(name))
            if name in given or self.copy_pool.training or not self._is_alike(name, buffer):
                state[name] = buffer.detach().clone() if name not in given else buffer
            else:
                fixed[name] = buffer[0]
        return state, fixed

    def _is_alike(self, name: str, buffer: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        known = self._alike.get(name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            known = self._alike[name] = buffer, buffer._version, all(torch.equal(row, buffer[0]) for row in buffer[1:])
        return known[2]

    def _buffer(self, name: str) -> Tensor:
        module_name, _, attribute = name.rpartition(".")
        found = self.copy_pool.buffers[module_name].tensors[attribute]
        assert found is not None
        return found

    def _drawing(self) -> AbstractContextManager[None]:
        return seeded(self.generator)

    # --- members

    def __len__(self) -> int:
        return len(self.layout.members)

    def __bool__(self) -> bool:
        return True

    @overload
    def __getitem__(self, index: int) -> AdaptedModel: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> Ensemble: ...
    def __getitem__(self, index: int | slice | Sequence[int]) -> AdaptedModel | Ensemble:
        """A member as a model of its own, or an ensemble of some members; their tensors are copies.

        Raises:
            IndexError: if there is no such member.
        """
        if isinstance(index, int):
            return self._member(self.place_of(index))
        chosen = list(range(len(self))[index]) if isinstance(index, slice) else [self.place_of(i) for i in index]
        if not chosen:
            raise IndexError("an ensemble needs at least one member, and none was chosen")
        rows = torch.tensor(chosen)
        tensors = {}
        for name, tensor in self.adapter.items():
            picked = clone(tensor) if name in self.layout.once else tensor.detach()[rows.to(tensor.device)]
            tensors[name] = nn.Parameter(picked, requires_grad=tensor.requires_grad)
        buffers = {name: self._buffer(name).detach()[rows.to(self._buffer(name).device)] for name in self._state}
        return self._like(self.layout.taken(chosen), tensors, buffers)

    def __iter__(self) -> Iterator[AdaptedModel]:
        return (self._member(index) for index in range(len(self)))

    def unstack(self) -> list[AdaptedModel]:
        """The members as models of their own, on the same base; their tensors are copies."""
        return list(self)

    def place_of(self, index: int) -> int:
        """A member's index counted from the front.

        Raises:
            IndexError: if there is no such member.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no member {index} in an ensemble of {len(self)}")
        return index % len(self)

    def _member(self, index: int) -> AdaptedModel:
        member = self.layout.members[index]
        held = copied(self.copy_pool.buffers, {name: self._buffer(name)[index] for name in self._state})
        tensors = {}
        for name, shape in member.shapes.items():
            tensor = self.adapter[name]
            share = tensor.detach() if name in self.layout.once else tensor.detach()[index]
            cut = share[tuple(slice(n) for n in shape)].clone()
            tensors[name] = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        # Nobody but the ensemble has its own resting copy in hand, so a network that is the base's is made of the base.
        pool = self.copy_pool.fork(held, of_base=True)
        return AdaptedModel(Adapter(member.parameters, member.strategy, tensors), pool)

    def _like(self, layout: StackLayout, tensors: Parameters, buffers: Tensors) -> Ensemble:
        made = Ensemble(self.copy_pool.fork(of_base=True), layout, tensors, buffers)
        made.chunk_size, made.randomness, made.generator = self.chunk_size, self.randomness, self.generator
        return made

    # --- parameters

    @property
    def frozen_base(self) -> FrozenBase:
        """The frozen base, as `adapt` takes it for further adapters."""
        return self.copy_pool.base

    @property
    def base(self) -> BaseView:
        """The frozen base, unadapted."""
        if self._view is None:
            self._view = BaseView(self.frozen_base, self.copy_pool)
        return self._view

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The stacked parameters that require grad: what an optimizer gets."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stacked parameters that require grad, under their global names."""
        return ((name, parameter) for name, parameter in self.adapter.items() if parameter.requires_grad)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Everything that sets the members apart from their base, stacked, under global names, detached.

        Returns:
            The parameters, the methods' frozen tensors, and the persistent buffers in which a member differs from the base.
        """
        state = {name: parameter.detach() for name, parameter in self.adapter.items()}
        pristine = named(self.frozen_base.tree.held())
        for name in self._state:
            buffer = self._buffer(name)
            if not bool((buffer == pristine[name].to(buffer)).all()):
                state[name] = buffer.detach()
        return state

    def load_adapter_state_dict(self, state: Tensors, strict: bool = True) -> IncompatibleKeys:
        """Copy stacked tensors into the ensemble's in place, so that an optimizer keeps them.

        Args:
            state: as `adapter_state_dict` gives it. With `strict`, buffers that it does not name become the base's.
            strict: refuse missing and unknown names; otherwise leave them out and return them.

        Raises:
            StateError: before anything is written.
        """
        buffers = {name: self._buffer(name) for name in self._state}
        left_out = check_state(state, dict(self.adapter.items()), buffers, strict)
        pristine = named(self.frozen_base.tree.held()) if strict else {}
        with torch.no_grad():
            for name, tensor in {**buffers, **self.adapter}.items():
                source = state[name] if name in state else pristine.get(name)
                if source is not None and (name in state or name in buffers):
                    tensor.copy_(source)
        return left_out

    def merge(self, index: int) -> nn.Module:
        """A new plain module with one member's change folded into its weights; see `AdaptedModel.merge`.

        Raises:
            IndexError: if there is no such member.
        """
        return self[index].merge()

    def summary(self) -> str:
        """A table of the adapted parameters, their methods and sizes, and what all members together train."""
        rows: list[tuple[str, Method, list[Tensor]]] = []
        counted: set[str] = set()
        for parameter in self.layout.parameters:
            own = [name for name in parameter.names.values() if name not in counted]
            counted.update(own)
            rows.append((parameter.name, parameter.method, [self.adapter[name] for name in own]))
        return f"{len(self)} members\n{summary(self.frozen_base, rows)}"

    # --- as a module

    def train(self, mode: bool = True) -> Self:
        """Set training mode for all members; the user's model is not touched."""
        super().train(mode)
        self.copy_pool.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.layout = self.layout.to(self.frozen_base.apply(fn), dict(self.adapter.items()))
        self._runner.rebase(self.layout.parameters, {})
        self._view = None
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ensemble:
        tensors = {name: nn.Parameter(clone(p), requires_grad=p.requires_grad) for name, p in self.adapter.items()}
        memo.update({id(parameter): tensors[name] for name, parameter in self.adapter.items()})
        made = memo[id(self)] = self._like(self.layout, tensors, {name: clone(self._buffer(name)) for name in self._state})
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        buffers = {name: self._buffer(name) for name in self._state}
        options = (self.chunk_size, self.randomness)
        module = self.copy_pool.tree.detached()
        return _restore, (module, self.layout, dict(self.adapter.items()), buffers, options)

    def __repr__(self) -> str:
        methods = {part.name: part.method for part in self.layout.parameters}
        how = "at once" if self.fallback is None else f"one after another: {self.fallback}"
        return f"Ensemble of {len(self)}, run {how}\n{tree(self.copy_pool.outline, methods)}"


def _restore(
    module: nn.Module,
    layout: StackLayout,
    tensors: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    options: tuple[int | None, Randomness],
) -> Ensemble:
    made = Ensemble(CopyPool(layout.parameters.base, ModuleTree(module)), layout, tensors, buffers)
    made.chunk_size, made.randomness = options
    return made
