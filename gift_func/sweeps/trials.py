"""The trials of a sweep: what they are, what reads their values, and which of them can share a stack."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from ..adapted_model import AdaptedModel
from ..ensembles.stack import stack
from ..errors import AdaptError, nearest

Trial = Mapping[str, Any]


class Watched(Mapping[str, Any]):
    """A trial that notes which of its values were asked for, so that one that nothing reads is noticed."""

    def __init__(self, values: Trial) -> None:
        self.values_given = dict(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key not in self.values_given:
            raise KeyError(f"the trial has no {key!r}; {nearest(key, self.values_given)}")
        self.read.add(key)
        return self.values_given[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_given)

    def __len__(self) -> int:
        return len(self.values_given)


def trials_of(given: Trial | Iterable[Trial]) -> list[dict[str, Any]]:
    """All combinations of a mapping's lists and ranges, the last name running fastest; or the trials as they are given.

    Raises:
        AdaptError: if there are none.
    """
    if isinstance(given, Mapping):
        axes = [list(value) if isinstance(value, (list, range)) else [value] for value in given.values()]
        found = [dict(zip(given, values, strict=True)) for values in product(*axes)]
    else:
        found = [dict(trial) for trial in given]
    if not found:
        raise AdaptError("a sweep needs at least one trial, and none was given (one of the lists may be empty)")
    return found


def settings_of(trials: Sequence[Watched], optimizer: Callable[..., Any]) -> list[dict[str, Any]]:
    """Which of the trials' values are arguments of the optimizer; where a trial lacks one that others have, its default."""
    arguments = dict(inspect.signature(optimizer).parameters)
    names = [name for name in dict.fromkeys(key for trial in trials for key in trial) if name in arguments and name != "params"]
    found = []
    for index, trial in enumerate(trials):
        own = {}
        for name in names:
            if name not in trial and arguments[name].default is inspect.Parameter.empty:
                raise AdaptError(f"trial {index} lacks {name!r}, which others have and for which the optimizer has no default")
            own[name] = trial[name] if name in trial else arguments[name].default
        found.append(own)
    return found


def check_read(trials: Sequence[Watched], arguments: Iterable[str]) -> None:
    """Refuse a value that nothing reads: a misspelt rate would be no rate at all."""
    for index, trial in enumerate(trials):
        idle = [key for key in trial if key not in trial.read and key != "seed"]
        if idle:
            raise AdaptError(
                f"nothing reads {idle[0]!r} of trial {index}: it is no argument of the optimizer, and neither the strategy nor "
                f"the schedule asks for it; of the optimizer's arguments {nearest(idle[0], arguments)}"
            )


def grouped(models: Sequence[AdaptedModel], most: int | None) -> list[list[int]]:
    """The trials that can share a stack, as lists of indices.

    Args:
        models: the trials' adapted models.
        most: how many may share one at most; None for any number.
    """
    groups: list[list[int]] = []
    for index, model in enumerate(models):
        for group in groups:
            if (most is None or len(group) < most) and _fits([models[i] for i in group], model):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _fits(group: Sequence[AdaptedModel], model: AdaptedModel) -> bool:
    unlike: list[AdaptedModel] = []
    for other in group:
        if other.strategy is not None and other.strategy == model.strategy:
            return True
        if not any(other.strategy == known.strategy for known in unlike):
            unlike.append(other)
    try:
        stack([*unlike, model])
    except AdaptError:
        return False
    return True
