"""A bank's batches, one sample after another: what mixed batches are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import gift_func as gf
from helpers.models import Inputs, assert_close, loss_of

Names = Sequence[str | None]


def size_of(inputs: Inputs) -> int:
    """The number of samples in a call's arguments."""
    first = next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return int(first.shape[0])


def picked(inputs: Inputs, index: Sequence[int], size: int) -> Inputs:
    """Some of the samples of a call's arguments."""
    made: Inputs = tree_map_only(Tensor, lambda t: t[list(index)] if t.ndim and t.shape[0] == size else t, inputs)
    return made


def one_by_one(
    models: Mapping[str, Any], base: Any, names: Names, inputs: Inputs, axes: Mapping[int, int] | None = None
) -> Any:
    """The outputs of each sample by itself, put together.

    Args:
        models: name -> what runs an adapter.
        base: what runs a sample without one.
        names: of the samples.
        inputs: of the batch.
        axes: for a leaf of the output the axis of its samples, where that is not the first.
    """
    size, made = size_of(inputs), []
    spec = None
    for index, name in enumerate(names):
        args, kwargs = picked(inputs, [index], size)
        leaves, spec = tree_flatten((base if name is None else models[name])(*args, **kwargs))
        made.append(leaves)
    assert spec is not None
    joined = [
        torch.cat(parts, dim=(axes or {}).get(place, 0)) if isinstance(parts[0], Tensor) else parts[0]
        for place, parts in enumerate(zip(*made, strict=True))
    ]
    return tree_unflatten(joined, spec)


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    """Outputs of one structure, equal in all tensors."""
    ours, spec = tree_flatten(found)
    theirs, other = tree_flatten(wanted)
    assert spec == other
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(b, Tensor):
            assert_close(a, b, tolerance, f"leaf {place}")
        else:
            assert a == b or type(a) is type(b)


def gradients(output: Any, models: Mapping[str, gf.AdaptedModel]) -> dict[str, Tensor]:
    """The gradients of every adapter's trained tensors, zero where there is none; by `<adapter>.<name>`."""
    named = {f"{key}.{name}": p for key, model in models.items() for name, p in model.named_trainable_parameters()}
    found = torch.autograd.grad(loss_of(output), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def check(
    bank: gf.AdapterBank,
    models: Mapping[str, gf.AdaptedModel],
    names: Names,
    inputs: Inputs,
    tolerance: float = 1e-10,
    axes: Mapping[int, int] | None = None,
) -> Any:
    """Check that a mixed batch is what its samples are one by one: outputs, and gradients by models that are not the bank's."""
    args, kwargs = inputs
    found = bank(*args, adapters=names, **kwargs)
    wanted = one_by_one(models, bank.base, names, inputs, axes)
    assert_same(found, wanted, tolerance)
    if any(name is not None for name in names):
        ours, theirs = gradients(found, {name: bank[name] for name in bank}), gradients(wanted, models)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert_close(gradient, theirs[name], tolerance, name)
    return found
