"""The table of laws: one row a method and configuration, every law on every kind of parameter."""

from __future__ import annotations

import pytest
import torch

import gift_func as gf
from gift_func import testing

METHODS: dict[str, gf.Method] = {
    "Full": gf.Full(),
    "LoRA": gf.LoRA(rank=2),
    "LoRA random": gf.LoRA(rank=2, alpha=3.0, init="random"),
    "LoRA orthogonal rslora": gf.LoRA(rank=4, init="orthogonal", rslora=True),
    "LoRA gaussian balanced": gf.LoRA(rank=2, init="gaussian", conv="balanced"),
    "LoRA in float64": gf.LoRA(rank=2, dtype=torch.float64),
    "SVDiff": gf.SVDiff(),
    "SVDiff rows": gf.SVDiff(conv="rows"),
}


@pytest.mark.parametrize("law", testing.LAWS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_law(method: gf.Method, law: str) -> None:
    testing.check(method, laws=[law])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_element_type_is_kept(method: gf.Method) -> None:
    for name, host in testing.HOSTS.items():
        if not testing.refuses(method, name):
            testing.element_type_is_kept(method, host)
