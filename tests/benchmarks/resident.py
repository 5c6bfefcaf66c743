"""Adapters that are in memory: going from one to the other, and adding one more."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import nn

import gift_func as gf

from .measure import Call, Calls, Case, Scale
from .pairs import check_moved, check_same, family, mini_lm, peft_family
from .step import LINEARS, ids
from .together import outputs_of

SWITCH_SECONDS = 20e-6


def switch_and_call(scale: Scale) -> Case:
    """Calls of an MLP 64-64-64 at batch 1: another adapter each time, or one adapter over and over."""
    size = 32 if scale.full else 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False).eval()
    x = torch.randn(1, 64)
    adapters = family(model, gf.select.type_(nn.Linear), size)
    bank = gf.AdapterBank(adapters)
    theirs = peft_family(model, adapters).eval()
    with torch.no_grad():
        for name, adapter in adapters.items():
            theirs.set_adapter(name)
            check_same(f"outputs of {name} and PEFT's", [bank[name](x)], [theirs(x)])
            check_same(f"outputs of {name} in a bank and alone", [bank[name](x)], [adapter(x)])
            check_moved([adapter(x)], [model(x)], 1e-4)
    plain = bank["a0"]
    ours, peft = cycle(adapters), cycle(adapters)

    def switched() -> None:
        with torch.no_grad():
            bank[next(ours)](x)

    def called() -> None:
        with torch.no_grad():
            plain(x)

    def theirs_switched() -> None:
        theirs.set_adapter(next(peft))
        with torch.no_grad():
            theirs(x)

    calls: Calls = {"ours": switched, "ours, one adapter": called, "PEFT": theirs_switched}
    return Case(
        calls, (("ours", "PEFT"), ("ours", "ours, one adapter")), {"adapters": size},
        differences=(("ours", "ours, one adapter"),), targets={"ours - ours, one adapter": SWITCH_SECONDS},
    )  # fmt: skip


def switch_alone(scale: Scale) -> Case:
    """Going to another adapter of MiniLM, without a call."""
    size = 32 if scale.full else 3
    model, tokens = mini_lm(), ids(1, 16)
    adapters = family(model, LINEARS, size)
    bank = gf.AdapterBank(adapters)
    theirs = peft_family(model, adapters)
    with torch.no_grad():
        for name in adapters:  # each was used before, or it would not be resident
            theirs.set_adapter(name)
            check_same(f"outputs of {name} and PEFT's", outputs_of(bank[name], tokens), outputs_of(theirs, tokens))
    ours, peft = cycle(adapters), cycle(adapters)
    calls: Calls = {"ours": lambda: bank[next(ours)], "PEFT": lambda: theirs.set_adapter(next(peft))}
    return Case(calls, (("ours", "PEFT"),), {"adapters": size})


def attach(scale: Scale) -> Case:
    """A fresh LoRA made for MiniLM and added to the others, as the 2nd and as the 64th."""
    import peft

    few, many = 2, 64 if scale.full else 6
    model = mini_lm()
    generator = torch.Generator().manual_seed(0)
    adapters = family(model, LINEARS, many - 1)
    places = [part.name.removesuffix(".weight") for part in adapters["a0"].adapted_parameters]
    options = peft.LoraConfig(r=8, target_modules=places)
    calls: dict[str, Callable[[], object] | Call] = {}
    for k in (few, many):
        here = dict(list(adapters.items())[: k - 1])
        bank = gf.AdapterBank(here)
        theirs = peft_family(copy.deepcopy(model), here)
        added = bank.add("new", {LINEARS: gf.LoRA(rank=8)}, generator=generator)
        if len(added) != k or list(added["new"].adapter) != list(adapters["a0"].adapter):
            raise AssertionError(f"the bank holds {len(added)} adapters and should hold {k}")
        calls[f"ours, {k}"] = adding(bank, generator)
        calls[f"PEFT, {k}"] = peft_adding(theirs, options)
    ratios = ((f"ours, {few}", f"PEFT, {few}"), (f"ours, {many}", f"ours, {few}"), (f"PEFT, {many}", f"PEFT, {few}"))
    targets = {f"ours, {few}/PEFT, {few}": 0.25, f"ours, {many}/ours, {few}": 1.25}
    return Case(calls, ratios, targets=targets)


def adding(bank: gf.AdapterBank, generator: torch.Generator) -> Callable[[], object]:
    return lambda: bank.add("new", {LINEARS: gf.LoRA(rank=8)}, generator=generator)


def peft_adding(theirs: Any, options: Any) -> Call:
    def without() -> None:
        if "new" in theirs.peft_config:
            theirs.delete_adapter("new")

    def run(_: None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.add_adapter("new", options)

    return Call(without, run)
