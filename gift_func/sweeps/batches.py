"""The batches of a sweep: a step's batch is the same for every group, and after resuming from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import AdaptError
from ..seeding import seeded

_END = object()
Data = Iterable[Any] | Callable[[int], Any]


class Batches:
    """Batches by the number of the step.

    torch's global generator, from which data may draw (`DataLoader(shuffle=True)`, an augmentation), is seeded by the seed
    and the step.

    Args:
        data: an iterable, which is iterated over repeatedly; or a function of the step.
        seed: of the random draws.
        shuffled: iterate over a sequence in another order each time, which depends on the seed.
    """

    def __init__(self, data: Data, seed: int, shuffled: bool = False) -> None:
        if not callable(data) and not isinstance(data, Iterable):
            raise TypeError(f"data is an iterable of batches or a function of the step, got a {type(data).__name__}")
        if isinstance(data, Iterator):
            raise TypeError("data is gone through several times, which an iterator cannot be; pass what it was made from")
        self._data, self._seed, self._shuffled = data, seed, shuffled
        self._draws = torch.Generator()
        self._iterator: Iterator[Any] = iter(())
        self._next = -1

    def at(self, step: int) -> tuple[Any, Any]:
        """The inputs of a step, and the target that the loss compares the output with."""
        if isinstance(self._data, Sequence):
            batch = self._indexed(self._data, step)
        elif isinstance(self._data, Iterable):
            if step != self._next:
                start = step - step % max(len(self._data), 1) if isinstance(self._data, Sized) else 0
                self._iterator = iter(())
                for skipped in range(start, step):
                    self._drawn(skipped)
            batch, self._next = self._drawn(step), step + 1
        else:
            with seeded(self._at(step)):
                batch = self._data(step)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise AdaptError(
                f"a batch is a pair (inputs, target): the network gets the first, the loss the second; got a "
                f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
            )
        return batch[0], batch[1]

    def _at(self, step: int) -> torch.Generator:
        return self._draws.manual_seed((self._seed * 2**31 + step) % 2**63)

    def _indexed(self, data: Sequence[Any], step: int) -> Any:
        if not data:
            raise AdaptError("the data has no batch")
        epoch, place = divmod(step, len(data))
        if self._shuffled:
            with seeded(self._at(epoch)):
                place = int(torch.randperm(len(data))[place])
        with seeded(self._at(step)):
            return data[place]

    def _drawn(self, step: int) -> Any:
        assert isinstance(self._data, Iterable)
        with seeded(self._at(step)):
            batch = next(self._iterator, _END)
            if batch is _END:
                self._iterator = iter(self._data)
                batch = next(self._iterator, _END)
        if batch is _END:
            raise AdaptError("the data has no batch")
        return batch


def call_with(network: Callable[..., Any], inputs: Any) -> Any:
    """Call a network with a batch's inputs: a mapping as keyword arguments, a tuple or list as arguments, else one argument."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def stack_batches(parts: Sequence[Any]) -> Any:
    """Stack the tensors of several members' inputs or targets, which must have one structure and shape."""
    trees = [tree_flatten(dict(part) if isinstance(part, Mapping) else part) for part in parts]
    leaves, spec = trees[0]
    made = []
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            made.append(leaf)
            continue
        own = [found[place] for found, other in trees if other == spec]
        if len(own) < len(trees) or any(not isinstance(other, Tensor) or other.shape != leaf.shape for other in own):
            raise AdaptError("with own_order the members' batches of a step are stacked, so they need one structure and shape")
        made.append(torch.stack(own))
    return tree_unflatten(made, spec)
