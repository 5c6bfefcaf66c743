"""`stack` and `adapt_ensemble`: make ensembles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..adapt import adapt, base_of
from ..adapted_model import AdaptedModel
from ..errors import AdaptError
from ..network.frozen_base import FrozenBase
from ..network.module_tree import persistent_buffers
from ..stack_layout import make_layout
from .ensemble import Ensemble, Randomness


def stack(
    models: Iterable[AdaptedModel],
    *,
    chunk_size: int | None = None,
    randomness: Randomness = "different",
    generator: torch.Generator | None = None,
) -> Ensemble:
    """Stack adapted models of one base as an ensemble, which is run and trained in one pass. Their tensors are copied.

    Members may differ in rank, alpha and initialisation, and in which parameters they adapt: factors of smaller rank are
    padded with zeros, which training does not change, and a parameter that a member does not adapt is the base's. Everything
    else of their methods must be equal.

    Args:
        models: at least one; all adapted from the same model.
        chunk_size: how many members run at a time; None for all at once. Fewer need less memory.
        randomness: "different" random draws (dropout) for each member, or the "same".
        generator: the generator of each call's random draws, so that they can be repeated; None for torch's global one.

    Raises:
        AdaptError: if the members have different bases or cannot share a stack; it names the parameter and what differs.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Linear(4, 2)
        >>> ens = gf.stack([gf.adapt(model, gf.LoRA(rank=rank)) for rank in (1, 2, 3)])
        >>> ens(torch.randn(5, 4)).shape, ens.map(torch.randn(3, 5, 4)).shape
        (torch.Size([3, 5, 2]), torch.Size([3, 5, 2]))
        >>> {name: tuple(tensor.shape) for name, tensor in ens.named_trainable_parameters()}
        {'lora_B': (3, 2, 3), 'lora_A': (3, 3, 4)}
    """
    members = list(models)
    if not members:
        raise AdaptError("stack needs at least one adapted model")
    for index, member in enumerate(members):
        if not isinstance(member, AdaptedModel):
            raise TypeError(f"stack takes adapted models, and item {index} is a {type(member).__name__}; adapt() makes one")
        _check_alike(members[0], member, index)
    layout, tensors = make_layout(members)
    buffers = [persistent_buffers(member.copy_pool.buffers) for member in members]
    stacked = {name: torch.stack([own[name].detach() for own in buffers]) for name in buffers[0]}
    made = Ensemble(members[0].copy_pool.fork(), layout, tensors, stacked)
    made.chunk_size, made.randomness, made.generator = chunk_size, randomness, generator
    return made


def adapt_ensemble(
    model: nn.Module | FrozenBase,
    strategy: Any,
    size: int,
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    randomness: Randomness = "different",
) -> Ensemble:
    """An ensemble of `size` adapters of one strategy with different initial values.

    The same as `stack([adapt(model, strategy, generator=generator) for _ in range(size)])`, drawn in that order.

    Args:
        model: as for `adapt`.
        strategy: as for `adapt`.
        size: N, the number of members, at least 1.
        generator: the generator of the initial values; None for torch's global generator.
        chunk_size: how many members run at a time; None for all at once.
        randomness: "different" random draws (dropout) for each member, or the "same".

    Raises:
        AdaptError: as by `adapt`, and if the size is below 1.

    Example:
        >>> import torch, gift_func as gf
        >>> ens = gf.adapt_ensemble(torch.nn.Linear(4, 2), gf.LoRA(rank=1), 8, generator=torch.Generator().manual_seed(0))
        >>> len(ens), ens.adapter["lora_A"].shape
        (8, torch.Size([8, 1, 4]))
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise AdaptError(f"an ensemble has a whole number of members, at least 1, got size={size!r}")
    base = base_of(model)
    members = [adapt(base, strategy, generator=generator) for _ in range(size)]
    return stack(members, chunk_size=chunk_size, randomness=randomness)


def _check_alike(first: AdaptedModel, member: AdaptedModel, index: int) -> None:
    ours, theirs = first.copy_pool, member.copy_pool
    if not ours.base.shares_tensors_with(theirs.base):
        raise AdaptError(
            f"member {index} was adapted from another model than member 0. Adapt all of one, whose tensors they then share."
        )
    if ours.base is theirs.base and not ours.is_made and not theirs.is_made and ours.modes == theirs.modes:
        return
    kinds, others = ({name: type(module) for name, module in pool.outline.modules.items()} for pool in (ours, theirs))
    for name in kinds.keys() | others.keys():
        if kinds.get(name) is not others.get(name):
            raise AdaptError(
                f"member {index} cannot share a stack with member 0: {name or 'the model'} is "
                f"{_class_name(kinds.get(name))} in one and {_class_name(others.get(name))} in the other"
            )
    for name in kinds:
        if ours.trains(name) != theirs.trains(name):
            raise AdaptError(
                f"member {index} cannot share a stack with member 0: {name or 'the model'} is in training mode in one of them "
                "only. Call train() or eval() on both."
            )


def _class_name(kind: type | None) -> str:
    return "missing" if kind is None else f"a {kind.__name__}"
