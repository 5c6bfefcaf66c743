"""When a layer may be computed by an `autograd.Function` of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._torch import is_transformed


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None, own: Tensor) -> bool:
    """Whether gradients are enabled, no transform is active, and the tensors are plain ones of one 32- or 64-bit type.

    Under `torch.func` transforms and `torch.compile` separate operations are faster (measured: 2 to 8 networks of 128 to
    1,024 tokens each). In half precision, rounding the sum of weight and change would lose a small change.

    W must be a frozen matrix; `own` is the adapter's tensor.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or x.ndim < 2 or weight.ndim != 2:
        return False
    if weight.requires_grad or autocasts(x) or weight.dtype not in (torch.float32, torch.float64):
        return False
    tensors = (x, weight, own) if bias is None else (x, weight, own, bias)
    return all(type(t) in (Tensor, nn.Parameter) and t.dtype == weight.dtype and not is_transformed(t) for t in tensors)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is enabled on the tensor's device, so that operations choose their element types themselves."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
