"""Rows of counted work: they hold on a busy machine, so that a test can assert them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import nn

import gift_func as gf

from .counting import allocated_peak, flops, kernels, saved_bytes, tensors_of
from .measure import Counts, Scale
from .pairs import check_same, family, mini_lm, pair, peft_family
from .step import LINEARS, METHODS, floor, ids, outputs, training
from .together import PREFIX_TARGET, TOP, mixture, outputs_of


def step_work(method: str, unit: str, targets: Mapping[str, float], scale: Scale) -> Counts:
    """What a training step by one method does.

    Args:
        method: of `step.METHODS`.
        unit: "FLOP", "kernels", "B saved" for the backward or "B at the peak".
        targets: as of a `Case`.
    """
    tokens = ids(8, 128) if scale.full else ids(1, 128)
    ours, theirs = contenders(method)
    found = {}
    for key, contender in {"ours": ours, "PEFT": theirs, "floor": floor()}.items():
        found[key] = [float(work(contender, tokens, unit))]
    return Counts(unit.split()[0], found, facts={"tokens": tokens.numel()}, targets=targets)


@lru_cache(maxsize=1)
def contenders(method: str) -> tuple[nn.Module, nn.Module]:
    """MiniLM adapted by us and by PEFT, seen to compute the same."""
    return pair(mini_lm(), {LINEARS: METHODS[method]}, lambda m: outputs(m, ids(2, 16)))


def work(model: nn.Module, tokens: torch.Tensor, unit: str) -> int:
    run = training(model, tokens)
    if unit == "FLOP":
        return flops(run)
    if unit == "kernels":
        return kernels(run).seen.total()
    if unit == "B saved":
        return saved_bytes(lambda: outputs(model, tokens), tensors_of(model) + tensors_of(mini_lm()))
    return allocated_peak(run)


def mixed_work(unit: str, targets: Mapping[str, float], scale: Scale) -> Counts:
    """What inference on a mixed batch does.

    Args:
        unit: "FLOP", "kernels", or "numbers" that are picked by index. Those of ours are the samples put in order and the
            results put back, once a call: no weight is picked by sample.
        targets: as of a `Case`.
    """
    model, adapters, tokens, names = mixture(scale)
    bank = gf.AdapterBank(adapters).eval()
    base, theirs = bank.base, peft_family(model, adapters).eval()
    calls: dict[str, Callable[[], list[torch.Tensor]]] = {
        "ours": lambda: outputs_of(bank, tokens, adapters=names),
        "PEFT": lambda: outputs_of(theirs, tokens, adapter_names=names),
        "base": lambda: outputs_of(base, tokens),
    }
    with torch.no_grad():
        check_same("outputs of the mixed batch and PEFT's", calls["ours"](), calls["PEFT"]())
        count: Callable[[Callable[[], object]], int] = {
            "FLOP": flops,
            "kernels": lambda call: kernels(call).seen.total(),
            "numbers": lambda call: kernels(call).gathered,
        }[unit]
        found = {key: [float(count(call))] for key, call in calls.items()}
        io = 2 * tokens.numel() + sum(tensor.numel() for tensor in calls["base"]())
    if unit == "numbers":
        found["in and out"] = [io + found.pop("base")[0] + 8 * len(names)]  # and a few numbers by sample to get the order
    ratios = (("ours", "PEFT"), ("ours", "base"), ("ours", "in and out"))
    return Counts(unit, found, ratios, {"adapters": len(adapters), "tokens": tokens.numel()}, targets=targets)


def prefix_work(scale: Scale) -> Counts:
    """Eight members on the same sentences, forward: what lies below the adapted layers is computed once."""
    members, tokens = 8, ids(4, 32) if scale.full else ids(1, 16)
    found = {}
    with torch.no_grad():
        for key, sites in {"top 2": TOP, "all 6": LINEARS}.items():
            ens = gf.stack(family(mini_lm(), sites, members).values())
            found[key] = [float(flops(lambda ens=ens: outputs_of(ens, tokens)))]  # type: ignore[misc]
        found["base"] = [float(flops(lambda: outputs_of(mini_lm(), tokens)))]
    return Counts(
        "FLOP", found, (("top 2", "all 6"), ("top 2", "base")), {"adapters": members, "tokens": tokens.numel()},
        targets={"top 2/all 6": PREFIX_TARGET},
    )  # fmt: skip
