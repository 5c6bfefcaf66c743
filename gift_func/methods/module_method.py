"""Methods that add a small module to one of the network's, and change no weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from ..select import Site
from .method import Method


class AddedModule(nn.Module):
    """A module that was added to another one, its host, and changes the host's output."""

    @abstractmethod
    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The changed output: a forward hook of the host in the adapted model's private copy."""


class ModuleMethod(Method, base=True):
    """A method whose sites are modules: those that a rule selects and that lie in no other one it selects.

    A subclass is a frozen dataclass that defines `module`. The added module's parameters are the adapter's, under
    `<host>.<attribute>.<parameter>`; the names of the host's own parameters stay as they are.

    Attributes:
        attribute: the name of the added module in its host.
    """

    attribute: ClassVar[str]

    @abstractmethod
    def module(self, host: nn.Module) -> AddedModule:
        """The module to add, newly initialised from the global random state.

        Raises:
            AdaptError: if what is needed cannot be read from the host.
        """

    def is_default_site(self, site: Site) -> bool:
        return False

    def why_not(self, site: Site) -> str | None:
        return f"a host without a {self.attribute!r} of its own" if hasattr(site.module, self.attribute) else None

    def add_to(self, host: nn.Module) -> None:
        """Add the module to a host in a private copy."""
        added = self.module(host)
        like = next(host.parameters(), None)
        if like is not None:
            added.to(like.device, like.dtype)
        added.train(host.training)
        host.add_module(self.attribute, added)
        host.register_forward_hook(added.after)
