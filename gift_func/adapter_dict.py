"""An adapter's tensors as a `ParameterDict` under global names, and what the modules that have adapters share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import StateError, nearest
from .network.base_view import BaseView
from .network.copy_pool import CopyPool
from .network.frozen_base import FrozenBase
from .network.module_tree import ModuleBuffers, NamedTensors, join, named_buffers, persistent_buffers

_CONTAINER_TYPES = {name: type(value) for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
_SCALARS = {name: value for name, value in vars(nn.Module()).items() if name not in _CONTAINER_TYPES}


class Node(nn.Module):
    """One step of a dotted name.

    An adapter has as many as the network has modules, and hardly ever a hook on one, so the dictionaries for hooks, 12 of a
    module's 16, are made when they are first read.
    """

    def __init__(self) -> None:
        vars(self).update(training=True, _parameters={}, _buffers={}, _modules={})

    def __getattr__(self, name: str) -> Any:
        if name in _CONTAINER_TYPES:
            return vars(self).setdefault(name, _CONTAINER_TYPES[name]())
        if name in _SCALARS:
            return _SCALARS[name]
        return super().__getattr__(name)


class NameSpace(Node):
    """A node whose tensors and children go by names with dots in them."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: list[str], errors: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, [], errors)
        if strict:
            known = {prefix + name for name in (*self._parameters, *self._buffers)}
            children = tuple(f"{prefix}{name}." for name in self._modules)
            unexpected.extend(k for k in state_dict if k.startswith(prefix) and k not in known and not k.startswith(children))


class AdapterDict(nn.ParameterDict):
    """`nn.ParameterDict` with dotted global names: `adapter["layers.0.lora_A"]`.

    The names are fixed, the tensors under them may be replaced. As a module it is a tree (`layers` -> `0` -> `lora_A`), so
    `named_parameters`, `state_dict`, `torch.func.functional_call` and `stack_module_state` work as with any module. Its
    dictionaries of buffers are those of the network's main copy.

    Args:
        tensors: global name -> parameter.
        buffers: the network's buffers, as `ModuleTree.buffer_dicts` gives them.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], buffers: Mapping[str, ModuleBuffers]) -> None:
        super().__init__()
        self._places: dict[str, tuple[dict[str, nn.Parameter | None], str]] = {}
        self.tree_names: dict[str, str] = {}
        self._buffer_dicts = buffers
        nodes: dict[str, nn.Module] = {"": self}
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            parameters = _node(nodes, path)._parameters
            parameters[attribute] = tensor
            self._keys[name] = None
            self._places[name] = parameters, attribute
            step = name.partition(".")[0]
            self.tree_names[join(_tree_path(path), attribute) if path and step in _TAKEN else name] = name
        for path, (own, non_persistent) in buffers.items():
            vars(_node(nodes, path)).update(_buffers=own, _non_persistent_buffers_set=non_persistent)

    def __getitem__(self, key: str) -> Any:
        """The parameter under a global name.

        Raises:
            KeyError: with the nearest names.
        """
        try:
            parameters, attribute = self._places[key]
        except KeyError:
            raise KeyError(f"the adapter has no {key!r}; {nearest(key, self._places)}") from None
        return parameters[attribute]

    def __setitem__(self, key: str, parameter: Any) -> None:
        """Put another tensor of the same shape under a global name."""
        old = self[key]
        if not isinstance(parameter, Tensor) or parameter.shape != old.shape:
            given = tuple(parameter.shape) if isinstance(parameter, Tensor) else type(parameter).__name__
            raise StateError(f"{key!r} holds a tensor of shape {tuple(old.shape)}, got {given}")
        parameters, attribute = self._places[key]
        if not isinstance(parameter, nn.Parameter):
            parameter = nn.Parameter(parameter.detach(), requires_grad=old.requires_grad)
        parameters[attribute] = parameter

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"an adapter's names are fixed, so {key!r} cannot be removed; adapt the base by another strategy")

    def clear(self) -> None:
        raise TypeError("an adapter's names are fixed; adapt the base by another strategy")

    def copy(self) -> Any:
        """A plain dict of the parameters."""
        return dict(self.items())

    def current(self) -> dict[str, Tensor]:
        """The tensors in the tree under their global names, also those that `torch.func.functional_call` bound for a call."""
        return {name: parameters[attribute] for name, (parameters, attribute) in self._places.items()}  # type: ignore[misc]

    def buffer_names(self) -> set[str]:
        """The dotted names of the network's buffers."""
        return set(named_buffers(self._buffer_dicts))

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self._keys))

    def extra_repr(self) -> str:
        return "\n".join(f"({name}): {tuple(tensor.shape)}" for name, tensor in self.items())

    def __repr__(self) -> str:
        inner = self.extra_repr().replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {inner}\n)"


