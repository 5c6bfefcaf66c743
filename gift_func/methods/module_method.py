"""Grafts: methods that add a small module to one of the network's, and change no weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdaptError
from ..select import Site
from ..weights import Weight
from .method import Method


class AddedModule(nn.Module):
    """What is grafted: a module that changes its host's output."""

    @abstractmethod
    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The changed output: a forward hook of the host in the adapted model's private copy."""


class ModuleMethod(Method):
    """A method whose sites are modules: those that a rule selects and that lie in no other one it selects.

    A subclass defines `scion`. The grafted module's parameters are the adapter's, under
    `<host>.<attribute>.<parameter>`; the names of the host's own parameters stay as they are.

    Attributes:
        attribute: the name of the grafted module in its host.
    """

    attribute: ClassVar[str]

    @abstractmethod
    def scion(self, host: nn.Module) -> AddedModule:
        """The module to graft, newly initialised from the global random state.

        Raises:
            AdaptError: if it cannot be told from the host what is needed.
        """

    def is_default_site(self, site: Site) -> bool:
        return False

    def why_not(self, site: Site) -> str | None:
        return f"a host without a {self.attribute!r} of its own" if hasattr(site.module, self.attribute) else None

    def graft(self, host: nn.Module) -> None:
        """Add the module to a host of a private copy."""
        scion = self.scion(host)
        like = next(host.parameters(), None)
        if like is not None:
            scion.to(like.device, like.dtype)
        scion.train(host.training)
        host.add_module(self.attribute, scion)
        host.register_forward_hook(scion.after)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        raise AdaptError(f"{self} adds a module and has no tensors for the parameter {site.name!r}")

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return base
