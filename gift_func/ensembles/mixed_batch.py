"""The members of an ensemble as the adapters of mixed batches, by views of its stacked tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import lasting_outside
from ..adapter import Adapter, adds_modules
from ..adapter_dict import is_equal
from ..banks.mixed_batch import MixedBatchRunner
from ..banks.plan import batch_by_address
from ..banks.samples import numbers_of
from ..errors import AdaptError
from ..network.copy_pool import CopyPool
from ..network.module_tree import ModuleTree, NamedTensors, clone, persistent_buffers
from ..stack_layout import StackLayout


class MixedMembers(MixedBatchRunner):
    """Runs mixed batches of the members of one ensemble in one state.

    Args:
        pool: the ensemble's copies of the network.
        layout: the ensemble's layout.
        tensors: the stacked tensors.
        buffers: the stacked buffers.
    """

    def __init__(self, pool: CopyPool, layout: StackLayout, tensors: NamedTensors, buffers: NamedTensors) -> None:
        super().__init__(pool.base, pool.current_modes())
        self._layout, self._state = layout, _state_of(pool, tensors, buffers)
        if self.statistics is not None:
            raise AdaptError(
                f"{self.statistics!r} takes statistics of its batch and keeps them for each member, which a mixed "
                "batch cannot. Call eval() on the ensemble, use its map, or train the members in a gf.AdapterBank."
            )
        has_modules = adds_modules(pool.tree, pool.base.tree)
        known = persistent_buffers(pool.base.tree.buffer_dicts())
        self._adapters = []
        for index, member in enumerate(layout.members):
            with lasting_outside(), torch.enable_grad():
                views = layout.member_tensors(index, tensors)
            own = {name: buffer[index] for name, buffer in buffers.items()}
            differing = {n: b for n, b in own.items() if n not in known or not is_equal(b, known[n])}
            tree = ModuleTree(pool.tree.detached()).copy(clone) if has_modules else None
            self._adapters.append(Adapter(member.parameters, member.strategy, views, differing, tree))

    def are_of(self, pool: CopyPool, layout: StackLayout, tensors: NamedTensors, buffers: NamedTensors) -> bool:
        """Whether these are the members of an ensemble in this state."""
        same = self.base is pool.base and self._layout is layout
        return same and self._state == _state_of(pool, tensors, buffers)

    def run_members(self, members: Sequence[int | None] | Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network on a batch, sample j by member `members[j]`."""
        if isinstance(members, Tensor):
            members = [None if index == -1 else index for index in numbers_of(members, "members")]
        return self.run(batch_by_address([self._adapter(index) for index in members]), args, kwargs)

    def run_apart(self, adapter: Adapter, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network on one member's samples."""
        # The model's own parameters are detached from the stack, so gradients need these tensors.
        return self.model(adapter).functional_call(adapter.tensors, {}, args, kwargs)

    def _adapter(self, index: int | None) -> Adapter | None:
        if index is None:
            return None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self._adapters):
            raise AdaptError(
                f"there is no member {index!r} in an ensemble of {len(self._adapters)}; members are counted from 0, and "
                "None is the base alone"
            )
        return self._adapters[index]


def _state_of(pool: CopyPool, tensors: NamedTensors, buffers: NamedTensors) -> tuple[object, ...]:
    of_tensors = [(name, id(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors.items()]
    of_buffers = [(name, id(buffer), buffer._version) for name, buffer in buffers.items()]
    return pool.current_modes(), of_tensors, of_buffers
