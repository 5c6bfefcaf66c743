"""One call of an adapted network, and what gradient checkpointing does inside of it.

A checkpoint runs a part of the network again in backward, after the call. It must then find the
weights of that call. And a reentrant checkpoint around inputs that need no gradient drops the
gradient of every weight inside, with no more than a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

import torch

from .._torch import inside_gradless_checkpoint, saved_tensor_hooks
from ..errors import CheckpointError
from .value import Weight


class Call:
    """What held when a call began, and whether a checkpoint was met on the way.

    Attributes:
        grad: whether gradients were on; if not, there is nothing to look for.
        hooks: the saved-tensor hooks in force.
        checkpointed: whether an operation on a weight ran inside a checkpoint.
        outlived: whether the network runs on after the call, its forward being a generator.
    """

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.hooks = saved_tensor_hooks()
        self.checkpointed = False
        self.outlived = False

    def returns(self, made: Any) -> Any:
        """What the network returned; if that is a generator, its copy of the network is left to it."""
        self.outlived = isinstance(made, GeneratorType)
        return made

    def look(self, weights: Iterable[Weight]) -> None:
        """Notice a checkpoint around the operation on weights that is about to run.

        Raises:
            CheckpointError: if a weight needs a gradient that a checkpoint would drop.
        """
        if not torch.is_grad_enabled():
            self.checkpointed = True
            if any(weight.requires_grad for weight in weights) and inside_gradless_checkpoint():
                raise CheckpointError(
                    "a reentrant checkpoint (use_reentrant=True) runs adapted layers on inputs of which none requires "
                    "grad, so their adapters would get no gradient. Use use_reentrant=False, or make the input "
                    "require grad (x.requires_grad_(), or enable_input_require_grads() of a transformers model)."
                )
        elif saved_tensor_hooks() is not self.hooks:
            self.checkpointed = True


class _Current(threading.local):
    call: Call | None = None


_current = _Current()


def current() -> Call | None:
    """The innermost call under way in this thread."""
    return _current.call


@contextmanager
def calling() -> Iterator[Call]:
    """Mark the extent of one call in this thread."""
    before, call = _current.call, Call()
    _current.call = call
    try:
        yield call
    finally:
        _current.call = before
