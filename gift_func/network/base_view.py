"""The frozen base as something to call."""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor

from .copy_pool import CopyPool
from .fast_path import FastPath
from .frozen_base import FrozenBase
from .module_tree import clone, named


class BaseView:
    """The frozen base, unadapted, in the training modes of an adapted model; any number of threads may call it.

    Args:
        base: the frozen base.
        like: the private copies of the model whose training modes it follows.
    """

    def __init__(self, base: FrozenBase, like: CopyPool) -> None:
        self._base = base
        self._like = like
        self._pool = CopyPool(base)
        self._fast_path = FastPath(base, base.tree, ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module = self._pool.module
        self._follow_modes()
        found = getattr(module, name)
        if not isinstance(found, MethodType) or found.__self__ is not module:
            for buffer_name, attribute, owner, _ in list(self._pool.tree.buffers()):
                owner._buffers[attribute] = self._pristine()[buffer_name]
            return found

        @wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._run(name, *args, **kwargs)

        return call

    def __repr__(self) -> str:
        return f"frozen {self._base.tree.module!r}"

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        self._base.watch()
        self._follow_modes()
        bindings = self._fast_path.bindings({}, ())
        # A frozen base keeps the buffers it came with, whatever a forward writes to them.
        with self._pool.checkout(bindings, self._pristine(), private_buffers=False) as (copy, call):
            return call.returns(getattr(copy.tree.module, method)(*args, **kwargs))

    def _pristine(self) -> dict[str, Tensor]:
        return {name: clone(buffer) for name, buffer in named(self._base.tree.held()).items()}

    def _follow_modes(self) -> None:
        like = self._like
        like.ready()
        self._pool.set_modes(
            frozenset(name for name, module in self._pool.tree.modules.items()
                      if getattr(like.tree.modules.get(name), "training", module.training))
        )  # fmt: skip


def frozen_base_of(view: BaseView) -> FrozenBase:
    """The frozen base that a view calls."""
    return view._base
