"""LoRA+: every trained parameter in one group, at the rates that PEFT gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.census import census, changes
from torch import Tensor, nn

import gift_func as gf


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(self.norm(self.embed(x)))))


def rates(adapted: gf.AdaptedModel, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in adapted.adapter.items()}
    listed = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    found = {name: (group["lr"], group["weight_decay"]) for name, group in listed}
    assert len(found) == len(listed)
    assert found.keys() == dict(adapted.named_trainable_parameters()).keys()
    return found


def test_rates() -> None:
    model = Net()
    rules = {
        "embed": gf.LoRA(rank=2),
        "up.weight": gf.DoRA(rank=2),
        "down.weight": gf.Full(),
        "norm*": gf.Full(),
        "*.bias": gf.Diff(),
    }
    adapted = gf.adapt(model, rules)
    before = census(model)
    groups = gf.optim.lora_plus(adapted, lr=0.5, ratio=4, weight_decay=0.1, embedding_lr=0.25)
    assert rates(adapted, groups) == {
        "embed.lora_A": (0.25, 0.1),
        "embed.lora_B": (0.25, 0.1),
        "up.lora_A": (0.5, 0.1),
        "up.lora_B": (2.0, 0.1),
        "up.lora_magnitude_vector": (2.0, 0.1),
        "down.weight": (0.5, 0.1),
        "norm.weight": (2.0, 0.0),
        "norm.bias": (2.0, 0.0),
        "up.bias.diff": (2.0, 0.0),
        "down.bias.diff": (2.0, 0.0),
    }
    assert not changes(before, census(model), rng=True)


def test_a_step_moves_b_by_the_ratio() -> None:
    adapted = gf.adapt(nn.Linear(4, 4), gf.LoRA(rank=2, init="random"))
    before = {name: parameter.detach().clone() for name, parameter in adapted.adapter.items()}
    optimizer = torch.optim.SGD(gf.optim.lora_plus(adapted, lr=0.01, ratio=8))
    adapted(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    for name, rate in (("lora_A", 0.01), ("lora_B", 0.08)):
        parameter = adapted.adapter[name]
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


def test_what_is_frozen_or_shared_is_left_out() -> None:
    adapted = gf.adapt(Net(), {"up": gf.LoRA(rank=2, init="pissa"), "down": gf.LoRA(rank=2)})
    adapted.adapter["down.lora_A"].requires_grad_(False)
    found = rates(adapted, gf.optim.lora_plus(adapted, lr=1.0))
    assert found == {"up.lora_A": (1.0, 0.0), "up.lora_B": (16.0, 0.0), "down.lora_B": (16.0, 0.0)}


def test_what_is_refused() -> None:
    adapted = gf.adapt(Net(), gf.LoRA(rank=2))
    for values, message in [
        ({"lr": -1.0}, "lr is a number of at least 0, got lr=-1.0"),
        ({"lr": 1.0, "ratio": 0.5}, "ratio is a number of at least 1, got ratio=0.5"),
        ({"lr": 1.0, "embedding_lr": float("nan")}, "embedding_lr is a number of at least 0, got embedding_lr=nan"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay is a number of at least 0, got weight_decay=-0.1"),
    ]:
        with pytest.raises(gf.AdaptError, match=message):
            gf.optim.lora_plus(adapted, **values)
    with pytest.raises(gf.AdaptError, match="nothing is adapted by one"):
        gf.optim.lora_plus(gf.adapt(Net(), gf.BitFit()), lr=1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_as_peft_does(dora: bool) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = Net()
    config = peft.LoraConfig(r=2, target_modules=["embed", "up", "down"], bias="lora_only", use_dora=dora)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=4, loraplus_weight_decay=0.1, loraplus_lr_embedding=0.25
    )
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    wanted = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("base_model.model.").replace("base_layer.", "")
            name = name.replace("lora_embedding_", "lora_").replace(".default", "")
            if "lora" in name:
                name = name.removesuffix(".weight")
            wanted[name] = group["lr"], group["weight_decay"]
    if dora:  # PEFT looks for the embedding one level too low, and trains its magnitude at B's rate
        assert wanted["embed.lora_magnitude_vector"] == (2.0, 0.1)
        wanted["embed.lora_magnitude_vector"] = 0.25, 0.1
    method = (gf.DoRA if dora else gf.LoRA)(rank=2, train_bias=True)
    adapted = gf.adapt(model, {"embed": method, "up.weight": method, "down.weight": method})
    groups = gf.optim.lora_plus(adapted, lr=0.5, ratio=4, weight_decay=0.1, embedding_lr=0.25)
    assert rates(adapted, groups) == wanted
