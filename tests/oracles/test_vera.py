"""VeRA: by hand in float64, and against PEFT, whose projections are drawn from the same seed."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from helpers.oracles import (
    IDS,
    EveryKind,
    State,
    assert_drops_inputs,
    assert_formula,
    assert_near,
    attention,
    layers,
    net,
    peft_of,
    shaken,
    stored,
    weight_of,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import gift_func as gf


def by_hand(model: nn.Module, state: State) -> dict[str, Tensor]:
    found = {}
    for name in layers(model):
        w = weight_of(model, name)
        b, d = (torch.diag(state[f"{name}.vera_lambda_{part}"]) for part in "bd")
        found[name] = w + b @ state["vera_B"][: w.shape[0]] @ d @ state["vera_A"][:, : w.shape[1]]
    return stored(model, found)


def test_formula() -> None:
    model = net(torch.float64)
    adapted = shaken(gf.adapt(model, {"*.weight": gf.VeRA(rank=5)}))
    assert adapted.adapter["vera_A"].shape == (5, 15)
    assert adapted.adapter["vera_B"].shape == (11, 5)
    assert not adapted.adapter["vera_A"].requires_grad
    assert_formula(adapted, model, lambda state: by_hand(model, state), IDS)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("names", [["lin"], ["lin", "other"], ["gpt"]])
def test_peft(names: list[str]) -> None:
    class Two(EveryKind):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(72, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.other(super().forward(ids))  # type: ignore[no-any-return]

    model = net(torch.float32, Two)
    theirs, tensors = peft_of(model, peft.VeraConfig(r=5, target_modules=names, projection_prng_key=7))
    chosen = gf.select.regex(f"({'|'.join(names)}).weight")
    ours = gf.adapt(model, gf.Strategy([(chosen, gf.VeRA(rank=5, projection_prng_key=7))]))
    state = ours.adapter_state_dict() | tensors
    assert state.keys() == ours.adapter_state_dict().keys()
    assert_near(ours.with_adapter(state)(IDS), theirs(IDS), 1e-5)


def test_dropout_acts_on_what_meets_the_change() -> None:
    model, x = nn.Linear(6, 4).double(), torch.randn(3, 6, dtype=torch.float64)
    assert_drops_inputs(gf.VeRA(rank=3, dropout=0.5), model, x)


def test_stack_of_matrices_and_slices() -> None:
    model, inputs = attention()
    adapted = shaken(gf.adapt(model, gf.VeRA(rank=3)))
    assert_near(adapted(*inputs)[0], adapted.merge()(*inputs)[0], 1e-10)


def test_seed_draws_the_same_projections_and_leaves_the_global_one_alone() -> None:
    model = net(torch.float32)
    state = torch.get_rng_state()
    one, two = (gf.adapt(model, {"*.weight": gf.VeRA(rank=5, projection_prng_key=3)}) for _ in range(2))
    other = gf.adapt(model, {"*.weight": gf.VeRA(rank=5, projection_prng_key=4)})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.adapter["vera_A"], two.adapter["vera_A"])
    assert not torch.equal(one.adapter["vera_A"], other.adapter["vera_A"])
    assert torch.equal(one(IDS), model(IDS))
    assert one.adapter["lin.vera_lambda_d"].tolist() == [pytest.approx(0.1)] * 5


def test_two_rules_have_projections_of_their_own(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    rules = {"0.weight": gf.VeRA(rank=5), "2.weight": gf.VeRA(rank=4, projection_prng_key=1)}
    adapted = shaken(gf.adapt(model, rules))
    assert {name for name in adapted.adapter if "." not in name} == {"vera_A", "vera_B", "vera_A_2", "vera_B_2"}

    def formula(state: State) -> dict[str, Tensor]:
        made = {}
        for index, end in (("0", ""), ("2", "_2")):
            b, d = state[f"{index}.vera_lambda_b"], state[f"{index}.vera_lambda_d"]
            change = b[:, None] * state[f"vera_B{end}"] * d @ state[f"vera_A{end}"]
            made[f"{index}.weight"] = model.get_parameter(f"{index}.weight").detach() + change
        return made

    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_formula(adapted, model, formula, x)
    gf.save_adapter(adapted, tmp_path / "vera.safetensors")
    assert torch.equal(gf.load_adapter(model, tmp_path / "vera.safetensors")(x), adapted(x))
    with pytest.raises(gf.AdaptError, match="PEFT keeps one"):
        gf.interop.peft.save(gf.adapt(model, {"0.weight": gf.VeRA(rank=5), "2.weight": gf.VeRA(rank=5)}), tmp_path)


def test_a_file_of_peft_on_weights_of_two_element_types(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).eval()
    saved = shaken(gf.adapt(model, {"*.weight": gf.VeRA(rank=5)}))
    gf.interop.peft.save(saved, tmp_path / "a")
    mixed = copy.deepcopy(model)
    mixed[2].to(torch.float64)
    loaded = gf.interop.peft.load(mixed, tmp_path / "a")
    assert {"vera_A", "vera_A_2"} <= set(loaded.adapter)
    merged, wanted = loaded.merge().double(), copy.deepcopy(saved).merge().double()
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(merged(x), wanted(x), atol=1e-6)
    gf.interop.peft.save(loaded, tmp_path / "b")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
