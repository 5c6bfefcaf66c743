"""One token of a mixed batch, by a key-value cache: what serving many adapters at once costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

from .measure import Call, Calls, Case, Scale
from .pairs import check_moved, check_same, family, peft_family, smol_lm
from .together import shuffled

PROMPT = 16
SITES = gf.select.type_(nn.Linear) & ~gf.select.name("lm_head")


def mixed_decode(scale: Scale) -> Case:
    """The next token of 32 samples that use 32 different adapters."""
    size = 32 if scale.full else 4
    model: Any = smol_lm(scale.full)
    adapters = family(model, SITES, size)
    names = shuffled(adapters)
    bank = gf.AdapterBank(adapters).eval()
    theirs = peft_family(model, adapters).eval()
    prompts, token = words(size, PROMPT, model), words(size, 1, model)
    contenders: dict[str, Callable[..., Any]] = {
        "ours": lambda **given: bank(adapters=names, **given),
        "PEFT": lambda **given: theirs(adapter_names=names, **given),
        "base": bank.base,
    }
    logits = {}
    calls: Calls = {}
    for key, forward in contenders.items():
        with torch.no_grad():
            cache = forward(input_ids=prompts, use_cache=True).past_key_values
            logits[key] = forward(input_ids=token, use_cache=True, **{cache_name(model): cache}).logits
        calls = {**calls, key: next_token(forward, token, cache, cache_name(model))}
    check_same("logits of the mixed batch and PEFT's", [logits["ours"]], [logits["PEFT"]])
    check_moved([logits["ours"]], [logits["base"]])
    return Case(
        calls, (("ours", "PEFT"), ("ours", "base")), {"adapters": size, "tokens": size},
        targets={"ours/PEFT": 0.4, "ours/base": 1.65},
    )  # fmt: skip


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls its key-value cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def next_token(forward: Callable[..., Any], token: Tensor, cache: Any, name: str) -> Call:
    """The pass over one token, after which the token is taken out of the cache again.

    Args:
        name: `cache_name` of the model.
    """

    def forget() -> None:
        if cache.get_seq_length() > PROMPT:
            cache.crop(PROMPT - cache.get_seq_length())

    def run(_: None) -> None:
        with torch.no_grad():
            forward(input_ids=token, use_cache=True, **{name: cache})

    return Call(forget, run)


def words(rows: int, length: int, model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))
