"""The ensemble: N adapters on one frozen base, run and trained as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..adapted_model import AdaptedModel
from ..adapter_dict import AdapterDict
from ..errors import AdaptError
from ..network.frozen_base import BaseView, FrozenBase
from ..network.module_tree import Buffers, ModuleTree, clone, copied, named
from ..network.runner import Runner
from ..printing import tree
from ..seeding import seeded
from ..stack_layout import StackLayout
from .mixed_batch import Members
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

    def __init__(
        self, base: FrozenBase, structure: ModuleTree | None, recipe: StackLayout, tensors: Parameters, buffers: Tensors
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.chunk_size: int | None = None
        self.randomness: Randomness = "different"
        self.generator: torch.Generator | None = None
        self._unbatchable = without_rule(structure or base.structure)
        self._reasons: dict[tuple[bool, bool, bool], str] = {}
        self.fallback = self._unbatchable
        self._body = Runner(base, structure, recipe.parts)
        for name, stacked in buffers.items():
            module_name, _, attribute = name.rpartition(".")
            self._body.buffers[module_name].tensors[attribute] = stacked
        self._body.bind_base()
        self._state = tuple(buffers)
        self._alike: dict[str, tuple[Tensor, int, bool]] = {}
        self._view: BaseView | None = None
        self._members: Members | None = None
        self.training = self._body.training
        self.adapter = AdapterDict(tensors, self._body.buffers)

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

    @torch.compiler.disable(reason="no graph holds it; gf.AdapterBank(...).prepare() is for that")  # type: ignore[untyped-decorator]
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
        given = self._body, self.recipe, self.adapter.current(), {name: self._buffer(name) for name in self._state}
        found = self._members
        if found is None or not found.are(*given):
            found = self._members = Members(*given)
        with self._drawing():
            return found.run(members, args, kwargs)

    def pure(self, tensors: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward` on any tensors and buffers; nothing is written to."""
        return self._call(tensors, buffers, args, kwargs, mapped=False)

    @property
    def buffer_names(self) -> set[str]:
        """The dotted names of the network's buffers."""
        return set(named(self._body.buffers))

    def _call(
        self, tensors: Tensors, buffers: Tensors | None, args: tuple[Any, ...], kwargs: dict[str, Any], mapped: bool
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if mapped:
            self._check_mapped(leaves)
        writes = buffers is None and self._body.training
        state, fixed = self._states(buffers or {})
        once = {name: tensors[name] for name in self.recipe.once}
        own = {name: tensor for name, tensor in tensors.items() if name not in self.recipe.once}

        def member(
            share: Tensors, extras: Tensors, state: Tensors, given: Sequence[Any]
        ) -> tuple[Any, dict[str, Tensor], bool]:
            made = self.recipe.applied({**once, **share}, extras)
            inner_args, inner_kwargs = tree_unflatten(list(given), spec)
            return self._body.stateful_forward(made, {**fixed, **state}, inner_args, inner_kwargs, buffers is not None)

        stacks = [own, self.recipe.extras(), state]
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
        kind = mapped, self._body.training, torch.is_grad_enabled()
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
            if name in given or self._body.training or not self._is_alike(name, buffer):
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
        found = self._body.buffers[module_name].tensors[attribute]
        assert found is not None
        return found

    def _drawing(self) -> AbstractContextManager[None]:
        return nullcontext() if self.generator is None else seeded(self.generator)

    # --- members

    def __len__(self) -> int:
        return len(self.recipe.members)

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
            picked = clone(tensor) if name in self.recipe.once else tensor.detach()[rows.to(tensor.device)]
            tensors[name] = nn.Parameter(picked, requires_grad=tensor.requires_grad)
        buffers = {name: self._buffer(name).detach()[rows.to(self._buffer(name).device)] for name in self._state}
        return self._like(self.recipe.taken(chosen), tensors, buffers)

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
        member = self.recipe.members[index]
        held = copied(self._body.buffers, {name: self._buffer(name)[index] for name in self._state})
        tensors = {}
        for name, shape in member.shapes.items():
            tensor = self.adapter[name]
            share = tensor.detach() if name in self.recipe.once else tensor.detach()[index]
            cut = share[tuple(slice(n) for n in shape)].clone()
            tensors[name] = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        body, structure = self._body, self._structure(held)
        return body.in_mode(AdaptedModel(body.base, structure, member.parts, tensors, member.strategy, held))

    def _structure(self, held: Mapping[str, Buffers]) -> ModuleTree | None:
        """A copy of the structure, or None where that is the base's: nobody but the ensemble has its own in hand."""
        return None if self._body.pristine else self._body.structure.holding(held)

    def _like(self, recipe: StackLayout, tensors: Parameters, buffers: Tensors) -> Ensemble:
        body, structure = self._body, self._structure(copied(self._body.buffers))
        made = body.in_mode(Ensemble(body.base, structure, recipe, tensors, buffers))
        made.chunk_size, made.randomness, made.generator = self.chunk_size, self.randomness, self.generator
        return made

    # --- parameters

    @property
    def base(self) -> BaseView:
        """The frozen base, unadapted."""
        if self._view is None:
            self._view = BaseView(self._body.base, self._body.structure)
        return self._view

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The stacked parameters that require grad: what an optimizer gets."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stacked parameters that require grad, under their global names."""
        return ((name, parameter) for name, parameter in self.adapter.items() if parameter.requires_grad)

    # --- as a module

    def train(self, mode: bool = True) -> Self:
        """Set training mode for all members; the user's model is not touched."""
        super().train(mode)
        self._body.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._body.rebase(self._body.base.apply(fn))
        self._body.bind_base()
        self.recipe = self.recipe.to(dict(self.adapter.items()))
        self._view = None
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ensemble:
        tensors = {name: nn.Parameter(clone(p), requires_grad=p.requires_grad) for name, p in self.adapter.items()}
        memo.update({id(parameter): tensors[name] for name, parameter in self.adapter.items()})
        made = memo[id(self)] = self._like(self.recipe, tensors, {name: clone(self._buffer(name)) for name in self._state})
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        buffers = {name: self._buffer(name) for name in self._state}
        options = (self.chunk_size, self.randomness)
        structure = ModuleTree(self._body.structure.detached())
        return _restore, (self._body.base, structure.module, self.recipe, dict(self.adapter.items()), buffers, options)

    def __repr__(self) -> str:
        methods = {part.name: part.method for part in self.recipe.parts}
        how = "at once" if self.fallback is None else f"one after another: {self.fallback}"
        return f"Ensemble of {len(self)}, run {how}\n{tree(self._body.outline, methods)}"


def _restore(
    base: FrozenBase,
    module: nn.Module,
    recipe: StackLayout,
    tensors: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    options: tuple[int | None, Randomness],
) -> Ensemble:
    made = Ensemble(base, ModuleTree(module), recipe, tensors, buffers)
    made.chunk_size, made.randomness = options
    return made
