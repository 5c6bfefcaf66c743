"""The frozen base: a network's private structure and its tensors, shared by any number of adapters."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseChangedWarning, outside
from ..methods import WeightMethod
from ..select import Site
from ..weights import Dense, Slot, Weight
from .copy_tree import paths, walk
from .fast_path import fused_names, runs_fused
from .module_tree import ModuleTree, join

SAMPLE = 1024
"""Elements of each tensor that enter a fingerprint."""


class FrozenBase:
    """A network that no one trains: private modules around aliases of somebody's tensors.

    It never runs itself: adapted models and `BaseView`s run copies of its structure.

    Args:
        structure: a private copy of the network's structure, its tensors in place.
        trainable: names of the parameters that required grad in the user's model.
    """

    def __init__(self, structure: ModuleTree, trainable: frozenset[str] = frozenset()) -> None:
        self.structure = structure
        self.trainable = trainable
        self.tensors: dict[str, Tensor] = {name: structure.tensor(name) for name in structure.places}
        self.weights: dict[str, Weight] = {
            name: tensor.weight if isinstance(tensor, Slot) else Dense(tensor) for name, tensor in self.tensors.items()
        }
        self.slots = frozenset(name for name, tensor in self.tensors.items() if isinstance(tensor, Slot))
        self._watched = [
            (name, tensor)
            for name, tensor in self.tensors.items()
            if not isinstance(tensor, Slot) and not tensor.is_inference() and name not in structure.written
        ]
        self._versions = self._read_versions()
        self.epoch = 0
        self._derived: dict[tuple[str, WeightMethod], dict[str, Tensor]] = {}
        self._fingerprint: dict[str, str] | None = None
        # What the strategy that was read last makes of this base: its parts, and tensors of their shapes.
        self.plans: dict[Any, tuple[list[Any], dict[str, nn.Parameter]]] = {}
        self._lock = threading.Lock()

    @staticmethod
    def of(model: nn.Module) -> FrozenBase:
        """The frozen base of a user's model, which is only read.

        Raises:
            AdaptError: if the model's structure cannot be copied.
        """
        modules = walk(model)
        structure = ModuleTree.of(modules)
        trainable = set()
        for module_name, module in modules.items():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    trainable.add(join(module_name, attribute))
        return FrozenBase(structure, frozenset(trainable & structure.places.keys()))

    @cached_property
    def has_plain_modes(self) -> bool:
        """Whether setting the network's training mode sets just that, in every module."""
        modules = self.structure.modules.values()
        return all(type(module).train is nn.Module.train and "train" not in vars(module) for module in modules)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.structure.module, self.trainable)

    def sites(self, model: nn.Module | None = None) -> list[list[Site]]:
        """Every parameter of the base, as the sites it can be reached by: several where it is tied.

        Args:
            model: the user's model, whose own modules and parameters the sites then show to selectors.
        """
        root = self.structure.module if model is None else model
        modules = paths(root)
        groups = []
        for names in self.structure.names.values():
            group = []
            for name in names:
                module_name, _, param_name = name.rpartition(".")
                module = modules[module_name]
                parameter = module._parameters[param_name]
                assert parameter is not None
                group.append(Site(name, module_name, param_name, module, parameter))
            groups.append(group)
        return groups

    def derived(self, name: str, method: WeightMethod) -> dict[str, Tensor]:
        """What a method computes from a weight alone, computed once and kept with the base."""
        if type(method).precompute is WeightMethod.precompute:
            return {}
        with self._lock:
            found = self._derived.get((name, method))
            if found is None:
                with torch.no_grad():
                    found = {part: tensor.detach() for part, tensor in method.precompute(self.weights[name]).items()}
                self._derived[name, method] = found
            return found

    def watch(self) -> int:
        """Say so, once for each change, if the tensors were written to since they were frozen.

        Returns:
            How many times that happened so far.
        """
        found = self._read_versions()
        if found != self._versions:
            changed = [name for (name, _), was, now in zip(self._watched, self._versions, found, strict=True) if was != now]
            self._versions = found
            self.epoch += 1
            self._fingerprint = None
            with self._lock:
                for entry in [entry for entry in self._derived if entry[0] in changed]:
                    del self._derived[entry]
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
        """Whether the other base is made of the same tensors in the same places."""
        if self is other:
            return True
        if self.tensors.keys() != other.tensors.keys():
            return False
        return all(
            _same_memory(tensor, other.tensors[name])
            # What the network writes to itself is each base's own copy.
            or (name in self.structure.written & other.structure.written and self._written_alike(other, name))
            for name, tensor in self.tensors.items()
        )

    def _written_alike(self, other: FrozenBase, name: str) -> bool:
        """Whether an embedding's rows are the same to the norm that looking them up cuts them to."""
        module = self.structure.places[name][0][0]
        assert isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        assert module.max_norm is not None
        norm, most = module.norm_type, module.max_norm
        ours, theirs = (torch.renorm(base.tensors[name].detach(), norm, 0, most) for base in (self, other))
        return ours.shape == theirs.shape and torch.allclose(ours, theirs.to(ours), rtol=1e-4, atol=0.0)

    def adopt_derived(self, other: FrozenBase) -> None:
        """Take over what methods derived from these very tensors through another base that shares them."""
        self.watch()
        other.watch()
        with self._lock:
            for key, found in dict(other._derived).items():
                if key[0] not in self.structure.written:
                    self._derived.setdefault(key, found)

    def fingerprint(self) -> dict[str, str]:
        """What identifies the base: a hash of its names, shapes and types, and one of its values, buffers included.

        The values are sampled, up to 1,024 evenly spaced elements of each tensor, so that the cost does not grow with the
        model: another training run is noticed, a single changed element may not be.

        Returns:
            `{"structure": hex, "values": hex}`; values is empty where the tensors hold none (meta device).
        """
        if self._fingerprint is None:
            lines, leaves = [], []
            for name, weight in sorted(self.weights.items()):
                lines.append(f"{name}:{tuple(weight.shape)}:{weight.dtype}\n")
                leaves.extend(weight.leaves())
            empty = any(tensor.is_meta for tensor in leaves)
            values = hashlib.sha256()
            for sample in samples(tensor for tensor in leaves if not tensor.is_meta):
                values.update(sample)
            for name, attribute, module, buffer in self.structure.buffers():
                if attribute not in module._non_persistent_buffers_set and not buffer.is_meta:
                    values.update(name.encode())
                    for sample in samples([buffer]):
                        values.update(sample)
            structure = hashlib.sha256("".join(lines).encode())
            self._fingerprint = {"structure": structure.hexdigest(), "values": "" if empty else values.hexdigest()}
        return dict(self._fingerprint)

    def apply(self, function: Callable[[Tensor], Tensor]) -> FrozenBase:
        """The base with `function` applied to every tensor (a move, a cast), or itself where that changes nothing."""
        with torch.no_grad():
            made = {name: weight.map(function) for name, weight in self.weights.items()}
            same = all(
                a is b
                for name, weight in made.items()
                for a, b in zip(weight.leaves(), self.weights[name].leaves(), strict=True)
            )
            if same:
                return self
            structure = self.structure.copy(function)
            for name, weight in made.items():
                structure.bind(name, as_tensor(weight))
        return FrozenBase(structure, self.trainable)


