"""The options of a method: their checks, and patterns that give them other values by module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..errors import AdaptError

Value = TypeVar("Value")


class FrozenMap(Mapping[str, Value]):
    """A mapping that compares, hashes and pickles, for the fields of frozen dataclasses."""

    def __init__(self, items: Mapping[str, Value] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self._items.items()) == list(other.items())

    def __repr__(self) -> str:
        return repr(self._items)


def check_options(method: Any) -> None:
    """Refuse a `Literal` option that is none of its values, a `dropout` that is no probability, and a bad one of `whole`.

    Raises:
        AdaptError: for the first such option.
    """
    for name, values in _choices(method.__class__).items():
        value = getattr(method, name)
        if value not in values:
            raise AdaptError(f"{name} is one of {', '.join(map(str, values))}, got {name}={value!r}")
    for name in (item.name for item in fields(method) if item.name.endswith("dropout")):
        value = getattr(method, name)
        if not 0.0 <= value < 1.0:
            raise AdaptError(f"{name} is a probability in [0, 1), got {name}={value!r}")
    for name in method.whole:
        for pattern, value in [("", getattr(method, name)), *getattr(method, f"{name}_pattern", {}).items()]:
            optional = value is None and method.__dataclass_fields__[name].default is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                place = f" ({name}_pattern {pattern!r})" if pattern else ""
                raise AdaptError(f"{type(method).__name__} needs a whole {name} of at least 1, got {name}={value!r}{place}")


@cache
def patterns(kind: Any) -> list[str]:
    """The names of a method's pattern fields."""
    return [item.name for item in fields(kind) if item.name.endswith("_pattern")]


def first_match(patterns: Mapping[str, Value], module_name: str, default: Value) -> Value:
    """The value of the first key, a regular expression, that matches the module's name or the end of it after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module_name):
            return value
    return default


@cache
def _choices(kind: Any) -> dict[str, tuple[Any, ...]]:
    """The values of each option that is annotated as a `Literal`."""
    try:
        hints = get_type_hints(kind)
    except (NameError, AttributeError, TypeError):  # annotations with names that only a type checker or a function knows
        return {}
    found = {item.name: hints[item.name] for item in fields(kind) if item.init}
    return {name: get_args(hint) for name, hint in found.items() if get_origin(hint) is Literal}
