"""The one file that reaches into private torch modules, and why for each of them.

- `_top_saved_tensors_default_hooks`: a non-reentrant checkpoint shows itself only by the
  saved-tensor hooks that it pushes; there is no public way to ask for the hooks in force.
- `is_functorch_wrapped_tensor`, `is_legacy_batchedtensor`: torch's fused inference kernels and what writes to `out=` have
  no batching rule, so under a `torch.func` transform, or in `torch.autograd.grad(..., is_grads_batched=True)`, they must
  not be taken; there is no public way to ask.
- `get_unwrapped`: how much work an operation is depends on the batch that `torch.vmap` hides.
- `is_batchedtensor`, `maybe_get_bdim`, `maybe_get_level`: a decision by values can be taken for a whole ensemble where its
  members agree, and attention be run as one batch; there is no public way to see a batch that `torch.vmap` hides.
- `temporarily_clear_interpreter_stack`: what is made inside of a transform cannot be kept for the time after it.
- `_disable_current_modes`: nor can what is made under a mode such as that of fake tensors.
- `temporarily_pop_interpreter_stack`, `_add_batch_dim`: an `autograd.Function` costs 200 microseconds more inside of a
  `torch.vmap` than outside; where that is the only transform, its rule can be run outside.
- `_dynamo_marked_constant`, `_torchdynamo_disable`: what `torch.compiler.assume_constant_result` and
  `torch.compiler.disable` set on a function. As decorators these import torch._dynamo, which takes as long as importing torch.
- `forward_ad._current_level`: there is no public way to ask whether forward-mode AD is on.
- `CheckpointFunction`: a reentrant checkpoint whose inputs need no gradient loses the gradients of
  everything inside it; its frame on the stack is the only trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointFunction


def saved_tensor_hooks() -> object:
    """The saved-tensor hooks in force, or None: comparable by identity between two moments."""
    found: tuple[object, object] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found[0] if found else None


def is_forward_mode() -> bool:
    """Whether forward-mode AD is on (`torch.func.jvp`, `torch.autograd.forward_ad`)."""
    return forward_ad._current_level >= 0


def is_transformed(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a `torch.func` transform (vmap, grad, jvp, ...) under way, or is batched by autograd."""
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def whole_numel(tensor: Tensor) -> int:
    """How many elements the tensor has with those of every `torch.vmap` it is under."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.numel()


def is_batched(tensor: Tensor) -> bool:
    """Whether the innermost `torch.func` transform under way is a `torch.vmap` and the tensor is batched by it."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor)) and functorch.maybe_get_level(tensor) == functorch.maybe_current_level()


def batch_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor that `is_batched`, its batch first."""
    functorch = torch._C._functorch
    whole: Tensor = functorch.get_unwrapped(tensor)
    return whole.movedim(functorch.maybe_get_bdim(tensor), 0)


def vmap_level() -> int:
    """How many `torch.func` transforms are under way."""
    return int(torch._C._functorch.maybe_current_level() or 0)


def in_one_vmap(tensors: Iterable[Tensor]) -> bool:
    """Whether a `torch.vmap` is the only transform under way and one of the tensors is batched by it."""
    return torch._C._functorch.maybe_current_level() == 1 and any(map(is_batched, tensors))


@contextmanager
def below_vmap() -> Iterator[None]:
    """Outside of the innermost transform, for operations on what `batch_of` gave."""
    with temporarily_pop_interpreter_stack():
        yield


@contextmanager
def lasting_outside() -> Iterator[None]:
    """Outside of every `torch.func` transform and of inference mode: what is made of plain tensors here may be kept."""
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False):
        yield


@contextmanager
def without_modes() -> Iterator[None]:
    """Outside of every `TorchDispatchMode`: what is made here is real."""
    with _disable_current_modes():
        yield


def as_batched(tensor: Tensor) -> Tensor:
    """A tensor with the batch first, as it is seen inside of the innermost `torch.vmap`."""
    functorch = torch._C._functorch
    made: Tensor = functorch._add_batch_dim(tensor, 0, vmap_level())
    return made


def inside_gradless_checkpoint() -> bool:
    """Whether a reentrant checkpoint is running its forward and no input of it needs a gradient."""
    code = CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return not any(frame.f_locals["ctx"].needs_input_grad)
        frame = frame.f_back
    return False


Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def constant_in_graphs(function: Decorated) -> Decorated:
    """`torch.compiler.assume_constant_result`: Dynamo runs the function while it traces, and puts its result into the graph."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def outside_graphs(reason: str) -> Callable[[Decorated], Decorated]:
    """`torch.compiler.disable`: Dynamo ends the graph before the function, and does not compile what it calls either."""

    def decorate(function: Decorated) -> Decorated:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:  # nobody compiles
                return function(*args, **kwargs)
            return torch.compiler.disable(function, reason=reason)(*args, **kwargs)

        marks = {"_torchdynamo_disable": True, "_torchdynamo_disable_recursive": True, "_torchdynamo_disable_msg": reason}
        vars(call).update(marks)
        return call  # type: ignore[return-value]

    return decorate