def _node(nodes: dict[str, nn.Module], path: str) -> nn.Module:
    """The node of a path; it and those above it are made if they do not exist."""
    found = nodes.get(path)
    if found is None:
        above, _, step = path.rpartition(".")
        parent = nodes[""] if not above else _node(nodes, above)
        found = nodes[path] = parent._modules[step if above else _tree_path(step)] = Node()
    return found


_TAKEN = frozenset(dir(nn.ParameterDict)) | {"buffer_names", "current", "tree_names"}


def _tree_path(path: str) -> str:
    """The path in the tree: "_" is appended to a first step that is the name of a dictionary's method, such as "keys"."""
    step, dot, rest = path.partition(".")
    return f"{step}_{dot}{rest}" if step in _TAKEN else path


class IncompatibleKeys(NamedTuple):
    """Names that a non-strict load left out: the adapter's that the state lacks, and the state's that it lacks."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdapterModule(nn.Module):
    """What adapted models, ensembles and banks have in common: modules whose parameters are exactly the adapters'.

    Attributes:
        adapter: the adapter's tensors under dotted global names, an `nn.ParameterDict`.
        copy_pool: the private copies of the network that calls run on.
    """

    adapter: AdapterDict
    copy_pool: CopyPool
    _view: BaseView | None = None

    @property
    def frozen_base(self) -> FrozenBase:
        """The frozen base, as `adapt` takes it for further adapters."""
        return self.copy_pool.base

    @property
    def base(self) -> BaseView:
        """The frozen base, without an adapter: `adapted.base(x)`."""
        if self._view is None or not self._view.is_like(self.copy_pool):
            self._view = BaseView(self.copy_pool)
        return self._view

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that require grad: pass them to an optimizer."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that require grad, with their global names; in a bank, `<adapter>.<global name>`."""
        return ((name, tensor) for name, tensor in self._named_tensors().items() if tensor.requires_grad)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """All tensors in which this module differs from its base, by the names of `named_trainable_parameters`, detached.

        Returns:
            The parameters, the methods' frozen tensors, and the persistent buffers that differ from the base's (such as the
            statistics of a BatchNorm in training). As in `state_dict`, they are no copies.
        """
        base = self._base_buffers()
        buffers = {n: b for n, b in self._saved_buffers().items() if n not in base or not is_equal(b, base[n])}
        return {name: tensor.detach() for name, tensor in {**self._named_tensors(), **buffers}.items()}

    def load_adapter_state_dict(self, state: NamedTensors, strict: bool = True) -> IncompatibleKeys:
        """Copy tensors into the parameters and buffers in place, so that optimizers keep them.

        Args:
            state: as `adapter_state_dict` returns it. With `strict`, buffers of the network that are not in it become the
                base's.
            strict: refuse missing and unknown names; otherwise leave them out and return them.

        Raises:
            StateError: before anything is written.
        """
        tensors, buffers = self._named_tensors(), self._saved_buffers()
        left_out = check_state(state, tensors, buffers, strict)
        default = self._base_buffers() if strict else {}
        with torch.no_grad():
            for name, tensor in {**buffers, **tensors}.items():
                source = state[name] if name in state else None if name in tensors else default.get(name)
                if source is not None:
                    tensor.copy_(source)
        return left_out

    def _named_tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.adapter.items())

    def _saved_buffers(self) -> dict[str, Tensor]:
        return persistent_buffers(self.copy_pool.buffers)

    def _base_buffers(self) -> dict[str, Tensor]:
        """The base's buffers, in the shapes of this module's."""
        return self.frozen_base.buffers()


def check_state(state: NamedTensors, adapter: NamedTensors, buffers: NamedTensors, strict: bool) -> IncompatibleKeys:
    """Raise `StateError` for a state that does not fit, before anything is done with it."""
    known = {**buffers, **adapter}
    missing = [name for name in adapter if name not in state]
    unexpected = [name for name in state if name not in known]
    if strict and missing:
        raise StateError(
            f"the state lacks {len(missing)} of the adapter's {len(adapter)} tensors, {missing[0]!r} first; in the "
            f"state {nearest(missing[0], state)}. Is it a state of another strategy?"
        )
    if strict and unexpected:
        raise StateError(f"the adapter has no {unexpected[0]!r}; {nearest(unexpected[0], known)}")
    for name, tensor in state.items():
        if name in known and tensor.shape != known[name].shape:
            raise StateError(
                f"{name!r} has shape {tuple(known[name].shape)} in this adapter and {tuple(tensor.shape)} in the state"
            )
    return IncompatibleKeys(missing, unexpected)


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and values; their devices may differ."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.to(a.device))))
