"""The fingerprint of a base: hashes of its names, shapes and dtypes, and of samples of its values."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..weights import Weight
from .module_tree import ModuleTree

SAMPLE = 1024
"""How many elements of each tensor are hashed, about."""


def fingerprint(weights: Mapping[str, Weight], tree: ModuleTree) -> dict[str, str]:
    """`{"structure": hex, "values": hex}` of a network's weights and persistent buffers; see `FrozenBase.fingerprint`."""
    lines, leaves = [], []
    for name, weight in sorted(weights.items()):
        lines.append(f"{name}:{tuple(weight.shape)}:{weight.dtype}\n")
        leaves.extend(weight.leaves())
    empty = any(tensor.is_meta for tensor in leaves)
    values = hashlib.sha256()
    for sample in samples(tensor for tensor in leaves if not tensor.is_meta):
        values.update(sample)
    for name, attribute, module, buffer in tree.buffers():
        if attribute not in module._non_persistent_buffers_set and not buffer.is_meta:
            values.update(name.encode())
            for sample in samples([buffer]):
                values.update(sample)
    structure = hashlib.sha256("".join(lines).encode())
    return {"structure": structure.hexdigest(), "values": "" if empty else values.hexdigest()}


def samples(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """The bytes of up to about `SAMPLE` evenly spaced elements of each tensor, in their order."""
    with torch.no_grad():
        alike: list[Tensor] = []
        for tensor in tensors:
            size = tensor.numel()
            step = max(1, size // SAMPLE)
            is_plain = type(tensor) in (nn.Parameter, Tensor)
            if is_plain and tensor.is_contiguous():
                picked = tensor.as_strided((-(-size // step),), (step,))
            else:
                picked = tensor.detach().reshape(-1)[::step]
            # Neighbours are gathered by one operation: a network has hundreds of tensors, most of them alike.
            if alike and (picked.dtype is not alike[0].dtype or picked.device != alike[0].device or not is_plain):
                yield _bytes(torch.cat(alike))
                alike = []
            if is_plain:
                alike.append(picked)
            elif picked.numel():
                yield bytes(picked.to("cpu").contiguous().view(torch.uint8).tolist())
        if alike:
            yield _bytes(torch.cat(alike))


def _bytes(tensor: Tensor) -> bytes:
    here = tensor.to("cpu")
    return ctypes.string_at(here.data_ptr(), here.numel() * here.element_size()) if here.numel() else b""
