"""Sites, which are parameters with their places in a model, and selectors of them, which compose with `&`, `|` and `~`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn

from .errors import AdaptError


@dataclass(frozen=True, eq=False)
class Site:
    """A parameter and its place in a model.

    Attributes:
        name: the parameter's dotted name, e.g. `"layers.0.weight"`.
        module_name: the dotted name of its module; empty for the model itself.
        param_name: its name in the module, e.g. `"weight"`.
        module: the module.
        parameter: the parameter.
    """

    name: str
    module_name: str
    param_name: str
    module: nn.Module
    parameter: Tensor


class Selector(ABC):
    """A function that says for every site whether it is selected, and that can be written as plain data."""

    @abstractmethod
    def __call__(self, site: Site) -> bool:
        """Whether the site is selected."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The selector as plain data, from which `from_dict` makes it again."""

    def __and__(self, other: Selector | Callable[[Site], bool]) -> Selector:
        return And(self, as_selector(other))

    def __rand__(self, other: Callable[[Site], bool]) -> Selector:
        return And(as_selector(other), self)

    def __or__(self, other: Selector | Callable[[Site], bool]) -> Selector:
        return Or(self, as_selector(other))

    def __ror__(self, other: Callable[[Site], bool]) -> Selector:
        return Or(as_selector(other), self)

    def __invert__(self) -> Selector:
        return Not(self)


@dataclass(frozen=True)
class _Pattern(Selector):
    """A selector by one string; `key` is its name in plain data."""

    pattern: str
    key: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        return {self.key: self.pattern}

    def __repr__(self) -> str:
        return f"{self.key}({self.pattern!r})"


@dataclass(frozen=True, repr=False)
class Name(_Pattern):
    """Select by a glob on the module's or the parameter's dotted name: `"*.q_proj"`, `"*.bias"` (`*` crosses dots)."""

    key = "name"

    def __call__(self, site: Site) -> bool:
        return fnmatchcase(site.name, self.pattern) or fnmatchcase(site.module_name, self.pattern)


@dataclass(frozen=True, repr=False)
class Regex(_Pattern):
    """Select by a regular expression that matches the whole of the module's or the parameter's dotted name."""

    key = "regex"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise AdaptError(f"regex({self.pattern!r}) is not a regular expression: {error}") from None

    def __call__(self, site: Site) -> bool:
        return any(re.fullmatch(self.pattern, name) for name in (site.name, site.module_name))


@dataclass(frozen=True, repr=False)
class ParameterName(_Pattern):
    """Select by a glob on the parameter's own name in its module: `"weight"`, `"bias"`, `"weight_ih_*"`."""

    key = "parameter"

    def __call__(self, site: Site) -> bool:
        return fnmatchcase(site.param_name, self.pattern)


@dataclass(frozen=True)
class Type(Selector):
    """Classes of modules, subclasses included, by qualified name, so that the selector is plain data."""

    classes: tuple[str, ...]

    def __call__(self, site: Site) -> bool:
        kind: Any = type(site.module)
        return _descends(kind, self.classes)

    def to_dict(self) -> dict[str, Any]:
        return {"type": list(self.classes)}

    def __repr__(self) -> str:
        return f"type_({', '.join(self.classes)})"


@dataclass(frozen=True)
class ByFunction(Selector):
    """Any function of a site, which cannot be written as data."""

    function: Callable[[Site], bool]

    def __call__(self, site: Site) -> bool:
        return bool(self.function(site))

    def to_dict(self) -> dict[str, Any]:
        raise AdaptError(
            f"the selector {self!r} is a Python function, which cannot be written as plain data. Use gf.select.name, "
            "regex, type_ or parameter and their combinations instead."
        )

    def __repr__(self) -> str:
        return f"<{getattr(self.function, '__qualname__', repr(self.function))}>"


@dataclass(frozen=True)
class And(Selector):
    """The sites that both selectors select."""

    left: Selector
    right: Selector

    def __call__(self, site: Site) -> bool:
        return self.left(site) and self.right(site)

    def to_dict(self) -> dict[str, Any]:
        return {"and": [self.left.to_dict(), self.right.to_dict()]}

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


@dataclass(frozen=True)
class Or(Selector):
    """The sites that at least one of two selectors selects."""

    left: Selector
    right: Selector

    def __call__(self, site: Site) -> bool:
        return self.left(site) or self.right(site)

    def to_dict(self) -> dict[str, Any]:
        return {"or": [self.left.to_dict(), self.right.to_dict()]}

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@dataclass(frozen=True)
class Not(Selector):
    """The sites that a selector does not select."""

    inner: Selector

    def __call__(self, site: Site) -> bool:
        return not self.inner(site)

    def to_dict(self) -> dict[str, Any]:
        return {"not": self.inner.to_dict()}

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


name = Name
regex = Regex
parameter = ParameterName


def type_(*classes: type[nn.Module] | str) -> Selector:
    """Select the parameters of modules of these classes and their subclasses.

    Args:
        classes: module classes, or their qualified names (`"torch.nn.modules.linear.Linear"`).
    """
    return Type(tuple(kind if isinstance(kind, str) else qualified(kind) for kind in classes))


def qualified(kind: type) -> str:
    """A class's module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


@lru_cache(maxsize=1024)
def _descends(kind: type, names: tuple[str, ...]) -> bool:
    """Whether the qualified name of a class, or of one of its bases, is among these."""
    return any(qualified(ancestor) in names for ancestor in kind.__mro__)


def as_selector(value: Selector | str | Callable[[Site], bool]) -> Selector:
    """A glob or a function as a selector; a selector is returned unchanged.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return Name(value)
    if callable(value):
        return ByFunction(value)
    raise TypeError(f"a selector is a glob, a gf.select selector or a function of a Site, not a {type(value).__name__}")


def from_dict(data: Mapping[str, Any]) -> Selector:
    """The selector that `Selector.to_dict` returned this data for.

    Raises:
        AdaptError: if the data describes no selector of this module.
    """
    match dict(data):
        case {"name": str(pattern)}:
            return Name(pattern)
        case {"regex": str(pattern)}:
            return Regex(pattern)
        case {"parameter": str(pattern)}:
            return ParameterName(pattern)
        case {"type": [*classes]} if all(isinstance(kind, str) for kind in classes):
            return Type(tuple(classes))
        case {"and": [left, right]}:
            return And(from_dict(left), from_dict(right))
        case {"or": [left, right]}:
            return Or(from_dict(left), from_dict(right))
        case {"not": inner}:
            return Not(from_dict(inner))
    raise AdaptError(f"{data!r} is no selector: expected one of the keys name, regex, type, parameter, and, or, not")
