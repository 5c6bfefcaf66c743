"""The members of an ensemble as the adapters of a mixed batch, by views of its stacked tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import lasting_outside
from ..adapted_model import AdaptedModel
from ..adapter import Adapter, brings_modules
from ..banks.mixed_batch import MixedBatchRunner
from ..banks.plan import batch_by_address
from ..banks.samples import numbers_of
from ..caching import LRU
from ..errors import AdaptError
from ..network.copy_pool import CopyPool
from ..network.module_tree import ModuleTree, clone, persistent
from ..stack_layout import StackLayout

Tensors = Mapping[str, Tensor]
MODELS = 32
"""How many members that ran by themselves are kept as models."""


class MixedMembers:
    """The members of one ensemble in one state, as the adapters of mixed batches.

    Args:
        pool: the ensemble's network.
        layout: what its members are.
        tensors: their stacked tensors.
        buffers: their own buffers, stacked.
    """

    def __init__(self, pool: CopyPool, layout: StackLayout, tensors: Tensors, buffers: Tensors) -> None:
        self._base, self._layout, self._state = pool.base, layout, _state_of(pool, tensors, buffers)
        self._runner = MixedBatchRunner(pool.base, pool.current_modes())
        if self._runner.statistics is not None:
            raise AdaptError(
                f"{self._runner.statistics!r} takes statistics of its batch and keeps them for each member, which a mixed "
                "batch cannot. Call eval() on the ensemble, use its map, or train the members in a gf.AdapterBank."
            )
        own = brings_modules(pool.tree, pool.base.tree)
        known = persistent(pool.base.tree.held())
        self._adapters = []
        for index, member in enumerate(layout.members):
            with lasting_outside(), torch.enable_grad():
                shares = {name: tensors[name] if name in layout.once else tensors[name][index] for name in member.shapes}
                views = {name: _cut(share, member.shapes[name]) for name, share in shares.items()}
            differing = {name: rows[index] for name, rows in buffers.items() if not _is(rows[index], known.get(name))}
            tree = ModuleTree(pool.tree.detached()).copy(clone) if own else None
            self._adapters.append(Adapter(member.parameters, member.strategy, views, differing, tree))
        self._models: LRU[Adapter, AdaptedModel] = LRU(MODELS)

    def are_of(self, pool: CopyPool, layout: StackLayout, tensors: Tensors, buffers: Tensors) -> bool:
        """Whether these are the members of an ensemble in this state."""
        same = self._base is pool.base and self._layout is layout
        return same and self._state == _state_of(pool, tensors, buffers)

    def run(self, members: Sequence[int | None] | Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network on a batch, sample j by member `members[j]`."""
        if isinstance(members, Tensor):
            members = [None if index == -1 else index for index in numbers_of(members, "members")]
        batch = batch_by_address([self._adapter(index) for index in members])
        return self._runner.run(batch, args, kwargs, self._apart)

    def _adapter(self, index: int | None) -> Adapter | None:
        if index is None:
            return None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self._adapters):
            raise AdaptError(
                f"there is no member {index!r} in an ensemble of {len(self._adapters)}; members are counted from 0, and "
                "None is the base alone"
            )
        return self._adapters[index]

    def _apart(self, adapter: Adapter) -> Callable[..., Any]:
        """What runs one member's samples by themselves."""
        found = self._models.get(adapter)
        model = self._models.setdefault(adapter, self._runner.model(adapter)) if found is None else found
        return lambda *args, **kwargs: model.functional_call(adapter.tensors, {}, args, kwargs)


def _state_of(pool: CopyPool, tensors: Tensors, buffers: Tensors) -> tuple[object, ...]:
    of_tensors = [(name, id(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors.items()]
    of_buffers = [(name, id(buffer), buffer._version) for name, buffer in buffers.items()]
    return pool.current_modes(), of_tensors, of_buffers


def _cut(share: Tensor, shape: torch.Size) -> Tensor:
    """A member's own tensor: its share of the stack without what was filled up with zeros."""
    return share if share.shape == shape else share[tuple(slice(n) for n in shape)]


def _is(buffer: Tensor, known: Tensor | None) -> bool:
    return known is not None and known.shape == buffer.shape and torch.equal(buffer, known)
