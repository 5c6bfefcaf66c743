"""Bottleneck adapters: their formula, and that an added module is as pure as a changed weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracles import shaken
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gift_func as gf


class Block(nn.Module):
    """A transformer-like block that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + self.mlp(self.norm(x)), "more"


class Network(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        out: Tensor = self.head(x)
        return out


def network(checkpointed: bool = False) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    return Network(checkpointed).double(), torch.randn(4, 5, 6, dtype=torch.float64)


BLOCKS = {"blocks.?": gf.Bottleneck(dim=4, scale=0.5)}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("nonlinearity", ["relu", "gelu", "silu", "tanh"])
def test_the_formula_by_hand(parallel: bool, nonlinearity: str) -> None:
    model, x = network()
    method = gf.Bottleneck(dim=4, scale=0.5, parallel=parallel, nonlinearity=nonlinearity)  # type: ignore[arg-type]
    adapted = shaken(gf.adapt(model, {"blocks.?": method}))
    p = dict(adapted.adapter.items())
    f = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}[nonlinearity]
    h = x
    for i, block in enumerate(model.blocks):
        out = block(h)[0]
        at = f"blocks.{i}.bottleneck"
        z = h if parallel else out
        thin = f(z @ p[f"{at}.down.weight"].T + p[f"{at}.down.bias"])
        h = out + 0.5 * (thin @ p[f"{at}.up.weight"].T + p[f"{at}.up.bias"])
    torch.testing.assert_close(adapted(x), model.head(h), rtol=0, atol=1e-10)


def test_it_starts_as_the_base_and_trains_only_itself() -> None:
    model, x = network()
    adapted = gf.adapt(model, BLOCKS)
    assert torch.equal(adapted(x), model(x))
    assert torch.equal(adapted.base(x), model(x))
    adapted(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name.split(".bottleneck.")[0] for name in adapted.adapter} == {"blocks.0", "blocks.1"}
    assert not any("bottleneck" in name for name, _ in model.named_modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_together_with_a_change_of_weights_inside() -> None:
    model, x = network()
    adapted = shaken(gf.adapt(model, {**BLOCKS, "*.mlp.0": gf.LoRA(rank=2), "head": gf.LoRA(rank=1)}))
    assert {"blocks.0.mlp.0.lora_A", "blocks.0.bottleneck.up.bias", "head.lora_B"} <= set(adapted.adapter)
    without = gf.adapt(model, {"*.mlp.0": gf.LoRA(rank=2), "head": gf.LoRA(rank=1)})
    zero = {n: t * 0 if "bottleneck" in n else t for n, t in adapted.adapter_state_dict().items()}
    lora = {n: t for n, t in zero.items() if "bottleneck" not in n}
    torch.testing.assert_close(adapted.with_adapter(zero)(x), without.with_adapter(lora)(x), rtol=0, atol=1e-12)


def test_copies_files_and_transforms(tmp_path: Path) -> None:
    model, x = network()
    start = gf.adapt(model, BLOCKS)
    adapted, other = shaken(start, 1), shaken(start, 2)
    wanted = adapted(x)
    assert torch.equal(copy.deepcopy(adapted)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(x), wanted)
    gf.save_adapter(adapted, tmp_path / "a")
    before = torch.get_rng_state()
    assert torch.equal(gf.load_adapter(model, tmp_path / "a")(x), wanted)
    assert torch.equal(torch.get_rng_state(), before)
    stacked = {n: torch.stack([adapted.adapter[n], other.adapter[n]]) for n in adapted.adapter}
    found = torch.func.vmap(lambda params: gf.functional_call(adapted, params, (x,)))(stacked)
    torch.testing.assert_close(found, torch.stack([wanted, other(x)]), rtol=0, atol=1e-12)
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=0, atol=1e-12)
    on_top = gf.adapt(adapted, {"head": gf.LoRA(rank=1)})
    assert torch.equal(on_top(x), wanted)


def test_gradients_under_checkpoints() -> None:
    (plain, x), (checkpointed, _) = network(), network(True)
    adapted = shaken(gf.adapt(plain, BLOCKS))
    other = gf.adapt(checkpointed, BLOCKS).with_adapter(adapted.adapter_state_dict())
    for model in (adapted, other):
        gf.functional_call(model, dict(model.adapter.items()), (x,)).square().sum().backward()
    for got, want in zip(other.parameters(), adapted.parameters(), strict=True):
        assert got.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-12)


def test_the_generator_decides_and_the_global_state_stays() -> None:
    model, _ = network()
    before = torch.get_rng_state()
    a, b = (gf.adapt(model, BLOCKS, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.adapter[n], b.adapter[n]) for n in a.adapter)


def test_what_it_cannot_do_it_says() -> None:
    model, _ = network()
    with pytest.raises(gf.AdaptError, match="is part of no weight, so it cannot be merged"):
        gf.adapt(model, BLOCKS).merge()
    with pytest.raises(gf.AdaptError, match="width of a GELU cannot be told"):
        gf.adapt(model, {"blocks.0.mlp.1": gf.Bottleneck(dim=2)})
    with pytest.raises(gf.AdaptError, match="matches nothing"):
        gf.adapt(model, gf.Bottleneck(dim=2))
    with pytest.raises(gf.AdaptError, match=r"blocks\.0.*a host without a 'bottleneck'"):
        gf.adapt(gf.adapt(model, BLOCKS), BLOCKS)
    with pytest.raises(gf.AdaptError, match="got dim=0"):
        gf.Bottleneck(dim=0)
    with pytest.raises(gf.AdaptError, match="got nonlinearity='step'"):
        gf.Bottleneck(nonlinearity="step")  # type: ignore[arg-type]
    assert "blocks.0" in str(gf.Strategy(BLOCKS.items()).explain(model))


def test_eva_leaves_added_modules_as_they_are() -> None:
    model, x = network()
    adapted = gf.eva(model, {**BLOCKS, "head": gf.LoRA(rank=1)}, [x])
    wanted = gf.adapt(model, {**BLOCKS, "head": gf.LoRA(rank=1)})
    assert list(adapted.adapter) == list(wanted.adapter)


class Shifted(gf.AddedModule):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((), start))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output + self.shift


@dataclass(frozen=True)
class Shift(gf.ModuleMethod):
    """`h' = h + c`, by a module of a user's own."""

    start: float = 0.0
    start_pattern: Mapping[str, float] = field(default_factory=dict)
    attribute = "shifted"

    def module(self, host: nn.Module) -> gf.AddedModule:
        return Shifted(self.start)


def test_a_module_method_of_a_users_own() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=torch.float64)
    adapted = gf.adapt(model, {"*": Shift(0.5, {"1": 2.0})})
    assert {name: p.item() for name, p in adapted.adapter.items()} == {"0.shifted.shift": 0.5, "1.shifted.shift": 2.0}
    torch.testing.assert_close(adapted(x), model[1](model[0](x) + 0.5) + 2.0)
