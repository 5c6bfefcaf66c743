"""Times that can be compared: all contenders of a row take turns, and a ratio is taken within a turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Call:
    """A contender of which each run needs something made anew, outside of the time.

    Attributes:
        prepare: called before each run.
        run: called with what `prepare` returned; its time counts.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


Calls = Mapping[str, Callable[[], object] | Call]


@dataclass(frozen=True)
class Case:
    """A row made ready: its contenders hold equal tensors and were seen to compute the same.

    Attributes:
        calls: the contenders by name; one more name is one more column.
        ratios: pairs of names, whose times are divided turn by turn.
        facts: further columns.
        note: what the reader must know, e.g. why outputs are not equal.
    """

    calls: Calls
    ratios: Sequence[tuple[str, str]] = (("ours", "PEFT"), ("ours", "floor"))
    facts: Mapping[str, str | int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """How much to do.

    Attributes:
        full: whether this is the run whose figures count; else it is a smoke test.
        rounds: turns of every contender.
        least: turns that a row gets even where they take longer than `seconds`.
        seconds: a row stops after this time.
        sample: what is faster than this many seconds is repeated within a turn.
        threads: of torch, None for as many as it likes. On a busy machine two only wait for each other.
    """

    full: bool
    rounds: int
    least: int
    seconds: float
    sample: float
    threads: int | None


QUICK = Scale(full=False, rounds=3, least=1, seconds=1.0, sample=1e-3, threads=1)
FULL = Scale(full=True, rounds=21, least=5, seconds=60.0, sample=5e-3, threads=None)


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Result:
    """A row measured: seconds by contender, ratios by `a/b`."""

    name: str
    times: dict[str, Spread]
    ratios: dict[str, Spread]
    rounds: int
    facts: dict[str, str | int]
    note: str

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def row(self) -> str:
        return self.name.split("/", 1)[1]


def spread(values: Sequence[float]) -> Spread:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(low, middle, high)


def measure(name: str, case: Case, scale: Scale) -> Result:
    """Time the contenders of a row in turns, each turn beginning with the next of them."""
    names = list(case.calls)
    repeats = {key: repeats_of(case.calls[key], scale.sample) for key in names}
    samples: dict[str, list[float]] = {key: [] for key in names}
    start = time.perf_counter()
    gc.collect()
    gc.freeze()  # what is there stays, and a turn collects only what it left behind
    gc.disable()
    try:
        for turn in range(scale.rounds):
            if turn >= scale.least and time.perf_counter() - start > scale.seconds:
                break
            first = turn % len(names)
            for key in names[first:] + names[:first]:
                samples[key].append(timed(case.calls[key], repeats[key]))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    ratios = {
        f"{a}/{b}": spread([x / y for x, y in zip(samples[a], samples[b], strict=True)])
        for a, b in case.ratios
        if a in samples and b in samples
    }
    times = {key: spread(values) for key, values in samples.items()}
    return Result(name, times, ratios, len(samples[names[0]]), dict(case.facts), case.note)


def repeats_of(call: Callable[[], object] | Call, sample: float) -> int:
    """How many runs make a sample. Warms up: a first run allocates and fills caches."""
    if timed(call, 1) > 20 * sample:
        return 1
    return max(1, round(sample / timed(call, 1)))


def timed(call: Callable[[], object] | Call, repeats: int) -> float:
    """Seconds of one run, as the mean of several."""
    if isinstance(call, Call):
        total = 0.0
        for _ in range(repeats):
            made = call.prepare()
            start = time.perf_counter()
            kept = call.run(made)
            total += time.perf_counter() - start
            del kept, made
        return total / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
