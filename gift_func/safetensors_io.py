"""Reads a safetensors file into tensors of their own, with one copy of each byte.

The library maps a file, and a mapped tensor has yet to be copied before it may be written to: page faults and a second
pass, which together take longer than reading the bytes where they belong. What is at all unusual is left to the library.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LENGTH = 8
"""Bytes of the number that a file begins with: the bytes of its header."""

_WRITABLE = 0x200
_view: Callable[[int, int, int], memoryview] = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
)(("PyMemoryView_FromMemory", ctypes.pythonapi))

Read = tuple[dict[str, Tensor], dict[str, str]]


def mapped(path: Path) -> Read:
    """A file's tensors in the pages of the file, and its metadata.

    Raises:
        SafetensorError: if it is no safetensors file, or damaged.
        OSError: if it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def copied(path: Path) -> Read:
    """A file's tensors in memory of their own, and its metadata; raises as `mapped` does."""
    with open(path, "rb", buffering=0) as file:
        read = _read(file, path.stat().st_size) if sys.byteorder == "little" else None
    if read is not None:
        return read
    tensors, metadata = mapped(path)
    return {name: tensor.clone() for name, tensor in tensors.items()}, metadata


def _read(file: FileIO, size: int) -> Read | None:
    """The tensors and metadata of a file of so many bytes, or None if it is not just as the format has it."""
    length = int.from_bytes(file.read(_LENGTH), "little")
    size -= _LENGTH + length
    if size < 0:
        return None
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        # The data has neither gaps nor overlaps, so its order in the file is that of its reading.
        entries = sorted(header.items(), key=_begin)
        spans = [(name, entry["shape"], _TYPES[entry["dtype"]], *entry["data_offsets"]) for name, entry in entries]
        place = 0
        for _, shape, dtype, begin, end in spans:
            if begin != place or min(shape, default=0) < 0 or end - begin != prod(shape) * dtype.itemsize:
                return None
            place = end
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None
    if place != size:
        return None
    tensors = {name: torch.empty(shape, dtype=dtype, device="cpu") for name, shape, dtype, _, _ in spans}
    return (tensors, metadata) if all(_fill(tensor, file) for tensor in tensors.values()) else None


def _begin(item: tuple[str, Any]) -> Any:
    return item[1]["data_offsets"]


def _fill(tensor: Tensor, file: FileIO) -> bool:
    """Read a tensor's bytes from where the file stands; whether they were all there."""
    rest = _view(tensor.data_ptr(), tensor.nbytes, _WRITABLE)
    while rest:
        count = file.readinto(rest)
        if not count:
            return False
        rest = rest[count:]
    return True
