"""What a method is: a frozen dataclass and two pure functions, `init_tensors` and `weight`."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import AdaptError, nearest
from ..select import Site, qualified
from ..weights import Weight
from .settings import FrozenMap, first_match

Kind = TypeVar("Kind", bound="Method")
Value = TypeVar("Value")
Init = TypeVar("Init", bound=Callable[..., dict[str, Tensor]])


class Method(ABC):
    """A way to change a parameter by few tensors. Subclasses are frozen dataclasses.

    A subclass defines `init_tensors` and `weight`; everything else has a default.

    A field with `init=False` is set by `for_site`, and is not written as data.

    Attributes:
        frozen: names of the tensors of `init` that are kept and saved but not trained.
    """

    frozen: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name in _patterns(type(self)):
            object.__setattr__(self, name, FrozenMap(getattr(self, name)))

    @abstractmethod
    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The adapter's tensors for one site, by their short names.

        An empty name stands for the parameter's own. Called without gradients, on the method that `for_site` returned.
        """

    @abstractmethod
    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        """The changed weight: a pure function of the base's weight and the tensors of `init_tensors`, `common` and `derive`.

        It should only arrange tensors and view them, and leave what is to be computed to the weight's own methods: a
        weight that holds nothing computed rests in the network between calls, any other is made anew for each.
        """

    @property
    def starts_as_base(self) -> bool:
        """Whether an adapted model computes what its base does until it is trained."""
        return True

    def is_default_site(self, site: Site) -> bool:
        """Whether the site is one of the method's usual ones, taken where nothing else was said."""
        return self.why_not(site) is None

    def why_not(self, site: Site) -> str | None:
        """What is missing for the method to adapt the site, or None if it can."""
        return None if site.parameter.dtype.is_floating_point else "a floating-point parameter"

    def computed_weight_name(self, module: nn.Module) -> str | None:
        """A weight that would be one of the method's usual ones if the module did not compute it, by its name."""
        return None

    def for_site(self, site: Site) -> Self:
        """The method as it applies to one site: patterns looked up, choices made.

        A field `x` with a field `x_pattern` beside it takes the value of the pattern's first hit.
        """
        here: dict[str, Any] = {}
        for name in _patterns(type(self)):
            if getattr(self, name):
                option = name.removesuffix("_pattern")
                here[option] = first_match(getattr(self, name), site.module_name, getattr(self, option))
                here[name] = FrozenMap()
        return self.replace(**here) if here else self

    def shared_tensors(self, sites: Sequence[Site], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Tensors that all sites of one rule share; they are kept once, under their own names, and not trained.

        Args:
            sites: all sites that the rule took.
        """
        return {}

    def precompute(self, base: Weight) -> dict[str, Tensor]:
        """Tensors that follow from the base's weight alone: computed once, kept with the base, not saved."""
        return {}

    def companions(self, site: Site) -> dict[str, Method]:
        """Other parameters of the site's module that are adapted along with it, by parameter name."""
        return {}

    def rank_axes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Where the rank is: the axes of each tensor along which zeros may follow without changing the weight.

        With all of them longer by the same number, the zeros get no gradient either: so adapters of several ranks act as
        one of the largest, apart from `scaled_tensors`. Asked of the method that `for_site` returned.

        Args:
            tensors: one adapter's tensors at the site, by their short names; only their shapes count.

        Returns:
            Short name -> axes, from 0; nothing where another rank is more than zeros.
        """
        return {}

    def scaled_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """What the weight's scale depends on, for a method with `rank_axes`: short names, each with the scale s.

        Multiplying all of these tensors by a number is multiplying s by it. So they carry over to a method whose s is s':
        multiplied by s / s', they make the same weight.

        Args:
            tensors: one adapter's tensors at the site, by their short names; only the names count.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data (JSON): the constructor's arguments, without those at their default."""
        data: dict[str, Any] = {"method": type(self).__name__}
        for item in fields(cast(Any, self)):
            if not item.init:
                continue
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if value != default:
                data[item.name] = _plain(value)
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Method:
        """Read back what `to_dict` wrote. Only classes that are already defined are found; nothing is imported.

        Raises:
            AdaptError: for an unknown method or an unknown field.
        """
        known = {kind.__name__: kind for kind in _subclasses() if not inspect.isabstract(kind)}
        name = data.get("method")
        if name not in known:
            raise AdaptError(f"there is no method {name!r}; {nearest(str(name), known)}")
        kind = known[name]
        every = [item for item in fields(cast(Any, kind)) if item.init]
        allowed = [item.name for item in every]
        values = {key: value for key, value in data.items() if key != "method"}
        unknown = sorted(values.keys() - set(allowed))
        if unknown:
            raise AdaptError(f"{name} has no field {unknown[0]!r}; {nearest(unknown[0], allowed)}")
        for key, value in values.items():
            if isinstance(value, str) and value.startswith("torch."):
                values[key] = getattr(torch, value.removeprefix("torch."), None)
                if not isinstance(values[key], torch.dtype):
                    raise AdaptError(f"{name} wants an element type as {key!r}, and {value!r} is none")
        try:
            return kind(**values)
        except (TypeError, AttributeError) as error:
            raise AdaptError(f"{name} cannot be made from {values}: {error}") from None

    def __str__(self) -> str:
        """The method as it would be written: what stands at its default is left out."""
        parts = [f"{key}={value!r}" for key, value in self.to_dict().items() if key != "method"]
        return f"{type(self).__name__}({', '.join(parts)})"

    def replace(self, **changes: Any) -> Self:
        """The same method with some fields changed."""
        made = copy.copy(self)  # which knows classes with slots
        for name, value in changes.items():
            object.__setattr__(made, name, value)
        return made


def by_shape(init: Init) -> Init:
    """Mark an `init_tensors` whose names, shapes and types follow from the method and the parameter's shape and type alone.

    Where no values are wanted, places that are alike are then asked about once.
    """
    vars(init)["by_shape"] = True
    return init


def is_by_shape(method: Method) -> bool:
    """Whether the method's `init` is marked so; another one that a subclass defines is not."""
    return getattr(type(method).init_tensors, "by_shape", False)


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether the module is of a class named so or of a subclass, without importing where the class comes from."""
    return any(qualified(kind) in names for kind in type(module).__mro__)


def is_computed(module: nn.Module, param_name: str) -> bool:
    """Whether the module computes this weight (weight_norm, spectral_norm, parametrize) and owns no such parameter."""
    if param_name in module._parameters:
        return False
    parametrized = nn.utils.parametrize.is_parametrized(module, param_name)
    return parametrized or isinstance(module.__dict__.get(param_name), Tensor)


@cache
def _patterns(kind: Any) -> list[str]:
    return [item.name for item in fields(kind) if item.name.endswith("_pattern")]


def _subclasses(kind: Any = Method) -> Iterator[type[Method]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
