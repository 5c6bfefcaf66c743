"""Counts and iterators of parameters, by the seed's names, for plain modules and adapted models alike."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .adapted_model import AdaptedModel


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that require grad, each once: what an optimizer gets.

    Args:
        model: any module; of an adapted model these are the adapter's.
    """
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def num_trainable_parameters(model: nn.Module) -> int:
    """How many numbers training would change.

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
    """How many numbers a model holds in its parameters, trained or not.

    Args:
        model: any module; an adapted model holds those of its frozen base and of its adapter.
    """
    own = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(model, AdaptedModel):
        own += sum(parameter.numel() for parameter in model.base.parameters())
    return own
