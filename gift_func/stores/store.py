"""The store: a bank whose adapters are files, of which those used last are in memory."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapt import base_of
from ..adapted_model import AdaptedModel
from ..banks.bank import AdapterBank
from ..banks.contiguous import side_by_side
from ..banks.plan import Batch, batch_by_name
from ..errors import AdaptError, FileError
from ..files import save_adapter
from ..network.base_view import BaseView
from ..network.frozen_base import FrozenBase
from .byte_cache import ByteBudgetCache, Loaded, StoreCounters
from .folder import Folder, stamp
from .reader import Read, Reader
from .serving import StoreRunner

ATTEMPTS = 5
"""How often a file is read that changes while it is read."""


OF_MODULES = frozenset({
    "train", "eval", "to", "parameters", "named_parameters", "state_dict", "load_state_dict", "requires_grad_",
    "trainable_parameters", "named_trainable_parameters", "adapter_state_dict", "load_adapter_state_dict", "summary", "merge",
})  # fmt: skip
"""What adapted models, ensembles and banks have, and a store has not."""


class AdapterStore(Mapping[str, AdaptedModel]):
    """A folder of adapter files with the calls of a bank, for more adapters than fit into memory.

    `store(x, adapters=["fr", None, "de"])` runs every sample with its own adapter in one pass, as `AdapterBank` does. An
    adapter's file is mapped into memory at its first use. If adapters need more bytes than the budget, the least recently
    used ones are dropped, but not while a call uses them. Each use asks the file system whether the file has changed, so
    the next use of a new, replaced or deleted file sees it, at a cost that does not depend on the number of files. A file
    that is missing, damaged or of another base is an error of that call only.

    The path of adapter `name` in the folder is the pattern with its `*` replaced by the name: `fr` is `fr.safetensors`, and
    `a/b` is `a/b.safetensors`. Hidden files and folders, whose names begin with a dot, are ignored.

    The network runs in eval mode, and the adapters require no grad. To train, use copies: `store[name]` is a model with its
    own tensors, in eval mode, and `store.bank(names)` a bank; `store.add(name, model, replace=True)` writes one back.

    Any number of threads may call, add, remove and evict at once. No lock is held while a network runs or a file is read,
    and a file that several threads ask for is read once.

    Args:
        model: the model the adapters were made for, or its frozen base; it is not changed.
        folder: the folder of the files.
        budget: how many bytes of tensors the store keeps in memory; None for no limit. Adapters that calls use come in
            addition, and an adapter larger than the budget is read for each call.
        pattern: the path of a file in the folder, with one `*` for the adapter's name.
        check_base: refuse files that were made for a base with other names, shapes, dtypes or values.
        mapped: leave tensors in the pages of the mapped file, which the system reads when they are used and shares between
            processes. Replace a mapped file only by moving another to its path, as `add` and `save_adapter` do: if it is
            overwritten (`cp`), the values change during calls. With False, files are copied when they are read.

    Raises:
        FileError: if there is no such folder.
        ValueError: if the budget is negative, or the pattern has not one `*`.

    Example:
        >>> import torch, gift_func as gf, tempfile
        >>> model = torch.nn.Linear(4, 2)
        >>> store = gf.AdapterStore(model, tempfile.mkdtemp(), budget=2**20)
        >>> store.add("fr", gf.adapt(model, gf.LoRA(rank=1)))
        >>> store.add("shared/de", gf.adapt(model, gf.IA3()))
        >>> store(torch.randn(3, 4), adapters=["fr", None, "shared/de"]).shape
        torch.Size([3, 2])
        >>> list(store), store.resident()
        (['fr', 'shared/de'], ('fr', 'shared/de'))
    """

    def __init__(
        self,
        model: nn.Module | FrozenBase | BaseView,
        folder: str | os.PathLike[str],
        *,
        budget: int | None = None,
        pattern: str = "*.safetensors",
        check_base: bool = True,
        mapped: bool = True,
    ) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"a budget is a whole number of bytes, at least 0, or None for any; got {budget!r}")
        self._files = Folder(folder, pattern)
        self.folder = Path(folder)
        base = base_of(model)
        self._runner = StoreRunner(base)
        self._reader = Reader(base, check_base=check_base, mapped=mapped)
        self._cache: ByteBudgetCache[Read] = ByteBudgetCache(budget)
        self._writing = threading.Lock()

    # --- as a mapping

    def __getitem__(self, name: str) -> AdaptedModel:
        """One adapter as a model in eval mode; its tensors are copies, which may be trained.

        Raises:
            KeyError: if there is no such file, with the nearest names.
            FileError: if the file is damaged or made for another base.
            AdaptError: if the name leads out of the folder.
        """
        return self._runner.model(self._read(name).copy())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        if name in OF_MODULES:
            raise AttributeError(
                f"a store has no {name}(): its adapters are files, which it serves in eval mode. store.bank(names) is a module "
                "of copies in memory, store[name] one adapter as a model; store.add(name, model, replace=True) writes one back"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        counted = self.counters
        kind = type(self._runner.base.tree.module).__name__
        budget = "" if self.budget is None else f" of {self.budget:,}"
        return (
            f"AdapterStore of {len(self):,} adapters on {kind} in {self.folder}: {counted.resident:,} in memory, "
            f"{counted.bytes:,}{budget} bytes"
        )

    # --- calls

    def __call__(self, *args: Any, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """The network on a batch, every sample with its own adapter: as a call of an `AdapterBank`, by names.

        Args:
            args: the network's arguments; tensors have the samples as leading axis.
            adapters: for each sample an adapter's name, or None for the base alone.
            kwargs: the network's keyword arguments.

        Raises:
            KeyError: if there is no file of that name, with the nearest names.
            FileError: if a file is damaged or made for another base.
            AdaptError: as by `AdapterBank`.
        """
        return self._runner.run(self._batch(adapters), args, kwargs)

    def generate(self, *args: Any, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """`generate` of a transformers model, with its key-value cache; see `AdapterBank.generate`."""
        return self._runner.run(self._batch(adapters), args, kwargs, method="generate")

    @property
    def base(self) -> BaseView:
        """The frozen base, without an adapter."""
        return self._runner.view

    def bank(self, names: Iterable[str]) -> AdapterBank:
        """A bank of copies of some adapters, in eval mode. They may be trained, and do not depend on the files.

        Raises:
            KeyError: if there is no file of one of the names, with the nearest.
            FileError: if a file is damaged or made for another base.
        """
        copies = {name: self._read(name).copy() for name in dict.fromkeys(names)}
        adapters = dict(zip(copies, side_by_side(list(copies.values())), strict=True))
        return AdapterBank.of(adapters, self._runner.base).eval()

    # --- files

    def names(self) -> tuple[str, ...]:
        """The names of all files in the folder, sorted."""
        return self._files.names()

    def path(self, name: str) -> Path:
        """The path of an adapter's file, which need not exist.

        Raises:
            AdaptError: if the name leads out of the folder.
        """
        return Path(self._files.path(name))

    def add(self, name: str, adapted: AdaptedModel, *, replace: bool = False) -> None:
        """Write an adapter to a file in the folder, atomically.

        Args:
            name: the adapter's name; missing folders are made.
            adapted: an adapted model on the store's base, or on a copy of it.
            replace: replace an adapter of that name, if there is one.

        Raises:
            AdaptError: if the name is taken or leads out of the folder; if the adapter has another base, or was made by
                actions that replaced modules, which cannot be saved. Nothing was written then.
        """
        path = self.path(name)
        if not isinstance(adapted, AdaptedModel):
            raise TypeError(f"a store holds adapted models, and {name!r} is a {type(adapted).__name__}; adapt() makes one")
        if adapted.strategy is None:
            raise AdaptError(f"{name!r} was made by actions that replaced modules, so no file can say how it is built")
        if adapted.frozen_base.fingerprint() != self._runner.base.fingerprint():
            raise AdaptError(
                f"{name!r} was adapted from another model than the store's. Adapt the same model, or a copy of it."
            )
        self._check_free(name, path, replace)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        try:
            save_adapter(adapted, beside)
            with self._writing:
                self._check_free(name, path, replace)
                os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete an adapter's file.

        Raises:
            KeyError: if there is none, with the nearest names.
            AdaptError: if the name leads out of the folder.
        """
        path = self._files.path(name)
        try:
            os.unlink(path)
        except OSError as error:
            if stamp(path) is not None:
                raise FileError(f"{path} cannot be deleted: {error}") from None
            raise self._files.missing(name) from None
        finally:
            self._cache.drop(name)

    # --- memory

    @property
    def budget(self) -> int | None:
        """How many bytes of tensors the store keeps in memory; None for no limit."""
        return self._cache.budget

    @property
    def counters(self) -> StoreCounters:
        """The counts of hits, misses and evictions, and of adapters and bytes in memory."""
        return self._cache.counters()

    def resident(self) -> tuple[str, ...]:
        """The names of the adapters in memory, the most recently used last."""
        return self._cache.names()

    def evict(self, name: str) -> bool:
        """Drop an adapter from memory, but not its file; return whether it was in memory."""
        return self._cache.drop(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Read adapters now, so that they are in memory for the next call.

        Raises:
            KeyError: if there is no file of one of the names, with the nearest.
            FileError: if a file is damaged or made for another base.
        """
        for name in names:
            self._read(name).touch()

    # --- inside

    def _batch(self, adapters: Sequence[str | None]) -> Batch:
        if isinstance(adapters, (str, Tensor)):
            raise TypeError(f"adapters is a sequence with one name for each sample, got {adapters!r}")
        return batch_by_name(adapters, {name: self._read(name).adapter for name in dict.fromkeys(adapters) if name is not None})

    def _read(self, name: str) -> Read:
        path = self._files.path(name)
        now = stamp(path)
        if now is None:
            self._cache.drop(name)
            raise self._files.missing(name)
        return self._cache.get(name, now, partial(self._load, name, path))

    def _load(self, name: str, path: str) -> Loaded[Read]:
        """Read a file; if it was replaced meanwhile, read it again."""
        for _ in range(ATTEMPTS):
            before = stamp(path)
            if before is None:
                raise self._files.missing(name)
            failed: FileError | None = None
            try:
                made = self._reader.read(path)
            except FileError as error:
                failed = error
            if stamp(path) == before:
                if failed is not None:
                    raise failed
                return Loaded(made, before, made.size)
        raise FileError(f"{path} changed each of the {ATTEMPTS} times it was read")

    def _check_free(self, name: str, path: Path, replace: bool) -> None:
        if not replace and os.path.lexists(path):
            raise AdaptError(f"the store has an adapter {name!r} already; remove it first, or add it with replace=True")
