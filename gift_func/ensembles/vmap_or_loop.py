"""Runs a function of one member for all members: under `vmap`, or one after another with the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import AdaptError
from ..network.module_tree import ModuleTree
from ..seeding import seeded
from .vmap_mode import DisagreementError, VmapMode

_TENSOR = object()
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
Leaves = Sequence[Any]
Stacks = Sequence[dict[str, Tensor]]
RunMember = Callable[..., tuple[Any, dict[str, Tensor], bool]]


class CannotBatchError(Exception):
    """Torch cannot run the members at once; the message says why."""


@dataclass(frozen=True)
class MembersOutput:
    """The stacked output of some of the members.

    Attributes:
        tensors: the output's tensors, with the members as first axis.
        others: the output's leaves, `_TENSOR` in place of each tensor.
        spec: the output's tree.
        after: the buffers after the call, stacked.
    """

    tensors: list[Tensor]
    others: list[Any]
    spec: TreeSpec
    after: dict[str, Tensor]

    def output(self) -> Any:
        """The output as the network returns it."""
        tensors = iter(self.tensors)
        return tree_unflatten([next(tensors) if leaf is _TENSOR else leaf for leaf in self.others], self.spec)


def batched(
    member: RunMember, stacks: Stacks, leaves: Leaves, mapped: bool, randomness: str, size: int, chunk_size: int | None
) -> tuple[Any, dict[str, Tensor]]:
    """All members at once.

    Args:
        member: takes a member's share of each of `stacks`, and the leaves; returns the output, the buffers after the call, and
            whether a checkpoint ran.
        stacks: dicts of tensors whose first axis is the member.
        leaves: the arguments' leaves.
        mapped: whether the tensors among the leaves have the member as first axis too.
        randomness: "different" draws for each member, or the "same".
        size: N, how many members there are.
        chunk_size: how many members at a time; None for all.

    Raises:
        CannotBatchError: if an operation has no batching rule, depends on values, or would be run again by a checkpoint.
    """
    if torch.compiler.is_compiling():
        whole = _together(member, stacks, leaves, mapped, randomness, nullcontext)
        return whole.output(), whole.after
    step = size if chunk_size is None else chunk_size
    groups = [list(range(start, min(start + step, size))) for start in range(0, size, step)]
    draws = _Draws(randomness)
    done: list[tuple[list[int], MembersOutput]] = []
    while groups:
        group = groups.pop(0)
        shares = [{name: _select(tensor, group, size) for name, tensor in stack.items()} for stack in stacks]
        given = [_select(leaf, group, size) if mapped and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        try:
            with draws.again():
                done.append((group, _together(member, shares, given, mapped, randomness, VmapMode)))
        except DisagreementError as error:
            groups[:0] = [[group[place] for place in part] for part in error.groups]
        except RuntimeError as error:
            raise CannotBatchError(str(error).split(". ")[0].split("\n")[0]) from error
    made = _in_order(done)
    _check_plain(made.others)
    return made.output(), made.after


def one_by_one(
    member: RunMember, stacks: Stacks, leaves: Leaves, mapped: bool, randomness: str, size: int
) -> tuple[Any, dict[str, Tensor]]:
    """The members one after another; arguments as for `batched`."""
    draws = _Draws(randomness)
    done = []
    for index in range(size):
        shares = [{name: tensor[index] for name, tensor in stack.items()} for stack in stacks]
        own = [leaf[index] if mapped and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        with draws.again():
            output, after, _ = member(*shares, own)
        flat, others, spec = _flat(output)
        _check_plain(others)
        one = {name: tensor.unsqueeze(0) for name, tensor in after.items()}
        done.append(([index], MembersOutput([tensor.unsqueeze(0) for tensor in flat], others, spec, one)))
    made = _in_order(done)
    return made.output(), made.after


class _Draws:
    """With "same" randomness, every group of members draws the same numbers, which no later call draws again."""

    def __init__(self, randomness: str) -> None:
        self._seed = int(torch.randint(2**62, ())) if randomness == "same" else None

    def again(self) -> AbstractContextManager[None]:
        return nullcontext() if self._seed is None else seeded(torch.Generator().manual_seed(self._seed))


def _together(
    member: RunMember,
    stacks: Stacks,
    leaves: Leaves,
    mapped: bool,
    randomness: str,
    around: Callable[[], AbstractContextManager[object]],
) -> MembersOutput:
    mapped_leaves = [leaf for leaf in leaves if mapped and isinstance(leaf, Tensor)]
    seen: list[tuple[list[Any], TreeSpec]] = []

    def one(shares: Any, given: Any) -> Any:
        tensors = iter(given)
        own = [next(tensors) if mapped and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        with around():
            output, after, checkpointed = member(*shares, own)
        if checkpointed and torch.is_grad_enabled():
            raise CannotBatchError("gradient checkpointing runs parts of the network again in backward, outside of vmap")
        flat, others, spec = _flat(output)
        seen.append((others, spec))
        return flat, after

    found, after = torch.vmap(one, in_dims=(0, 0), out_dims=0, randomness=randomness)(list(stacks), mapped_leaves)
    return MembersOutput(found, *seen[0], after)


def _flat(output: Any) -> tuple[list[Tensor], list[Any], TreeSpec]:
    leaves, spec = tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def _select(tensor: Tensor, members: list[int], size: int) -> Tensor:
    """Some members of a stacked tensor: a view, if they are neighbours."""
    if len(members) == size:
        return tensor
    if members[-1] - members[0] == len(members) - 1:
        return tensor[members[0] : members[-1] + 1]
    return tensor[torch.tensor(members, device=tensor.device)]


def _in_order(done: Sequence[tuple[list[int], MembersOutput]]) -> MembersOutput:
    """The outputs of groups of members as one, in the members' order."""
    if len(done) == 1:
        return done[0][1]
    order = [member for group, _ in done for member in group]
    back = None if order == sorted(order) else torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    first = done[0][1]

    def join(parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(parts))
        return whole if back is None else whole[back.to(whole.device)]

    for _, made in done:
        if len(made.tensors) != len(first.tensors) or made.spec != first.spec:
            raise AdaptError("the members' outputs differ in structure, so they have no common leading axis; call them singly")
    tensors = [join(parts) for parts in zip(*(made.tensors for _, made in done), strict=True)]
    after = {name: join([made.after[name] for _, made in done]) for name in first.after}
    return MembersOutput(tensors, first.others, first.spec, after)


def _check_plain(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if leaf is not _TENSOR and not isinstance(leaf, _CONSTANTS):
            raise AdaptError(
                f"the network's output holds a {type(leaf).__name__}, whose tensors the members cannot be told apart in. "
                "Return tensors, in tuples, dicts or dataclasses that torch knows as trees; of a transformers model, pass "
                "use_cache=False."
            )


def without_rule(tree: ModuleTree) -> str | None:
    """Why torch cannot batch a network over its weights; None if no module prevents it."""
    for name, module in tree.modules.items():
        if isinstance(module, nn.RNNBase):
            return f"torch has no batching rule for {name or 'the model'}, a {type(module).__name__}"
    return None
