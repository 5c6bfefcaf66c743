"""The frozen base as something to call."""

from __future__ import annotations

from functools import cached_property, wraps
from types import MethodType
from typing import Any

from torch import Tensor

from .copy_pool import CopyPool
from .fast_path import FastPath
from .frozen_base import FrozenBase
from .module_tree import clone


class BaseView:
    """The frozen base without an adapter, in the training modes of an adapted model; any number of threads may call it.

    Args:
        like: the copies of the adapted model, whose base is run in their training modes.
    """

    def __init__(self, like: CopyPool) -> None:
        self._base = like.base
        self._like = like
        self._pool = CopyPool(like.base)

    def is_like(self, pool: CopyPool) -> bool:
        """Whether it runs the base of these copies, in their modes."""
        return self._like is pool and self._base is pool.base

    @cached_property
    def _fast_path(self) -> FastPath:
        return FastPath(self._base, self._pool.tree, ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module = self._pool.module
        self._update_modes()
        found = getattr(module, name)
        if not isinstance(found, MethodType) or found.__self__ is not module:
            new = self._new_buffers()
            for buffer_name, attribute, owner, _ in list(self._pool.tree.buffers()):
                owner._buffers[attribute] = new[buffer_name]
            return found

        @wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._run(name, *args, **kwargs)

        return call

    def __repr__(self) -> str:
        return f"frozen {self._base.tree.module!r}"

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        self._base.watch()
        self._update_modes()
        # Each call has copies of the base's buffers, so what a forward writes to them has no effect on later calls.
        return self._pool.run(
            method, args, kwargs, self._fast_path.bindings({}, ()), self._new_buffers(), private_buffers=False
        )

    def _new_buffers(self) -> dict[str, Tensor]:
        return {name: clone(buffer) for name, buffer in self._base.buffers().items()}

    def _update_modes(self) -> None:
        self._like.ready()
        like = self._like.tree.modules
        self._pool.set_modes(
            frozenset(name for name, module in self._pool.tree.modules.items()
                      if getattr(like.get(name), "training", module.training))
        )  # fmt: skip


def frozen_base_of(view: BaseView) -> FrozenBase:
    """The frozen base that a view calls."""
    return view._base
