"""Reads and writes safetensors files; no other file of the package does."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import AdaptError, FileError

_LENGTH = 8
"""Bytes of the number that a file begins with: the bytes of its header."""

Contents = tuple[dict[str, Tensor], dict[str, str]]
"""A file's tensors by name, and its metadata."""


def read(path: Path, *, copy: bool = False) -> Contents:
    """The tensors and the metadata of a file.

    Args:
        path: the file.
        copy: read the tensors into memory of their own, which may be written to; otherwise the file is mapped.

    Raises:
        FileError: if it is missing, damaged or no safetensors file.
    """
    with _as_file_errors(path):
        found = _read_directly(path) if copy else None
        if found is not None:
            return found
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {name: tensor.clone() for name, tensor in tensors.items()} if copy else tensors, file.metadata() or {}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, of which only the header is read; raises as `read` does."""
    with _as_file_errors(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def _as_file_errors(path: Path) -> Iterator[None]:
    """Check that a file is there, and raise what reading it raises as `FileError`."""
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged or is no safetensors file: {error}") from None


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A file's bytes.

    Args:
        tensors: by name. Those that share memory with one before them are copied, since the format has no aliases.
        metadata: at most one entry; the library writes several in no fixed order, and `with_metadata` in the given one.

    Raises:
        AdaptError: if a tensor is on the meta device.
    """
    seen: set[int] = set()
    written = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise AdaptError(f"{name!r} is on the meta device and has no values to save")
        written[name] = tensor.detach().contiguous()
        pointer = written[name].untyped_storage().data_ptr()
        if pointer in seen:
            written[name] = written[name].clone()
        seen.add(pointer)
    return save(written, metadata)


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file without metadata, with some added in the order in which it is given."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.dumps({"__metadata__": dict(metadata), **json.loads(data[_LENGTH:end])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(_LENGTH, "little") + header + data[end:]


def without_header(data: bytes) -> memoryview:
    """The bytes of a file's tensors."""
    return memoryview(data)[_LENGTH + int.from_bytes(data[:_LENGTH], "little") :]


def write(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# The rest of this file is `_read_directly`, which `read` can do without. It reads each tensor's bytes into its memory. The
# library maps the file, and copying mapped tensors costs page faults and a second pass over the bytes.

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_WRITABLE = 0x200
_view: Callable[[int, int, int], memoryview] = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
)(("PyMemoryView_FromMemory", ctypes.pythonapi))


def _read_directly(path: Path) -> Contents | None:
    """A file's tensors in memory of their own, and its metadata; None for a file that is in any way unusual or damaged."""
    if sys.byteorder != "little":
        return None
    with open(path, "rb", buffering=0) as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        size = path.stat().st_size - _LENGTH - length
        if size < 0:
            return None
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            # The data has neither gaps nor overlaps, so the tensors can be read in the order of their offsets.
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
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


def _fill(tensor: Tensor, file: FileIO) -> bool:
    """Read a tensor's bytes from the file's position on; False if the file ends before."""
    left = _view(tensor.data_ptr(), tensor.nbytes, _WRITABLE)
    while left:
        count = file.readinto(left)
        if not count:
            return False
        left = left[count:]
    return True
