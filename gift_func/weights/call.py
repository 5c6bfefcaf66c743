"""One call of an adapted network, and whether gradient checkpointing is used in it.

A checkpoint runs a part of the network again in backward, after the call, and needs the weights of
that call. A reentrant checkpoint around inputs that need no gradient drops the gradient of every
weight inside, with only a warning.
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
    """The state of autograd when a call began, and whether a checkpoint was found during it.

    Attributes:
        grad: whether gradients were enabled; if not, checkpoints do not matter.
        hooks: the saved-tensor hooks that were active.
        checkpointed: whether an operation on a weight ran inside a checkpoint.
        outlived: whether the network goes on running after the call, because its forward is a generator.
    """

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.hooks = saved_tensor_hooks()
        self.checkpointed = False
        self.outlived = False

    def returns(self, made: Any) -> Any:
        """Pass on the network's output; if that is a generator, mark the call as outlived, so that its copy is not reused."""
        self.outlived = isinstance(made, GeneratorType)
        return made

    def look(self, weights: Iterable[Weight]) -> None:
        """Record whether the operation on weights that is about to run is inside a checkpoint.

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
    """The innermost call that is running in this thread."""
    return _current.call


@contextmanager
def calling() -> Iterator[Call]:
    """Make a new call the current one of this thread for the length of the block."""
    before, call = _current.call, Call()
    _current.call = call
    try:
        yield call
    finally:
        _current.call = before
