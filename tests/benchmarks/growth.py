"""The growth over the number of adapters, the tokens of all together staying the same: time of a step, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

import gift_func as gf

from .measure import Calls, Case, Counts, Scale
from .memory import Figure, at_once, names
from .pairs import check_same, family, mini_lm, peft_family
from .step import LINEARS, floor, ids, training
from .together import mapped_training, mixed_step, outputs_of

LENGTH = 8  # tokens of a sentence


def sizes(scale: Scale) -> tuple[int, ...]:
    """How many adapters there are; the last is how many sentences, too."""
    return (1, 2, 4, 8, 16, 32, 64, 128) if scale.full else (1, 2, 4)


def ensemble_time(scale: Scale) -> Case:
    """A step of an ensemble whose members divide the sentences among them; PEFT: one member after another."""
    counts, tokens, adapters = ready(scale)
    most = counts[-1]
    theirs = peft_family(mini_lm(), {"a0": adapters["a0"]}).train()
    calls: dict[str, Callable[[], object]] = {"floor": training(floor(), tokens)}
    for n in counts:
        calls[f"ours, {n}"] = mapped_training(gf.stack(list(adapters.values())[:n]), tokens.reshape(n, -1, LENGTH))
    for n in counts[::2] if len(counts) < 8 else (1, 8, 32, 128):
        steps = [training(theirs, share) for share in tokens.reshape(n, -1, LENGTH)]
        calls[f"PEFT, {n}"] = in_turn(steps)
    ratios = ((f"ours, {most}", "floor"), (f"ours, {most}", "ours, 1"), (f"ours, {most}", f"PEFT, {most}"))
    return Case(calls, ratios, {"tokens": tokens.numel()})


def bank_time(scale: Scale) -> Case:
    """A step on a mixed batch whose sentences are divided among the adapters."""
    counts, tokens, adapters = ready(scale)
    calls: dict[str, Callable[[], object]] = {"floor": training(floor(), tokens)}
    for n in counts:
        bank = gf.AdapterBank(dict(list(adapters.items())[:n])).train()
        calls[f"ours, {n}"] = mixed_step(bank, tokens, names(bank, len(tokens)))
    found: Calls = calls
    ratios = ((f"ours, {counts[-1]}", "floor"), (f"ours, {counts[-1]}", "ours, 1"))
    return Case(found, ratios, {"tokens": tokens.numel()})


def in_turn(steps: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for step in steps:
            step()

    return run


def ready(scale: Scale) -> tuple[tuple[int, ...], Tensor, dict[str, gf.AdaptedModel]]:
    counts = sizes(scale)
    tokens, adapters = ids(counts[-1], LENGTH), family(mini_lm(), LINEARS, counts[-1])
    ens = gf.stack(adapters.values())
    for index, (name, adapter) in enumerate(adapters.items()):
        if index in (0, counts[-1] - 1):
            share = tokens[index : index + 1]
            check_same(f"outputs of {name}", [part[index] for part in outputs_of(ens, share)], outputs_of(adapter, share))
    return counts, tokens, adapters


@cache
def measured(who: str, counts: tuple[int, ...]) -> list[Figure]:
    return at_once([(who, "LoRA", adapters, counts[-1], LENGTH) for adapters in counts])


def memory(who: str, what: str, scale: Scale) -> Counts:
    """Memory of 1, 2, 4, ... adapters on one base, a fresh process each.

    Args:
        who: "ensemble" or "bank".
        what: "adapters", the tensors there are beside the base, and as a limit the adapters' numbers alone; or "step", the
            peak of a step beyond these, and as a limit that of one adapter with the gradients of the others.
    """
    counts = sizes(scale)
    size = 4 * sum(p.numel() for p in next(iter(family(mini_lm(), LINEARS, 1).values())).trainable_parameters())
    found = {}
    for n, figure in zip(counts, measured(who, counts), strict=True):
        found[f"ours, {n}"] = [float(figure.kept if what == "adapters" else figure.step)]
    most = counts[-1]
    limit = most * size if what == "adapters" else found["ours, 1"][0] + (most - 1) * size
    found["limit"] = [float(limit)]
    return Counts(
        "B", found, ((f"ours, {most}", "limit"),), {"bytes": size}, targets={f"ours, {most}/limit": 1.05}, always=False
    )
