"""The one file that reaches into private torch modules, and why for each of them.

- `_top_saved_tensors_default_hooks`: a non-reentrant checkpoint shows itself only by the
  saved-tensor hooks that it pushes; there is no public way to ask for the hooks in force.
- `is_functorch_wrapped_tensor`: torch's fused inference kernels have no batching rule, so under
  a `torch.func` transform they must not be taken; there is no public way to ask.
- `get_unwrapped`: how much work an operation is depends on the batch that `torch.vmap` hides.
- `CheckpointFunction`: a reentrant checkpoint whose inputs need no gradient loses the gradients of
  everything inside it; its frame on the stack is the only trace.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction


def saved_tensor_hooks() -> object:
    """The saved-tensor hooks in force, or None: comparable by identity between two moments."""
    found: tuple[object, object] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found[0] if found else None


def is_transformed(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a `torch.func` transform (vmap, grad, jvp, ...) under way."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def whole_numel(tensor: Tensor) -> int:
    """How many elements the tensor has with those of every `torch.vmap` it is under."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.numel()


def inside_gradless_checkpoint() -> bool:
    """Whether a reentrant checkpoint is running its forward and no input of it needs a gradient."""
    code = CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return not any(frame.f_locals["ctx"].needs_input_grad)
        frame = frame.f_back
    return False
