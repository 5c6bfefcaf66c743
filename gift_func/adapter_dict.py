"""The adapter: a ParameterDict under global names, which is also a module tree of the base's shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import StateError, nearest
from .network.module_tree import Buffers, join, named

_HOLDERS = {name: type(value) for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}


class Node(nn.Module):
    """One step of a dotted name.

    An adapter has as many as the network has modules, and hardly ever a hook on one, so what a module has for hooks is made
    when it is first looked at: 12 of its 16 dictionaries.
    """

    def __init__(self) -> None:
        vars(self).update(training=True, _parameters={}, _buffers={}, _modules={})

    def __getattr__(self, name: str) -> Any:
        kind = _HOLDERS.get(name)
        if kind is not None:
            return vars(self).setdefault(name, kind())
        if name in _PLAIN:
            return _PLAIN[name]
        return super().__getattr__(name)


class NameSpace(Node):
    """A node whose tensors and children go by names with dots in them."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, [], error_msgs)
        own = self._parameters.keys() | self._buffers.keys()
        if strict:
            rest = [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in own]
            inner = tuple(f"{prefix}{name}." for name in self._modules)
            unexpected_keys.extend(key for key in rest if not key.startswith(inner))


_PLAIN = {name: value for name, value in vars(nn.Module()).items() if name not in _HOLDERS}


class AdapterDict(nn.ParameterDict):
    """`nn.ParameterDict` with dotted global names: `adapter["layers.0.lora_A"]`.

    The names are fixed, the tensors under them may be exchanged. As a module it is a tree (`layers` -> `0` ->
    `lora_A`), so `named_parameters`, `state_dict`, `torch.func.functional_call` and `stack_module_state` take it as
    they take any module. The tree also holds the private buffers of the adapted network, which are the same
    dictionaries as in the network's private copy.

    Args:
        tensors: global name -> parameter.
        held: the network's buffers, as `ModuleTree.held` gives them, which go along.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], held: Mapping[str, Buffers]) -> None:
        super().__init__()
        self._places: dict[str, tuple[dict[str, nn.Parameter | None], str]] = {}
        self.tree_names: dict[str, str] = {}
        self._held = held
        nodes: dict[str, nn.Module] = {"": self}
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            parameters = _node(nodes, path)._parameters
            parameters[attribute] = tensor
            self._keys[name] = None
            self._places[name] = parameters, attribute
            step = name.partition(".")[0]
            self.tree_names[join(_tree_path(path), attribute) if path and step in _TAKEN else name] = name
        for path, (buffers, non_persistent) in held.items():
            vars(_node(nodes, path)).update(_buffers=buffers, _non_persistent_buffers_set=non_persistent)

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
        """The tensors that stand in the tree now, under their global names."""
        found = {}
        for name, (parameters, attribute) in self._places.items():
            found[name] = parameters[attribute]
        return found  # type: ignore[return-value]

    def buffer_names(self) -> set[str]:
        """The dotted names of the network's buffers."""
        return set(named(self._held))

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self._keys))

    def extra_repr(self) -> str:
        return "\n".join(f"({name}): {tuple(tensor.shape)}" for name, tensor in self.items())

    def __repr__(self) -> str:
        inner = self.extra_repr().replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {inner}\n)"


def _node(nodes: dict[str, nn.Module], path: str) -> nn.Module:
    """The node of a path, made if it is not there, with those above it."""
    found = nodes.get(path)
    if found is None:
        above, _, step = path.rpartition(".")
        parent = nodes[""] if not above else _node(nodes, above)
        found = nodes[path] = parent._modules[step if above else _tree_path(step)] = Node()
    return found


_TAKEN = frozenset(dir(nn.ParameterDict)) | {"buffer_names", "current", "tree_names"}


def _tree_path(path: str) -> str:
    """The path in the tree: a first step that is the name of a dictionary's method ("keys") is set off by "_"."""
    step, dot, rest = path.partition(".")
    return f"{step}_{dot}{rest}" if step in _TAKEN else path
