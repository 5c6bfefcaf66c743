"""Mixed batches for `torch.compile`: every sample is a batch of one under `vmap`, with its adapter's tensors from stacks.

The graph depends on the bank and on shapes, and not on which adapters a batch uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..adapted_model import AdaptedModel
from ..adapter import AdaptedParameters, Adapter
from ..errors import AdaptError
from ..network.copy_pool import CopyPool
from ..network.frozen_base import FrozenBase
from ..network.module_tree import ModuleTree
from ..network.runner import Runner
from ..stack_layout import make_layout, pad_to
from .contiguous import lies_stacked, stacked
from .samples import check_size, shared


class CompiledBank:
    """Stacks of a bank's adapters, and the network that runs on a share of them for each sample.

    Args:
        base: the frozen base.
        tree: a private copy of its module tree, which nothing else uses.
        models: the bank's adapters; the stacks are views of their tensors, or are made from them in each call.

    Raises:
        AdaptError: if they cannot share a stack.
    """

    def __init__(self, base: FrozenBase, tree: ModuleTree, models: Sequence[AdaptedModel]) -> None:
        plain = AdaptedModel(Adapter(AdaptedParameters(base, ()), None, {})).train(tree.module.training)
        try:
            self.layout, tensors = make_layout([*models, plain])
        except AdaptError as error:
            raise AdaptError(f"under torch.compile the adapters of a bank must share a stack. {error}") from None
        self.size = len(models)
        self.runner = Runner(CopyPool(base, tree), self.layout.parameters)
        self.runner.bind_base()
        self.extras = self.layout.extras()
        self.once: dict[str, Tensor] = {}
        self._stacks: dict[str, Tensor] = {}
        self._unstacked: dict[str, list[Tensor]] = {}
        for name, stack in tensors.items():
            if name in self.layout.once:
                self.once[name] = stack.detach()
                continue
            own: list[Tensor] = [
                model.adapter[name] if name in model.adapter else stack[index].detach() for index, model in enumerate(models)
            ]
            if all(tensor.shape == stack.shape[1:] for tensor in own) and lies_stacked(own):
                with torch.enable_grad():
                    self._stacks[name] = stacked(own, lasting=True)
            else:
                self._unstacked[name] = own
        self._shapes = {name: stack.shape[1:] for name, stack in tensors.items()}

    def __call__(self, index: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network on a batch.

        Args:
            index: the index of each sample's adapter, int64 `(batch,)`; -1 for the base alone.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        leaves, spec = tree_flatten((args, kwargs))
        size = index.shape[0]
        check_size(leaves, size)
        alike = shared(leaves, size)
        if alike is None:
            raise AdaptError(f"an argument has two axes of length {size}, so it cannot be told which of them is the batch's")
        mapped = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and place not in alike]
        clamped = index.clamp(min=0)
        shares = {name: self._stack(name)[clamped] for name in self._shapes if name not in self.once}
        # The last share of the extras is for the base alone.
        extras = {name: tensor[torch.where(index < 0, self.size, index)] for name, tensor in self.extras.items()}
        form: list[Any] = []

        def one(share: dict[str, Tensor], extra: dict[str, Tensor], given: list[Tensor]) -> list[Tensor]:
            own = list(leaves)
            for place, tensor in zip(mapped, given, strict=True):
                own[place] = tensor.unsqueeze(0)
            inner_args, inner_kwargs = tree_unflatten(own, spec)
            tensors = self.layout.applied({**self.once, **share}, extra)
            made = self.runner.stateful_call(tensors, {}, inner_args, inner_kwargs, private_buffers=False)[0]
            flat, out_spec = tree_flatten(made)
            form.append(([None if isinstance(leaf, Tensor) else leaf for leaf in flat], out_spec))
            return [leaf for leaf in flat if isinstance(leaf, Tensor)]

        found = torch.vmap(one, randomness="different")(shares, extras, [leaves[place] for place in mapped])
        tensors, (others, out_spec) = iter(found), form[0]
        return tree_unflatten([_batch(next(tensors)) if leaf is None else leaf for leaf in others], out_spec)

    def _stack(self, name: str) -> Tensor:
        if name in self._stacks:
            return self._stacks[name]
        return torch.stack([pad_to(tensor, self._shapes[name]) for tensor in self._unstacked[name]])


def _batch(leaf: Tensor) -> Tensor:
    """An output of batches of one, `(batch, 1, ...)`, as an output of the batch."""
    if leaf.ndim < 2 or leaf.shape[1] != 1:
        raise AdaptError(
            f"under torch.compile each sample runs as a batch of one, and an output of it has shape {tuple(leaf.shape[1:])}, "
            "whose leading axis is not the batch. Return tensors that have the samples in front, and no loss of the batch."
        )
    return leaf.flatten(0, 1)
