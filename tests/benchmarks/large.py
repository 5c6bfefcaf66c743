"""Adapting a model of 70 billion parameters, on the meta device."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

import gift_func as gf

from .measure import Call, Calls, Case, Scale
from .pairs import trained


def adapt_llama(scale: Scale) -> Case:
    """LoRA onto every linear layer of a Llama of 80 layers but its head, which PEFT's "all-linear" leaves out."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)

    def ours() -> gf.AdaptedModel:
        return gf.adapt(model, {gf.select.type_(nn.Linear) & ~gf.select.name("lm_head"): gf.LoRA(rank=16)})

    def inject(fresh: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = peft.LoraConfig(r=16, target_modules="all-linear")
            return peft.get_peft_model(fresh, options, low_cpu_mem_usage=True)

    here, there = trained(ours()), trained(inject(copy.deepcopy(model)))
    if here != there:
        raise AssertionError(f"{here:,} parameters are trained here and {there:,} in PEFT's")
    calls: Calls = {
        "ours": ours,
        # The first use makes the private copy that runs; reaching for an attribute of the network is one.
        "ours, first used": lambda: ours().config,
        "PEFT": Call(lambda: copy.deepcopy(model), inject),
    }
    return Case(
        calls,
        ratios=(("ours", "PEFT"), ("ours, first used", "PEFT")),
        facts={"trained": here},
        note="no values on meta: equal in what is trained",
        targets={"ours/PEFT": 0.2, "ours, first used/PEFT": 0.2},
    )
