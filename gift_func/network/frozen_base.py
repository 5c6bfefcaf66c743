"""The frozen base: private modules around aliases of a network's tensors, shared by any number of adapters."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseChangedWarning, outside
from ..methods import WeightMethod
from ..select import Site
from ..weights import Dense, Slot, Weight
from .copy_tree import paths, walk
from .fingerprint import fingerprint
from .module_tree import ModuleTree, join, named_buffers


class FrozenBase:
    """A network that is not trained: private modules around aliases of the user's tensors.

    Calls run on copies of its module tree, which a `CopyPool` makes.

    Args:
        tree: a private copy of the network's modules, with its tensors.
        trainable: names of the parameters that required grad in the user's model.
    """

    def __init__(self, tree: ModuleTree, trainable: frozenset[str] = frozenset()) -> None:
        self.tree = tree
        self.trainable = trainable
        self.tensors: dict[str, Tensor] = {name: tree.tensor(name) for name in tree.places}
        self.weights: dict[str, Weight] = {
            name: tensor.weight if isinstance(tensor, Slot) else Dense(tensor) for name, tensor in self.tensors.items()
        }
        self.slots = tuple(name for name, tensor in self.tensors.items() if isinstance(tensor, Slot))
        self._watched = [
            (name, tensor)
            for name, tensor in self.tensors.items()
            if not isinstance(tensor, Slot) and not tensor.is_inference() and name not in tree.written
        ]
        self._versions = self._read_versions()
        self.epoch = 0
        self._precomputed: dict[tuple[str, WeightMethod], dict[str, Tensor]] = {}
        self._fingerprint: dict[str, str] | None = None
        # For the strategy of the latest state that was loaded: adapted parameters, and tensors of their shapes.
        self.plans: dict[Any, tuple[tuple[Any, ...], Mapping[str, Tensor]]] = {}
        self._lock = threading.Lock()

    @staticmethod
    def of(model: nn.Module) -> FrozenBase:
        """The frozen base of a user's model, which is only read.

        Raises:
            AdaptError: if the model's structure cannot be copied.
        """
        modules = walk(model)
        tree = ModuleTree.of(modules)
        trainable = {
            join(module_name, attribute)
            for module_name, module in modules.items()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        }
        return FrozenBase(tree, frozenset(trainable & tree.places.keys()))

    @cached_property
    def has_plain_modes(self) -> bool:
        """Whether every module's `train` is torch's own, which only sets the modes."""
        modules = self.tree.modules.values()
        return all(type(module).train is nn.Module.train and "train" not in vars(module) for module in modules)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenBase._unpickled, (self.tree.module, self.trainable)

    @staticmethod
    def _unpickled(module: nn.Module, trainable: frozenset[str]) -> FrozenBase:
        return FrozenBase(ModuleTree(module), trainable)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by their global names."""
        return named_buffers(self.tree.buffer_dicts())

    def sites(self, model: nn.Module | None = None) -> list[list[Site]]:
        """The sites of every parameter of the base: several where it is tied.

        Args:
            model: the user's model, whose own modules and parameters are then those of the sites.
        """
        root = self.tree.module if model is None else model
        modules = paths(root)
        groups = []
        for names in self.tree.names.values():
            group = []
            for name in names:
                module_name, _, param_name = name.rpartition(".")
                module = modules[module_name]
                parameter = module._parameters[param_name]
                assert parameter is not None
                group.append(Site(name, module_name, param_name, module, parameter))
            groups.append(group)
        return groups

    def precomputed(self, name: str, method: WeightMethod) -> dict[str, Tensor]:
        """The tensors that a method computes from a weight alone; they are computed once and cached."""
        if type(method).precompute is WeightMethod.precompute:
            return {}
        with self._lock:
            found = self._precomputed.get((name, method))
            if found is None:
                with torch.no_grad():
                    found = {local: tensor.detach() for local, tensor in method.precompute(self.weights[name]).items()}
                self._precomputed[name, method] = found
            return found

    def watch(self) -> int:
        """Warn, once for each change, if the tensors were written to since they were frozen.

        Returns:
            How many times that happened.
        """
        found = self._read_versions()
        if found != self._versions:
            changed = [name for (name, _), was, now in zip(self._watched, self._versions, found, strict=True) if was != now]
            self._versions = found
            self.epoch += 1
            self._fingerprint = None
            with self._lock:
                self._precomputed = {key: found for key, found in self._precomputed.items() if key[0] not in changed}
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            warnings.warn(
                f"the frozen base was written to in place after adapt: {shown}. Adapted outputs follow the new values, "
                "while adapters were made for the old ones. Restore the tensors, or adapt a copy of the model.",
                BaseChangedWarning,
                stacklevel=outside(),
            )
        return self.epoch

    def _read_versions(self) -> list[int]:
        return [tensor._version for _, tensor in self._watched]

    def shares_tensors_with(self, other: FrozenBase) -> bool:
        """Whether the other base has the same tensors in the same places."""
        if self is other:
            return True
        if self.tensors.keys() != other.tensors.keys():
            return False
        return all(
            _same_memory(tensor, other.tensors[name])
            # Of a parameter that the network writes to, each base has its own copy.
            or (name in self.tree.written & other.tree.written and self._normalised_alike(other, name))
            for name, tensor in self.tensors.items()
        )

    def _normalised_alike(self, other: FrozenBase, name: str) -> bool:
        """Whether the embeddings are the same after all rows are limited to their largest norm, as a lookup limits some."""
        module = self.tree.places[name][0][0]
        assert isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        assert module.max_norm is not None
        norm, limit = module.norm_type, module.max_norm
        ours, theirs = (torch.renorm(base.tensors[name].detach(), norm, 0, limit) for base in (self, other))
        return ours.shape == theirs.shape and torch.allclose(ours, theirs.to(ours), rtol=1e-4, atol=0.0)

    def adopt_precomputed(self, other: FrozenBase) -> None:
        """Copy the cache of what methods precomputed from another base that shares these tensors."""
        self.watch()
        other.watch()
        with self._lock:
            for key, found in dict(other._precomputed).items():
                if key[0] not in self.tree.written:
                    self._precomputed.setdefault(key, found)

    def fingerprint(self) -> dict[str, str]:
        """A hash of the base's names, shapes and dtypes, and one of its values, buffers included.

        Of the values about 1,024 evenly spaced elements of each tensor are hashed, so that the cost does not grow with the
        model: another training run is detected, a single changed element may not be.

        Returns:
            `{"structure": hex, "values": hex}`; values is empty for tensors on the meta device.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.weights, self.tree)
        return dict(self._fingerprint)

    def apply(self, function: Callable[[Tensor], Tensor]) -> FrozenBase:
        """The base with `function` applied to every tensor (a move, a cast), or itself where that changes nothing."""
        with torch.no_grad():
            weights = {name: weight.map(function) for name, weight in self.weights.items()}
            pairs = ((weight.leaves(), self.weights[name].leaves()) for name, weight in weights.items())
            if all(a is b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)):
                return self
            tree = self.tree.copy(function)
            for name, weight in weights.items():
                tree.bind(name, as_tensor(weight))
        return FrozenBase(tree, self.trainable)


def as_tensor(weight: Weight) -> Tensor:
    """The tensor to bind for a weight: a frozen parameter, or a slot."""
    if not isinstance(weight, Dense):
        return Slot.of(weight)
    tensor = weight.tensor
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, Slot) or isinstance(b, Slot):
        return isinstance(a, Slot) and isinstance(b, Slot) and a.weight is b.weight
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a is b or (a.is_meta and b.is_meta) or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
