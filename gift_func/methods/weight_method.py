"""Methods that change a weight: two pure functions, `init_tensors` and `weight`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..select import Site
from ..weights import Weight
from .method import Method

InitTensors = TypeVar("InitTensors", bound=Callable[..., dict[str, Tensor]])


class WeightMethod(Method, base=True):
    """A method whose sites are parameters: the adapted weight is a function of the parameter and of a few tensors.

    A subclass is a frozen dataclass that defines `init_tensors` and `weight`; everything else has a default.

    Attributes:
        frozen: names of the tensors of `init_tensors` that are saved but not trained.
    """

    frozen: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The adapter's tensors for one site, by their short names.

        An empty name stands for the parameter's own. Called without gradients, on the method that `for_site` returned.
        """

    @abstractmethod
    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        """The adapted weight: a pure function of the base's weight and of `init_tensors`, `shared_tensors` and `precompute`.

        It should only arrange the tensors and take views of them, and leave computing to the weight's own methods: a weight
        without computed tensors stays bound between calls, any other is made anew for each call.
        """

    def why_not(self, site: Site) -> str | None:
        return None if site.parameter.dtype.is_floating_point else "a floating-point parameter"

    def computed_weight_name(self, module: nn.Module) -> str | None:
        """The name of a weight that would be one of the method's usual sites if the module did not compute it."""
        return None

    def companions(self, site: Site) -> dict[str, WeightMethod]:
        """Other parameters of the site's module that are adapted along with it, by parameter name."""
        return {}

    def shared_tensors(self, sites: Sequence[Site], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Tensors that all sites of one rule share; they are stored once, under their own names, and not trained.

        Args:
            sites: all sites that the rule took.
        """
        return {}

    def precompute(self, base: Weight) -> dict[str, Tensor]:
        """Tensors that follow from the base's weight alone: computed once, cached with the base, not saved."""
        return {}

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Where the rank is: the axes of each tensor along which zeros may be appended without changing the weight.

        If all of them are extended by the same number, the zeros get no gradient either. So adapters of several ranks act
        as adapters of the largest, apart from `scaled_tensors`. Called on the method that `for_site` returned.

        Args:
            tensors: one adapter's tensors at the site, by their short names; only their shapes count.

        Returns:
            Short name -> axes, from 0; empty where another rank means more than zeros.
        """
        return {}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Which tensors the weight's scale s can be moved into, for a method with `rank_axes`: short names, each with s.

        Multiplying all of these tensors by a number multiplies s by it. So multiplied by s / s' they make the same weight
        under a method whose scale is s'.

        Args:
            tensors: one adapter's tensors at the site, by their short names; only the names count.
        """
        return {}


def by_shape(init_tensors: InitTensors) -> InitTensors:
    """Mark an `init_tensors` whose names, shapes and types depend on the method and the parameter's shape and type alone.

    Where no values are wanted it is then called once for all sites that are alike. An override of it is not marked.
    """
    vars(init_tensors)["by_shape"] = True
    return init_tensors
