"""Adapter files: one safetensors file with an adapter's tensors, its strategy and its base's fingerprint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import safetensors_io
from .adapt import base_of, readapt
from .adapted_model import AdaptedModel
from .errors import FileError, StateError
from .methods import Method
from .network.base_view import BaseView
from .network.frozen_base import FrozenBase
from .strategy import Strategy

FILE_KEY = "gift_func"
FILE_VERSION = 1


def save_adapter(adapted: AdaptedModel, path: str | os.PathLike[str]) -> None:
    """Write an adapter to one safetensors file.

    The file contains `adapter_state_dict()`, the strategy as JSON and the base's fingerprint. It is written atomically: a
    reader sees the old file or the new one, never a part.

    Args:
        adapted: the adapted model. If actions of GIFt's protocol replaced modules, its strategy cannot be written as data and
            is left out; it must then be passed to `load_adapter`.
        path: the file, `*.safetensors` by convention.

    Raises:
        AdaptError: if a selector of the strategy is a Python function; nothing was written then.

    Example:
        >>> import torch, gift_func as gf, tempfile, os
        >>> model = torch.nn.Linear(4, 2)
        >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
        >>> gf.save_adapter(gf.adapt(model, gf.LoRA(rank=2)), path)
        >>> list(gf.load_adapter(model, path).adapter)
        ['lora_B', 'lora_A']
    """
    if not isinstance(adapted, AdaptedModel):
        raise TypeError(
            f"save_adapter takes an adapted model, got a {type(adapted).__name__}; of an ensemble save each ens[i], of a bank "
            "each bank[name], in a file of its own"
        )
    header = {
        "version": FILE_VERSION,
        "strategy": adapted.strategy and adapted.strategy.to_dict(),
        "base": adapted.frozen_base.fingerprint(),
    }
    safetensors_io.write(Path(path), safetensors_io.to_bytes(adapted.adapter_state_dict(), {FILE_KEY: json.dumps(header)}))


def load_adapter(
    model: nn.Module | FrozenBase | BaseView,
    path: str | os.PathLike[str],
    *,
    check_base: bool = True,
    strategy: Method | Mapping[str, Method] | Strategy | Iterable[Any] | None = None,
) -> AdaptedModel:
    """Read an adapter file onto a model. Nothing is unpickled, and nothing is imported by a name in the file.

    Args:
        model: the model the adapter was made for; it is not changed. On an `AdaptedModel` the adapter is put on top. To load
            many adapters of one base, pass a `FrozenBase` or the `base` of an adapted model, which is copied only once.
        path: a file of `save_adapter`.
        check_base: refuse a file that was made for a base with other names, shapes, dtypes or values.
        strategy: the strategy, for a file that has none because it could not be written as data.

    Returns:
        The adapted model, with the outputs that it had when it was saved, in the training mode of `model`.

    Raises:
        FileError: if the file is missing, truncated or no adapter file; if it was made for another base; if its tensors do
            not fit its strategy on this model.
        AdaptError: if the strategy does not fit the model.
    """
    base = base_of(model)
    tensors, rules = contents(base, path, check_base=check_base, strategy=strategy, owned=True)
    try:
        return readapt(base, rules, tensors, owned=True)
    except StateError as error:
        raise FileError(f"{os.fspath(path)} does not fit its strategy on this model: {error}") from None


def contents(
    base: FrozenBase, path: str | os.PathLike[str], *, check_base: bool = True, strategy: Any = None, owned: bool = False
) -> tuple[dict[str, Tensor], Any]:
    """The tensors of an adapter file, and its strategy.

    Args:
        base: the base that the adapter is for.
        path: the file.
        check_base: refuse a file that was made for another base.
        strategy: used instead of the file's own.
        owned: read the tensors into memory of their own; otherwise the file is mapped.

    Raises:
        FileError: if the file is missing, damaged or no adapter file, or made for another base.
    """
    tensors, header = _read(Path(path), owned)
    if strategy is None and header["strategy"] is None:
        raise FileError(
            f"{os.fspath(path)} was made by a strategy whose actions replaced modules, which no file can hold. Pass the same "
            "one: load_adapter(model, path, strategy=...)."
        )
    rules = Strategy.from_dict(header["strategy"]) if strategy is None else strategy
    if check_base:
        _check_fingerprint(header["base"], base.fingerprint(), path)
    return tensors, rules


def _check_fingerprint(saved: Mapping[str, str], found: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    hint = "Load it on the base it was made for, or pass check_base=False."
    if saved.get("structure") != found["structure"]:
        raise FileError(f"{os.fspath(path)} was made for another base: parameter names, shapes or element types differ. {hint}")
    if saved.get("values") and found["values"] and saved["values"] != found["values"]:
        raise FileError(f"{os.fspath(path)} was made for another base: names and shapes agree, the values differ. {hint}")


def _read(path: Path, owned: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = safetensors_io.read(path, copy=owned)
    if FILE_KEY not in metadata:
        raise FileError(f"{path} is a safetensors file, but not one of save_adapter")
    try:
        header = json.loads(metadata[FILE_KEY])
        version, _, _ = header["version"], header["strategy"], header["base"]["structure"]
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} has an unreadable header, so it was changed after it was saved: {error!r}") from None
    if version != FILE_VERSION:
        raise FileError(f"{path} has format version {version}, this release reads version {FILE_VERSION}")
    return tensors, header
