"""The fields of a method: how they are named, kept, looked up by module, and checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from ..errors import AdaptError

Kind = TypeVar("Kind")
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


def check_whole(method: object, name: str) -> None:
    """Refuse an option, and what its pattern gives, that is not a whole number of at least 1."""
    for pattern, value in [("", getattr(method, name)), *getattr(method, f"{name}_pattern", {}).items()]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            place = f" ({name}_pattern {pattern!r})" if pattern else ""
            raise AdaptError(f"{type(method).__name__} needs a whole {name} of at least 1, got {name}={value!r}{place}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse an option that is none of these."""
    if value not in choices:
        raise AdaptError(f"{name} is one of {', '.join(map(str, choices))}, got {name}={value!r}")


def check_dropout(method: object) -> None:
    """Refuse a dropout, in whichever of the fields that end in `dropout`, that is no probability."""
    for name in (item.name for item in fields(cast(Any, method)) if item.name.endswith("dropout")):
        value = getattr(method, name)
        if not 0.0 <= value < 1.0:
            raise AdaptError(f"{name} is a probability in [0, 1), got {name}={value!r}")


def first_match(patterns: Mapping[str, Value], module_name: str, default: Value) -> Value:
    """The value of the first key whose regular expression matches the module's name or its end after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module_name):
            return value
    return default
