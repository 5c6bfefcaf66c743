"""The adapter: a ParameterDict under global names, which is also a module tree of the base's shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import StateError, nearest
from .structure import Structure, join


class Node(nn.Module):
    """One step of a dotted name."""


class AdapterDict(nn.ParameterDict):
    """`nn.ParameterDict` with dotted global names: `adapter["layers.0.lora_A"]`.

    The names are fixed, the tensors under them may be exchanged. As a module it is a tree (`layers` -> `0` ->
    `lora_A`), so `named_parameters`, `state_dict`, `torch.func.functional_call` and `stack_module_state` take it as
    they take any module. The tree also holds the private buffers of the adapted network, which are the same
    dictionaries as in the network's private copy.

    Args:
        tensors: global name -> parameter.
        body: the private copy whose buffers go along.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], body: Structure) -> None:
        super().__init__()
        self._places: dict[str, tuple[dict[str, nn.Parameter | None], str]] = {}
        self._nodes: dict[str, nn.Module] = {"": self}
        self.tree_names: dict[str, str] = {}
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            node = self._node(path)
            node._parameters[attribute] = tensor
            self._keys[name] = None
            self._places[name] = node._parameters, attribute
            self.tree_names[join(_tree_path(path), attribute)] = name
        for module_name, module in body.modules.items():
            if module._buffers:
                node = self._node(module_name)
                node._buffers = module._buffers
                node._non_persistent_buffers_set = module._non_persistent_buffers_set

    def _node(self, path: str) -> nn.Module:
        if path not in self._nodes:
            above, _, step = path.rpartition(".")
            self._nodes[path] = self._node(above)._modules[_tree_path(step) if not above else step] = Node()
        return self._nodes[path]

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

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self._keys))

    def extra_repr(self) -> str:
        return "\n".join(f"({name}): {tuple(tensor.shape)}" for name, tensor in self.items())

    def __repr__(self) -> str:
        inner = self.extra_repr().replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {inner}\n)"


_TAKEN = frozenset(dir(nn.ParameterDict)) | {"current", "tree_names"}


def _tree_path(path: str) -> str:
    """The path in the tree: a first step that is the name of a dictionary's method ("keys") is set off by "_"."""
    step, dot, rest = path.partition(".")
    return f"{step}_{dot}{rest}" if step in _TAKEN else path
