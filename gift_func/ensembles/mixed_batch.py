"""The members of an ensemble as the adapters of a mixed batch, by views of its stacked tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import lasting_outside
from ..adapted_model import persistent_buffers
from ..banks.entry import Adapter, own_modules
from ..banks.keeping import Kept
from ..banks.mixed_batch import MixedBatchRunner
from ..banks.plan import arrange
from ..banks.samples import numbers_of
from ..errors import AdaptError
from ..network.modes import modes_in
from ..network.module_tree import ModuleTree, clone
from ..network.runner import Runner
from ..stack_layout import StackLayout

Tensors = Mapping[str, Tensor]


class Members:
    """The members of one ensemble in one state.

    Args:
        body: the ensemble's network.
        recipe: what its members are.
        tensors: their stacked tensors.
        buffers: the stacked buffers that they keep.
    """

    def __init__(self, body: Runner, recipe: StackLayout, tensors: Tensors, buffers: Tensors) -> None:
        self._base, self._recipe, self._state = body.base, recipe, _state_of(body, tensors, buffers)
        self._network = MixedBatchRunner(body.base, modes_in(body))
        if self._network.statistics is not None:
            raise AdaptError(
                f"{self._network.statistics!r} takes statistics of its batch and keeps them for each member, which a mixed "
                "batch cannot. Call eval() on the ensemble, use its map, or train the members in a gf.AdapterBank."
            )
        own = own_modules(body.structure, body.base.structure)
        known = persistent_buffers(body.base.structure)
        self._entries = []
        for index, member in enumerate(recipe.members):
            with lasting_outside(), torch.enable_grad():
                shares = {name: tensors[name] if name in recipe.once else tensors[name][index] for name in member.shapes}
                views = {name: _cut(share, member.shapes[name]) for name, share in shares.items()}
            differing = {name: rows[index] for name, rows in buffers.items() if not _is(rows[index], known.get(name))}
            structure = ModuleTree(body.structure.detached()).copy(clone) if own else None
            self._entries.append(Adapter(body.base, member.parts, member.strategy, views, differing, structure))
        self._models = Kept()

    def are(self, body: Runner, recipe: StackLayout, tensors: Tensors, buffers: Tensors) -> bool:
        """Whether these are the members of an ensemble in this state."""
        same = self._base is body.base and self._recipe is recipe
        return same and self._state == _state_of(body, tensors, buffers)

    def run(self, members: Sequence[int | None] | Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network on a batch, sample j by member `members[j]`."""
        if isinstance(members, Tensor):
            members = [None if index == -1 else index for index in numbers_of(members, "members")]
        return self._network.run(arrange([self._entry(index) for index in members]), args, kwargs, self._apart)

    def _entry(self, index: int | None) -> Adapter | None:
        if index is None:
            return None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self._entries):
            raise AdaptError(
                f"there is no member {index!r} in an ensemble of {len(self._entries)}; members are counted from 0, and None is "
                "the base alone"
            )
        return self._entries[index]

    def _apart(self, entry: Adapter) -> Callable[..., Any]:
        """What runs one member's samples by themselves."""
        found = self._models.get(entry)
        model = self._models.put(entry, self._network.model(entry)) if found is None else found
        return lambda *args, **kwargs: model.pure(entry.tensors, {}, args, kwargs)


def _state_of(body: Runner, tensors: Tensors, buffers: Tensors) -> tuple[object, ...]:
    of_tensors = [(name, id(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors.items()]
    of_buffers = [(name, id(buffer), buffer._version) for name, buffer in buffers.items()]
    return modes_in(body), of_tensors, of_buffers


def _cut(share: Tensor, shape: torch.Size) -> Tensor:
    """A member's own tensor: its share of the stack without what was filled up with zeros."""
    return share if share.shape == shape else share[tuple(slice(n) for n in shape)]


def _is(buffer: Tensor, known: Tensor | None) -> bool:
    return known is not None and known.shape == buffer.shape and torch.equal(buffer, known)