class BaseView:
    """The frozen base, unadapted, in the modes (training or not) of an adapted model's body."""

    def __init__(self, base: FrozenBase, body: ModuleTree) -> None:
        self._frozen = base
        self._body = body
        self._copy = base.structure.copy()
        self._fused = fused_names(self._copy, base.slots)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward."""
        module = self._ready()
        fused = runs_fused(self._copy, ())
        for name in self._fused:
            self._copy.bind(name, self._frozen.weights[name].dense() if fused else self._frozen.tensors[name])
        return module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._ready(), name)

    def __repr__(self) -> str:
        return f"frozen {self._copy.module!r}"

    def _ready(self) -> nn.Module:
        self._frozen.watch()
        for name, module in self._copy.modules.items():
            module.training = getattr(self._body.modules.get(name), "training", module.training)
        # A frozen base keeps the buffers it came with, whatever a forward writes to them.
        pristine = {name: buffer for name, _, _, buffer in self._frozen.structure.buffers()}
        for name, attribute, module, _ in list(self._copy.buffers()):
            if name in pristine:
                module._buffers[attribute] = pristine[name].clone()
        return self._copy.module


def as_tensor(weight: Weight) -> Tensor:
    """What stands in a parameter's place for a weight: the tensor itself, or a slot."""
    if not isinstance(weight, Dense):
        return Slot.of(weight)
    tensor = weight.tensor
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def _rebuild(module: nn.Module, trainable: frozenset[str]) -> FrozenBase:
    return FrozenBase(ModuleTree(module), trainable)


def samples(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """The bytes of up to about `SAMPLE` evenly spaced elements of each tensor, in their order."""
    with torch.no_grad():
        run: list[Tensor] = []
        for tensor in tensors:
            size = tensor.numel()
            step = max(1, size // SAMPLE)
            if _is_plain(tensor) and tensor.is_contiguous():
                picked = tensor.as_strided((-(-size // step),), (step,))
            else:
                picked = tensor.detach().reshape(-1)[::step]
            # Neighbours are gathered by one operation: a network has hundreds of tensors, most of them alike.
            if run and (picked.dtype is not run[0].dtype or picked.device != run[0].device or not _is_plain(tensor)):
                yield _bytes(torch.cat(run))
                run = []
            if _is_plain(tensor):
                run.append(picked)
            elif picked.numel():
                yield bytes(picked.to("cpu").contiguous().view(torch.uint8).tolist())
        if run:
            yield _bytes(torch.cat(run))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def _bytes(tensor: Tensor) -> bytes:
    here = tensor.to("cpu")
    return ctypes.string_at(here.data_ptr(), here.numel() * here.element_size()) if here.numel() else b""


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, Slot) or isinstance(b, Slot):
        return isinstance(a, Slot) and isinstance(b, Slot) and a.weight is b.weight
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a is b or (a.is_meta and b.is_meta) or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
