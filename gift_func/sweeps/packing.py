"""Python values that contain tensors as JSON and a dict of tensors, which can be written to a safetensors file; and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_JSON_TYPES = (type(None), bool, int, float, str)


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A value as JSON; its tensors are added to `tensors`, under names that begin with `name`."""
    if type(value) in _JSON_TYPES:
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: numbers, texts, containers and tensors"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` was called with."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        found = getattr(torch, content)
        assert isinstance(found, torch.dtype)
        return found
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    return {key: unpack(item, tensors) for key, item in content}
