"""The base class of all methods: a frozen dataclass of options that can be written as data."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ..errors import AdaptError, nearest
from ..select import Site, qualified
from .options import FrozenMap, check_options, first_match, patterns


@dataclass(frozen=True)
class Method(ABC):
    """What a rule of a strategy does at its sites.

    There are two kinds, and a method of your own is a frozen dataclass that subclasses one of them: `WeightMethod` makes an
    adapted weight of a parameter and a few tensors, `ModuleMethod` adds a module to one of the network's.

    The fields are the options. Those whose names end in `dropout` must be probabilities, those annotated as a `Literal`
    one of its values, and a field `x_pattern` is a mapping from regular expressions, matched against the end of a module's
    name, to values of the field `x`. A field with `init=False` is set by `for_site` and is not written as data.

    Attributes:
        whole: names of the options that must be whole numbers of at least 1; those that default to None may be None.
    """

    whole: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, base: bool = False) -> None:
        super().__init_subclass__()
        if Method in cls.__bases__ and not base:
            raise TypeError(
                f"{cls.__name__} subclasses gf.Method itself: subclass gf.WeightMethod, whose init_tensors and weight change "
                "a parameter, or gf.ModuleMethod, whose module is added to one of the network's"
            )

    def __post_init__(self) -> None:
        for name in patterns(type(self)):
            object.__setattr__(self, name, FrozenMap(getattr(self, name)))
        check_options(self)

    @property
    def starts_as_base(self) -> bool:
        """Whether an adapted model computes what its base does until it is trained."""
        return True

    def is_default_site(self, site: Site) -> bool:
        """Whether the site is one of the method's usual ones, taken where nothing else was said."""
        return self.why_not(site) is None

    @abstractmethod
    def why_not(self, site: Site) -> str | None:
        """What is missing for the method to adapt the site, or None if it can."""

    def for_site(self, site: Site) -> Self:
        """The method as it applies to one site: patterns looked up, choices made.

        A field `x` with a field `x_pattern` beside it takes the value of the first pattern that matches.
        """
        here: dict[str, Any] = {}
        for name in patterns(type(self)):
            if getattr(self, name):
                option = name.removesuffix("_pattern")
                here[option] = first_match(getattr(self, name), site.module_name, getattr(self, option))
                here[name] = FrozenMap()
        return self.replace(**here) if here else self

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data (JSON): the constructor's arguments, without those at their default."""
        data: dict[str, Any] = {"method": type(self).__name__}
        for item in fields(self):
            if not item.init:
                continue
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if value != default:
                data[item.name] = _as_data(value)
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
        allowed = [item.name for item in fields(kind) if item.init]
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
        """The method as Python code, without the options that have their default."""
        parts = [f"{key}={value!r}" for key, value in self.to_dict().items() if key != "method"]
        return f"{type(self).__name__}({', '.join(parts)})"

    def replace(self, **changes: Any) -> Self:
        """The same method with some fields changed."""
        made = copy.copy(self)  # which knows classes with slots
        for name, value in changes.items():
            object.__setattr__(made, name, value)
        return made


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether the module is of a class named so or of a subclass, without importing where the class comes from."""
    return any(qualified(kind) in names for kind in type(module).__mro__)


def _subclasses(kind: Any = Method) -> Iterator[type[Method]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _as_data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_data(item) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_as_data(item) for item in value]
    return value
