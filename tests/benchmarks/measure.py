"""Times that can be compared: all contenders of a row take turns, and a ratio is taken within a turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, NamedTuple

import torch


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
        differences: pairs of names, whose times are subtracted turn by turn.
        targets: the most that "a/b" or "a - b" (seconds) may be, of the models and sizes of the full run.
    """

    calls: Calls
    ratios: Sequence[tuple[str, str]] = (("ours", "PEFT"), ("ours", "floor"))
    facts: Mapping[str, str | int] = field(default_factory=dict)
    note: str = ""
    differences: Sequence[tuple[str, str]] = ()
    targets: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """A row of what is counted instead of timed: bytes, kernels, FLOPs. It is the same on any machine, or nearly so.

    Attributes:
        unit: of what is counted: "B", "FLOP", or a noun.
        values: by contender, one for each repetition.
        ratios, facts, note, targets: as of a `Case`; the targets hold for the quick run too where `always`.
    """

    unit: str
    values: Mapping[str, Sequence[float]]
    ratios: Sequence[tuple[str, str]] = (("ours", "PEFT"), ("ours", "floor"))
    facts: Mapping[str, str | int] = field(default_factory=dict)
    note: str = ""
    targets: Mapping[str, float] = field(default_factory=dict)
    always: bool = True


@dataclass(frozen=True)
class Scale:
    """How much to do.

    Attributes:
        full: whether this is the run whose figures count; else it is a smoke test.
        rounds: turns of every contender.
        least: turns that a row gets even where they take longer than `seconds`.
        seconds: a row stops after this time, one without targets after half of it.
        sample: what is faster than this many seconds is repeated within a turn.
        threads: of torch, None for as many as it likes. On a busy machine two only wait for each other.
        device: whose clock tells the time.
    """

    full: bool
    rounds: int
    least: int
    seconds: float
    sample: float
    threads: int | None
    device: str = "cpu"


QUICK = Scale(full=False, rounds=3, least=1, seconds=1.0, sample=1e-3, threads=1)
FULL = Scale(full=True, rounds=21, least=4, seconds=10.0, sample=5e-3, threads=None)


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Result:
    """A row measured.

    Attributes:
        times: by contender, seconds or what else `unit` says.
        ratios: by "a/b".
        differences: by "a - b".
        targets: the most that these may be.
        judged: whether the targets are meant for what was measured.
    """

    name: str
    times: dict[str, Spread]
    ratios: dict[str, Spread]
    rounds: int
    facts: dict[str, str | int]
    note: str
    differences: dict[str, Spread] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    judged: bool = False
    unit: str = "s"

    def found(self, key: str) -> Spread:
        """What a target is about."""
        return self.ratios[key] if key in self.ratios else self.differences[key]

    def met(self, key: str) -> bool:
        return self.found(key).median <= self.targets[key]

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def row(self) -> str:
        return self.name.split("/", 1)[1]


def spread(values: Sequence[float]) -> Spread:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(low, middle, high)


def measure(name: str, case: Case | Counts, scale: Scale) -> Result:
    """Time the contenders of a row in turns, each turn beginning with the next of them."""
    if isinstance(case, Counts):
        samples = {key: list(values) for key, values in case.values.items()}
        return result(name, case, samples, case.unit, judged=scale.full or case.always)
    samples = in_turns(case.calls, scale, scale.seconds if case.targets else scale.seconds / 2)
    return result(name, case, samples, "s", judged=scale.full)


def in_turns(calls: Calls, scale: Scale, seconds: float) -> dict[str, list[float]]:
    """Seconds of every turn, by contender."""
    names = list(calls)
    clock = CLOCKS[scale.device]
    repeats = {key: repeats_of(calls[key], scale.sample, clock) for key in names}
    samples: dict[str, list[float]] = {key: [] for key in names}
    start = time.perf_counter()
    gc.collect()
    gc.freeze()  # what is there stays, and a turn collects only what it left behind
    gc.disable()
    try:
        for turn in range(scale.rounds):
            if turn >= scale.least and time.perf_counter() - start > seconds:
                break
            first = turn % len(names)
            for key in names[first:] + names[:first]:
                samples[key].append(timed(calls[key], repeats[key], clock))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return samples


def result(name: str, case: Case | Counts, samples: Mapping[str, Sequence[float]], unit: str, judged: bool) -> Result:
    """The medians of a row, and what is divided or subtracted turn by turn."""
    pairs = [(a, b) for a, b in case.ratios if a in samples and b in samples]
    ratios = {f"{a}/{b}": spread([x / y for x, y in zip(samples[a], samples[b], strict=True)]) for a, b in pairs}
    differences = {}
    for a, b in case.differences if isinstance(case, Case) else ():
        differences[f"{a} - {b}"] = spread([x - y for x, y in zip(samples[a], samples[b], strict=True)])
    unknown = case.targets.keys() - ratios.keys() - differences.keys()
    if unknown:
        raise ValueError(f"{name} has a target of {', '.join(sorted(unknown))}, which it does not measure")
    return Result(
        name, {key: spread(values) for key, values in samples.items()}, ratios, len(next(iter(samples.values()))),
        dict(case.facts), case.note, differences, dict(case.targets), judged, unit,
    )  # fmt: skip


def repeats_of(call: Callable[[], object] | Call, sample: float, clock: Clock) -> int:
    """How many runs make a sample. Warms up: a first run allocates and fills caches."""
    if timed(call, 1, clock) > 20 * sample:
        return 1
    return max(1, round(sample / timed(call, 1, clock)))


def timed(call: Callable[[], object] | Call, repeats: int, clock: Clock) -> float:
    """Seconds of one run, as the mean of several."""
    if isinstance(call, Call):
        total = 0.0
        for _ in range(repeats):
            made = call.prepare()
            stop = clock()
            kept = call.run(made)
            total += stop()
            del kept, made
        return total / repeats
    stop = clock()
    for _ in range(repeats):
        call()
    return stop() / repeats


Clock = Callable[[], Callable[[], float]]
"""Starts; what it returns stops, and gives the seconds since."""


def processor() -> Callable[[], float]:
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def events() -> Callable[[], float]:
    """By CUDA's own events: from when the device begins what is given to it from now on, to when it has ended it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()

    def stop() -> float:
        end.record()
        torch.cuda.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1000

    return stop


CLOCKS: dict[str, Clock] = {"cpu": processor, "cuda": events}
