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

READINGS = 5
"""How often a file that changes while it is read is read again."""


class AdapterStore(Mapping[str, AdaptedModel]):
    """A folder of adapter files that is called as a bank is: for more adapters than memory holds.

    `store(x, adapters=["fr", None, "de"])` runs every sample with its own adapter in one pass, as `AdapterBank` does. An
    adapter's file is mapped into memory when it is first used; adapters are kept up to a number of bytes, and those not
    used for longest are dropped, though never from under a call: what a call uses lives until it ends. Every use asks the
    file system whether the file is still the same, so a new, replaced or deleted file counts from the next use on, and
    costs do not grow with the number of files. A file that is missing, damaged or of another base fails that call alone.

    The path of adapter `name` in the folder is the pattern with its `*` replaced by the name: `fr` is `fr.safetensors`, and
    `a/b` is `a/b.safetensors`. Hidden files and folders, whose names begin with a dot, are passed over.

    A store serves, so its network runs in eval mode and its adapters require no grad. What is to be trained is a copy:
    `store[name]` is a model with tensors of its own, as `load_adapter` gives it but in eval mode, and `store.bank(names)` a
    bank of copies; `store.add(name, model, replace=True)` writes one back.

    Any number of threads may call, add, remove and evict at once; no lock is held while a network runs or a file is read,
    and a file that several threads ask for is read once.

    Args:
        model: the model the adapters were made for, or its frozen base; it is not touched.
        folder: where the files are.
        budget: how many bytes of tensors the store keeps; None keeps all that were used. Calls under way come on top, and
            an adapter larger than the budget is read for each call.
        pattern: the files' names, with one `*` for the adapter's.
        check_base: refuse files that were made for a base of other names, shapes, types or values.
        mapped: let tensors lie in the files' pages, which the system reads when they are touched and shares between
            processes. A mapped file must be replaced as `add` and `save_adapter` do it, by moving another in its place: one
            that is overwritten in place (`cp`) changes under the calls that use it. With False it is copied when it is read.

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
        """One adapter as a model of its own, in eval mode: its tensors are copies, which may be trained.

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
        """The network on a batch, every sample with its own adapter.

        Args:
            args: the network's arguments; tensors have the samples as leading axis.
            adapters: for each sample an adapter's name, or None for the base alone.
            kwargs: the network's keyword arguments.

        Returns:
            What the network returns, its samples in the order given.

        Raises:
            KeyError: if there is no file of that name, with the nearest names.
            FileError: if a file is damaged or made for another base.
            AdaptError: if there are not as many names as samples, or the samples cannot be told apart at a weight.
        """
        return self._runner.run(self._batch(adapters), args, kwargs)

    def generate(self, *args: Any, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """`generate` of a transformers model on a batch, every sample with its own adapter, by its key-value cache.

        Args:
            args: as the model's `generate` takes them; tensors have the samples as leading axis.
            adapters: as of a call.
            kwargs: as the model's `generate` takes them.

        Raises:
            AttributeError: if the model has no `generate`.
        """
        return self._runner.run(self._batch(adapters), args, kwargs, method="generate")

    @property
    def base(self) -> BaseView:
        """The frozen base, unadapted."""
        return self._runner.view

    def bank(self, names: Iterable[str]) -> AdapterBank:
        """A bank of copies of some adapters, in eval mode: they stay, and train, whatever becomes of their files.

        Raises:
            KeyError: if there is no file of one of the names, with the nearest.
            FileError: if a file is damaged or made for another base.
        """
        found = {name: self._read(name).copy() for name in dict.fromkeys(names)}
        adapters = dict(zip(found, side_by_side(list(found.values())), strict=True))
        return AdapterBank.of(adapters, self._runner.base).eval()

    # --- files

    def names(self) -> tuple[str, ...]:
        """The names of all files that are in the folder now, in order."""
        return self._files.names()

    def path(self, name: str) -> Path:
        """The file of an adapter, whether or not there is one.

        Raises:
            AdaptError: if the name leads out of the folder.
        """
        return Path(self._files.path(name))

    def add(self, name: str, adapted: AdaptedModel, *, replace: bool = False) -> None:
        """Write an adapter into the folder; readers see all of it or nothing.

        Args:
            name: what it will be called; folders on the way are made.
            adapted: an adapted model on the store's base, or on a copy of it.
            replace: whether an adapter of that name may be there already, which is then replaced.

        Raises:
            AdaptError: if the name is taken or leads out of the folder; if the adapter has another base, or was made by
                actions that replaced modules, which no file can hold. Nothing was written then.
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
        """How many bytes the store keeps; None for any number."""
        return self._cache.budget

    @property
    def counters(self) -> StoreCounters:
        """Hits, misses and evictions so far, and how many adapters and bytes are in memory now."""
        return self._cache.counters()

    def resident(self) -> tuple[str, ...]:
        """The names of the adapters in memory, the most recently used last."""
        return self._cache.names()

    def evict(self, name: str) -> bool:
        """Drop an adapter from memory; its file stays. Whether it was there."""
        return self._cache.drop(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Read adapters now, so that the next call finds them in memory.

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
        """What the file held at one moment: a reading that another file's arrival cut in two is done again."""
        for _ in range(READINGS):
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
        raise FileError(f"{path} changed each of the {READINGS} times it was read")

    def _check_free(self, name: str, path: Path, replace: bool) -> None:
        if not replace and os.path.lexists(path):
            raise AdaptError(f"the store has an adapter {name!r} already; remove it first, or add it with replace=True")
