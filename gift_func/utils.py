"""GIFt's functions that count parameters and iterate over them, for plain modules and adapted models."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .adapted_model import AdaptedModel


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that require grad, each once: what an optimizer gets.

    Args:
        model: any module; for an adapted model these are the adapter's parameters.
    """
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def num_trainable_parameters(model: nn.Module) -> int:
    """The number of elements of the parameters that require grad.

    Example:
        >>> import torch, gift_func as gf
        >>> from gift_func.utils import num_parameters, num_trainable_parameters
        >>> model = torch.nn.Linear(100, 100)
        >>> adapted = gf.adapt(model, gf.LoRA(rank=3))
        >>> num_trainable_parameters(model), num_trainable_parameters(adapted), num_parameters(adapted)
        (10100, 600, 10700)
    """
    return sum(parameter.numel() for parameter in trainable_parameters(model))


def num_parameters(model: nn.Module) -> int:
    """The number of elements of all parameters, trained or not.

    Args:
        model: any module; for an adapted model these are the parameters of its frozen base and of its adapter.
    """
    own = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(model, AdaptedModel):
        own += sum(parameter.numel() for parameter in model.base.parameters())
    return own
