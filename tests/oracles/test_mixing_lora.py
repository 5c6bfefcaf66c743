"""LoRA of grouped convolutions as PEFT has it: by hand; PEFT's own files are in test_peft.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracles import shaken
from torch import nn
from torch._dynamo.testing import CompileCounter

import gift_func as gf

CASES: list[tuple[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, {"groups": 2, "stride": 2}, (3, 4, 9)),
    (nn.Conv1d, {"groups": 4, "bias": False}, (4, 9)),
    (nn.Conv2d, {"groups": 2, "dilation": 2, "padding": 1}, (2, 4, 8, 8)),
    (nn.Conv2d, {"groups": 2, "padding": 1, "padding_mode": "circular"}, (2, 4, 5, 5)),
    (nn.Conv2d, {"groups": 1}, (2, 4, 5, 5)),
    (nn.Conv3d, {"groups": 2}, (2, 4, 4, 4, 4)),
]
EVERY = pytest.mark.parametrize(("kind", "options", "shape"), CASES)


def adapted_of(kind: Callable[..., Any], options: dict[str, Any], **more: Any) -> tuple[Any, gf.AdaptedModel]:
    torch.manual_seed(0)
    conv = kind(4, 8, 3, **options).double()
    adapted = gf.adapt(conv, gf.MixingLoRA(rank=4, alpha=3.0, **more), generator=torch.Generator().manual_seed(0))
    return conv, adapted


@EVERY
def test_formula_by_hand(kind: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    conv, adapted = adapted_of(kind, options)
    x = torch.randn(*shape, dtype=torch.float64)
    assert torch.equal(adapted(x), conv(x))
    state = {name: t.requires_grad_() for name, t in shaken(adapted, by=1.0).adapter_state_dict().items()}
    made = adapted.with_adapter(state)
    thin = kind(4, 4, 3, **{**options, "groups": 1, "bias": False}).double()
    wide = kind(4, 8, 1, groups=options["groups"], bias=False).double()
    hidden = torch.func.functional_call(thin, {"weight": state["lora_A"]}, (x,))
    wanted = conv(x) + 0.75 * torch.func.functional_call(wide, {"weight": state["lora_B"]}, (hidden,))
    assert torch.allclose(made(x), wanted, atol=1e-10)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), [state["lora_A"], state["lora_B"]])
    parameters = [made.adapter["lora_A"], made.adapter["lora_B"]]
    for a, b in zip(torch.autograd.grad(made(x).square().sum(), parameters), wanted_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@EVERY
def test_vmap_compile_and_files(kind: Any, options: dict[str, Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    conv, adapted = adapted_of(kind, options)
    x = torch.randn(*shape, dtype=torch.float64)
    states = [shaken(adapted, seed, 1.0).adapter_state_dict() for seed in (1, 2)]
    wanted = torch.stack([adapted.with_adapter(state)(x) for state in states])
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    assert torch.allclose(torch.vmap(lambda state: gf.functional_call(adapted, state, (x,)))(stacked), wanted)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda state: gf.functional_call(adapted, state, (x,)), fullgraph=True, backend=counter)
    assert torch.allclose(torch.stack([compiled(state) for state in states]), wanted)
    assert counter.frame_count == 1
    gf.save_adapter(adapted.with_adapter(states[0]), tmp_path / "a.safetensors")
    assert torch.equal(gf.load_adapter(conv, tmp_path / "a.safetensors")(x), wanted[0])


def test_dropout_acts_in_training_only() -> None:
    _, adapted = adapted_of(nn.Conv1d, {"groups": 2}, dropout=0.5)
    made, x = shaken(adapted), torch.ones(2, 4, 9, dtype=torch.float64)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


def test_refusals() -> None:
    _, adapted = adapted_of(nn.Conv1d, {"groups": 2})
    with pytest.raises(gf.AdaptError, match="mixes its groups, so no kernel of that shape has it"):
        adapted.merge()
    with pytest.raises(gf.AdaptError, match="a rank that is a multiple of its 2 groups"):
        gf.adapt(nn.Conv1d(4, 8, 3, groups=2), {"weight": gf.MixingLoRA(rank=3)})
    with pytest.raises(gf.AdaptError, match="the weight of a Conv1d, Conv2d or Conv3d"):
        gf.adapt(nn.Linear(4, 8), {"weight": gf.MixingLoRA(rank=2)})
