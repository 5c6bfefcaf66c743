"""A function of one member run for all of them: under `vmap`, or one after another with the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import AdaptError

_TENSOR = object()
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
Leaves = Sequence[Any]


class CannotBatchError(Exception):
    """Torch cannot run the members at once; the message says why."""


def batched(
    member: Callable[..., tuple[Any, dict[str, Tensor], bool]],
    stacks: Sequence[dict[str, Tensor]],
    leaves: Leaves,
    mapped: bool,
    randomness: str,
    chunk_size: int | None,
) -> tuple[Any, dict[str, Tensor]]:
    """All members at once.

    Args:
        member: a member's share of each of `stacks`, and the leaves -> output, buffers, whether a checkpoint was met.
        stacks: dicts of tensors whose first axis is the member.
        leaves: the arguments' leaves; with `mapped`, the tensors among them have the member as first axis too.
        mapped: whether they have.
        randomness: "different" draws for each member, or the "same".
        chunk_size: how many members at a time; None for all.

    Raises:
        CannotBatchError: if an operation has no rule for it, decides by values, or would be run again by a checkpoint.
    """
    tensors = [leaf for leaf in leaves if mapped and isinstance(leaf, Tensor)]
    seen: list[tuple[TreeSpec, list[Any]]] = []

    def one(shares: Any, given: Any) -> Any:
        rest = iter(given)
        own = [next(rest) if mapped and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        made, after, checkpointed = member(*shares, own)
        if checkpointed and torch.is_grad_enabled():
            raise CannotBatchError("gradient checkpointing runs parts of the network again in backward, outside of vmap")
        flat, spec = tree_flatten(made)
        seen.append((spec, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in flat]))
        return [leaf for leaf in flat if isinstance(leaf, Tensor)], after

    run = torch.vmap(one, in_dims=(0, 0), out_dims=0, randomness=randomness, chunk_size=chunk_size)
    try:
        found, after = run(list(stacks), tensors)
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in ("vmap", "Batching rule", "functorch", "BatchedTensor")):
            raise CannotBatchError(text.split(". ")[0].split("\n")[0]) from None
        raise
    spec, others = seen[0]
    _check_plain(others)
    rest = iter(found)
    return tree_unflatten([next(rest) if leaf is _TENSOR else leaf for leaf in others], spec), after


def one_by_one(
    member: Callable[..., tuple[Any, dict[str, Tensor], bool]],
    stacks: Sequence[dict[str, Tensor]],
    leaves: Leaves,
    mapped: bool,
    randomness: str,
    size: int,
) -> tuple[Any, dict[str, Tensor]]:
    """The members one after another; arguments as of `batched`."""
    outputs, afters = [], []
    for index in range(size):
        shares = [{name: tensor[index] for name, tensor in stack.items()} for stack in stacks]
        own = [leaf[index] if mapped and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # Each but the last gives its draws back to the next.
        with torch.random.fork_rng(enabled=randomness == "same" and index < size - 1):
            made, after, _ = member(*shares, own)
        outputs.append(tree_flatten(made))
        afters.append(after)
    first, spec = outputs[0]
    _check_plain([_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in first])
    whole = [
        torch.stack([flat[place] for flat, _ in outputs]) if isinstance(leaf, Tensor) else leaf
        for place, leaf in enumerate(first)
    ]
    return tree_unflatten(whole, spec), {name: torch.stack([after[name] for after in afters]) for name in afters[0]}


def _check_plain(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if leaf is not _TENSOR and not isinstance(leaf, _PLAIN):
            raise AdaptError(
                f"the network's output holds a {type(leaf).__name__}, whose tensors the members cannot be told apart in. "
                "Return tensors, in tuples, dicts or dataclasses that torch knows as trees; of a transformers model, pass "
                "use_cache=False."
            )
