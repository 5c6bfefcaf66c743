"""Clips the gradient norm of each member of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AdaptError
from .ensemble import Ensemble


@torch.no_grad()
def clip_grad_norm_per_member(
    ensemble: Ensemble, max_norm: float | Sequence[float] | Tensor, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale each member's gradient down to a norm of at most `max_norm`, in place: `g_i ← g_i · min(1, c / (‖g_i‖ + 1e-6))`.

    The same as `torch.nn.utils.clip_grad_norm_` for each member.

    Args:
        ensemble: an ensemble, after `backward`.
        max_norm: c, one number or one for each member.
        norm_type: p of the norm; `inf` for the largest absolute value.
        error_if_nonfinite: raise for norms that are not finite.

    Returns:
        The members' norms before clipping, `(N,)`.

    Raises:
        AdaptError: if there is another number of norms than members, or with `error_if_nonfinite` where one is not finite;
            nothing was scaled then.

    Example:
        >>> import torch, gift_func as gf
        >>> ens = gf.adapt_ensemble(torch.nn.Linear(4, 2), gf.LoRA(rank=1, init="random"), 3)
        >>> ens(torch.randn(5, 4)).square().sum().backward()
        >>> before = gf.optim.clip_grad_norm_per_member(ens, 1e-3)
        >>> bool((gf.optim.clip_grad_norm_per_member(ens, 1.0) < 1.001e-3).all()), before.shape
        (True, torch.Size([3]))
    """
    size = len(ensemble)
    gradients = [parameter.grad for parameter in ensemble.trainable_parameters() if parameter.grad is not None]
    if not gradients:
        return torch.zeros(size)
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(gradient.reshape(size, -1), norm_type, dim=1).to(device) for gradient in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type, dim=0)
    limit = torch.as_tensor(max_norm, dtype=total.dtype, device=device)
    if limit.ndim and limit.shape != (size,):
        raise AdaptError(f"max_norm is one number or one for each of the {size} members, got shape {tuple(limit.shape)}")
    if error_if_nonfinite and not bool(total.isfinite().all()):
        wrong = (~total.isfinite()).nonzero().flatten().tolist()
        raise AdaptError(
            f"the gradient's norm is not finite in members {wrong}; leave them out, or pass error_if_nonfinite=False"
        )
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient).reshape(size, *(1,) * (gradient.ndim - 1)))
    return total
