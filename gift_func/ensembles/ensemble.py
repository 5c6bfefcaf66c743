"""The ensemble: N stacked adapters on one frozen base, run and trained as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._torch import outside_graphs
from ..adapted_model import AdaptedModel
from ..adapter import Adapter
from ..adapter_dict import AdapterDict, AdapterModule
from ..errors import AdaptError
from ..network.copy_pool import CopyPool
from ..network.module_tree import ModuleTree, NamedTensors, clone, copy_buffers, set_buffer
from ..network.runner import Runner
from ..printing import summary, tree
from ..seeding import seeded
from ..stack_layout import StackLayout
from .mixed_batch import MixedMembers
from .vmap_or_loop import CannotBatchError, RunMember, batched, one_by_one, without_rule

Randomness = Literal["different", "same"]


class Ensemble(AdapterModule):
    """N adapters on one frozen base: an ordinary module whose parameters are theirs, stacked.

    `stack` and `adapt_ensemble` make it. One pass runs all members (`torch.vmap` over the adapters' tensors): the inputs of
    all members are multiplied by each frozen weight in one product, and the layers before the first adapted one run once if
    the members share an input. With a module that torch has no batching rule for (an LSTM), and under gradient
    checkpointing, the members run one after another with the same results, and `fallback` says why.

    Each member has its own persistent buffers (a BatchNorm's statistics), stacked like the parameters. A frozen tensor that
    is equal in all members is stored once, without a leading axis.

    Attributes:
        adapter: the stacked tensors, `(N, ...)`, under the members' global names.
        chunk_size: how many members run at a time; None for all. Fewer need less memory.
        randomness: whether dropout and its like draw "different" numbers for each member or the "same".
        generator: the generator of each call's random draws; None for torch's global generator.
        fallback: why the members of the latest call ran one after another, or None if they ran at once.
    """

    def __init__(self, pool: CopyPool, layout: StackLayout, tensors: Mapping[str, nn.Parameter], buffers: NamedTensors) -> None:
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
            set_buffer(pool.buffers, name, stacked)
        self._runner = Runner(pool, layout.parameters)
        self._runner.bind_base()
        self._state = tuple(buffers)
        self._alike: dict[str, tuple[Tensor, int, bool]] = {}
        self._mixed: MixedMembers | None = None
        self.training = pool.mode
        self.adapter = AdapterDict(tensors, pool.buffers)

    # --- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every member on the same input.

        Returns:
            The network's output, its tensors with a leading axis N.
        """
        return self._call(self.adapter.current(), None, args, kwargs, mapped=False)

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """Member i on `args[i]`: every tensor in the arguments and in the output has a leading axis N.

        Raises:
            AdaptError: if a tensor has another leading axis.
        """
        return self._call(self.adapter.current(), None, args, kwargs, mapped=True)

    @outside_graphs("it cannot be traced; use gf.AdapterBank(...).prepare()")
    def mix(self, *args: Any, members: Sequence[int | None] | Tensor, **kwargs: Any) -> Any:
        """A batch in which every sample has its own member, run in one pass as by a bank, forward and backward.

        A member without samples has a gradient of zeros; an optimizer with momentum or weight decay still changes it.

        Args:
            args: the network's arguments; tensors have the samples as leading axis.
            members: for each sample the index of its member, or None for the base alone; or int64 `(batch,)`, -1 for the
                base alone.
            kwargs: the network's keyword arguments.

        Returns:
            The network's output, with the samples in the order given.

        Raises:
            AdaptError: for an index that no member has, another number of indices than samples, or as by `AdapterBank`.

        Example:
            >>> import torch, gift_func as gf
            >>> ens = gf.adapt_ensemble(torch.nn.Linear(4, 2), gf.LoRA(rank=1), 3)
            >>> ens.mix(torch.randn(4, 4), members=[2, 0, None, 2]).shape
            torch.Size([4, 2])
        """
        state = self.copy_pool, self.layout, self.adapter.current(), self._saved_buffers()
        mixed = self._mixed
        if mixed is None or not mixed.are_of(*state):
            mixed = self._mixed = MixedMembers(*state)
        with self._drawing():
            return mixed.run_members(members, args, kwargs)

    def functional_call(
        self, tensors: NamedTensors, buffers: NamedTensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`forward` on any tensors and buffers; nothing is written to."""
        return self._call(tensors, buffers, args, kwargs, mapped=False)

    def _call(
        self, tensors: NamedTensors, buffers: NamedTensors | None, args: tuple[Any, ...], kwargs: dict[str, Any], mapped: bool
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if mapped:
            self._check_mapped(leaves)
        writes = buffers is None and self.copy_pool.training
        state, fixed = self._states(buffers or {})
        once = {name: tensors[name] for name in self.layout.once}
        stacked = {name: tensor for name, tensor in tensors.items() if name not in self.layout.once}

        def member(
            share: NamedTensors, extras: NamedTensors, state: NamedTensors, given: Sequence[Any]
        ) -> tuple[Any, dict[str, Tensor], bool]:
            made = self.layout.applied({**once, **share}, extras)
            inner_args, inner_kwargs = tree_unflatten(list(given), spec)
            return self._runner.stateful_call(made, {**fixed, **state}, inner_args, inner_kwargs, buffers is not None)

        with self._drawing():
            made, after = self._run(member, [stacked, self.layout.extras(), state], leaves, mapped)
        if writes:
            with torch.no_grad():
                for name in state:
                    self._buffer(name).copy_(after[name])
        return made

    def _run(
        self, member: RunMember, stacks: Sequence[dict[str, Tensor]], leaves: Sequence[Any], mapped: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        if torch.compiler.is_compiling() and self._unbatchable is None:
            return batched(member, stacks, leaves, mapped, self.randomness, len(self), self.chunk_size)
        # What cannot be batched in one mode may be in another: a network may use checkpoints in training only.
        mode = mapped, self.copy_pool.training, torch.is_grad_enabled()
        reason = self._unbatchable or self._reasons.get(mode)
        if reason is None:
            try:
                found = batched(member, stacks, leaves, mapped, self.randomness, len(self), self.chunk_size)
                self.fallback = None
                return found
            except CannotBatchError as error:
                reason = str(error)
        # If the arguments are wrong, this raises the network's own error.
        found = one_by_one(member, stacks, leaves, mapped, self.randomness, len(self))
        self.fallback = self._reasons[mode] = reason
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

    def _states(self, given: NamedTensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The stacked buffers that differ by member, and one member's of those that are equal and not written to."""
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
            known = self._alike[name] = buffer, buffer._version, all(torch.equal(one, buffer[0]) for one in buffer[1:])
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
            return self._member(self.index_of(index))
        chosen = list(range(len(self))[index]) if isinstance(index, slice) else [self.index_of(i) for i in index]
        if not chosen:
            raise IndexError("an ensemble needs at least one member, and none was chosen")
        indices = torch.tensor(chosen)
        tensors = {}
        for name, tensor in self.adapter.items():
            picked = clone(tensor) if name in self.layout.once else tensor.detach()[indices.to(tensor.device)]
            tensors[name] = nn.Parameter(picked, requires_grad=tensor.requires_grad)
        buffers = {name: buffer.detach()[indices.to(buffer.device)] for name, buffer in self._saved_buffers().items()}
        return self._like(self.layout.select(chosen), tensors, buffers)

    def __iter__(self) -> Iterator[AdaptedModel]:
        return (self._member(index) for index in range(len(self)))

    def unstack(self) -> list[AdaptedModel]:
        """The members as models of their own, on the same base; their tensors are copies."""
        return list(self)

    def index_of(self, index: int) -> int:
        """The index of a member, 0 or more, for one that may be negative.

        Raises:
            IndexError: if there is no such member.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no member {index} in an ensemble of {len(self)}")
        return index % len(self)

    def _member(self, index: int) -> AdaptedModel:
        member = self.layout.members[index]
        buffers = copy_buffers(self.copy_pool.buffers, {name: self._buffer(name)[index] for name in self._state})
        stacked = self._named_tensors()
        tensors = {
            name: nn.Parameter(clone(tensor), requires_grad=stacked[name].requires_grad)
            for name, tensor in self.layout.member_tensors(index, stacked).items()
        }
        # The ensemble's main copy is not reachable by users, so a copy of the base is the same.
        pool = self.copy_pool.fork(buffers, of_base=True)
        return AdaptedModel(Adapter(member.parameters, member.strategy, tensors), pool)

    def _like(self, layout: StackLayout, tensors: Mapping[str, nn.Parameter], buffers: NamedTensors) -> Ensemble:
        made = Ensemble(self.copy_pool.fork(of_base=True), layout, tensors, buffers)
        made.chunk_size, made.randomness, made.generator = self.chunk_size, self.randomness, self.generator
        return made

    # --- parameters

    def _saved_buffers(self) -> dict[str, Tensor]:
        return {name: self._buffer(name) for name in self._state}

    def _base_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.expand(len(self), *buffer.shape) for name, buffer in super()._base_buffers().items()}

    def merge(self, index: int) -> nn.Module:
        """A new plain module with one member's changed weights; see `AdaptedModel.merge`.

        Raises:
            IndexError: if there is no such member.
        """
        return self[index].merge()

    def summary(self) -> str:
        """A table of the adapted parameters with methods and the sizes of all members together."""
        parameters = [(parameter.name, parameter.method, parameter.names.values()) for parameter in self.layout.parameters]
        return f"{len(self)} members\n{summary(self.frozen_base, parameters, self._named_tensors())}"

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
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ensemble:
        tensors = {name: nn.Parameter(clone(p), requires_grad=p.requires_grad) for name, p in self.adapter.items()}
        memo.update({id(parameter): tensors[name] for name, parameter in self.adapter.items()})
        buffers = {name: clone(buffer) for name, buffer in self._saved_buffers().items()}
        made = memo[id(self)] = self._like(self.layout, tensors, buffers)
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        options = (self.chunk_size, self.randomness)
        state = self.layout, dict(self.adapter.items()), self._saved_buffers()
        return Ensemble._unpickled, (self.copy_pool.tree.detached(), options, *state)

    @staticmethod
    def _unpickled(module: nn.Module, options: tuple[int | None, Randomness], layout: StackLayout, *state: Any) -> Ensemble:
        made = Ensemble(CopyPool(layout.parameters.base, ModuleTree(module)), layout, *state)
        made.chunk_size, made.randomness = options
        return made

    def __repr__(self) -> str:
        methods = {parameter.name: parameter.method for parameter in self.layout.parameters}
        how = "at once" if self.fallback is None else f"one after another: {self.fallback}"
        return f"Ensemble of {len(self)}, run {how}\n{tree(self.copy_pool.outline, methods)}"
