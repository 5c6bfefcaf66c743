"""The trials of a sweep: their values, what reads them, and which trials can be one ensemble."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from ..adapted_model import AdaptedModel
from ..ensembles.stack import stack
from ..errors import AdaptError, nearest

Trial = Mapping[str, Any]


class RecordedTrial(Mapping[str, Any]):
    """A trial that records which of its values were read, so that values that nothing reads can be refused."""

    def __init__(self, values: Trial) -> None:
        self.given_values = dict(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key not in self.given_values:
            raise KeyError(f"the trial has no {key!r}; {nearest(key, self.given_values)}")
        self.read.add(key)
        return self.given_values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given_values)

    def __len__(self) -> int:
        return len(self.given_values)


def trials_of(given: Trial | Iterable[Trial]) -> list[dict[str, Any]]:
    """All combinations of a mapping's lists and ranges, the last name running fastest; or the trials as they are given."""
    if isinstance(given, Mapping):
        axes = [list(value) if isinstance(value, (list, range)) else [value] for value in given.values()]
        found = [dict(zip(given, values, strict=True)) for values in product(*axes)]
    else:
        found = [dict(trial) for trial in given]
    if not found:
        raise AdaptError("a sweep needs at least one trial, and none was given (one of the lists may be empty)")
    return found


def settings_of(trials: Sequence[RecordedTrial], optimizer: Callable[..., Any]) -> list[dict[str, Any]]:
    """Each trial's arguments of the optimizer; for one that only other trials have, its default."""
    arguments = dict(inspect.signature(optimizer).parameters)
    names = [name for name in dict.fromkeys(key for trial in trials for key in trial) if name in arguments and name != "params"]
    found = []
    for index, trial in enumerate(trials):
        own = {name: trial[name] if name in trial else arguments[name].default for name in names}
        lacking = next((name for name, value in own.items() if value is inspect.Parameter.empty), None)
        if lacking is not None:
            raise AdaptError(f"trial {index} lacks {lacking!r}, which others have and for which the optimizer has no default")
        found.append(own)
    return found


def check_all_read(trials: Sequence[RecordedTrial], arguments: Iterable[str]) -> None:
    """Refuse values that nothing read, such as a misspelt learning rate."""
    for index, trial in enumerate(trials):
        idle = [key for key in trial if key not in trial.read and key != "seed"]
        if idle:
            raise AdaptError(
                f"nothing reads {idle[0]!r} of trial {index}: it is no argument of the optimizer, and neither the strategy nor "
                f"the schedule asks for it; of the optimizer's arguments {nearest(idle[0], arguments)}"
            )


def grouped_trials(models: Sequence[AdaptedModel], most: int | None) -> list[list[int]]:
    """Group the trials that can be one ensemble, at most so many in each, as lists of indices."""
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
