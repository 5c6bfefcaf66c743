"""EVA: directions and ranks against hand-made covariances and against PEFT, and nothing of the user's is touched."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.census import census, changes, mess_up
from torch import Tensor, nn

import gift_func as gf


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Linear(8, 8)
    even(first)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 10), nn.Dropout(0.5), nn.Linear(10, 3)).to(dtype)


SPREAD = torch.tensor([9.0, 1.5, 1, 0.8, 0.5, 0.3, 0.2, 0.1])


def even(first: nn.Linear) -> None:
    """Let a first layer even the data out, so that layers differ in how much few directions explain."""
    with torch.no_grad():
        first.weight.copy_(torch.eye(8) / SPREAD / 4)


def data(count: int = 60, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return ((torch.randn(count, 8) + 0.5) * SPREAD).to(dtype)


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each Linear is given, in evaluation mode."""
    found = {}
    with torch.no_grad():
        for name, layer in copy.deepcopy(model).eval().named_children():
            if isinstance(layer, nn.Linear):
                found[name] = x
            x = layer(x)
    return found


def by_hand(inputs: dict[str, Tensor], rank: int, rho: float) -> dict[str, Tensor]:
    """Directions of every layer after redistribution, by an SVD of the centred inputs."""
    triples, directions = [], {}
    for name, x in inputs.items():
        _, sigma, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        shares = sigma**2 / (sigma**2).sum()
        directions[name] = vh
        triples += [(float(share), name) for share in shares[: round(rank * rho)]]
    triples.sort(reverse=True)
    first = [name for _, name in triples[: rank * len(inputs)]]
    return {name: vh[: first.count(name)] for name, vh in directions.items()}


def same_up_to_sign(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    signs = (a * b).sum(1, keepdim=True).sign()
    torch.testing.assert_close(a, b * signs, rtol=tolerance, atol=tolerance)


def lora(part: Any) -> gf.LoRA:
    assert isinstance(part.method, gf.LoRA)
    return part.method


def rows_of(adapted: gf.AdaptedModel) -> dict[str, Tensor]:
    state = adapted.adapter_state_dict()
    return {name.removesuffix(".lora_A"): state[name] for name in state if name.endswith("lora_A")}


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
def test_directions_and_ranks_by_hand(rho: float) -> None:
    model, x = net(), data()
    adapted = gf.eva(model, gf.LoRA(rank=2), x.split(20), rho=rho)
    wanted = {name: rows for name, rows in by_hand(inputs_of(model, x), 2, rho).items() if len(rows)}
    found = rows_of(adapted)
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        same_up_to_sign(found[name], rows, 1e-8)
    assert sum(len(rows) for rows in found.values()) == 6
    if rho == 1:
        assert adapted.strategy is not None
        assert adapted.strategy.rules[0][1] == gf.LoRA(rank=2)
    else:
        assert len({len(rows) for rows in found.values()}) > 1


def test_starts_as_the_base_and_trains() -> None:
    model, x = net().eval(), data()
    adapted = gf.eva(model, gf.LoRA(rank=2, alpha=8), [x])
    assert torch.equal(adapted(x), model(x))
    adapted(x).square().sum().backward()
    assert all(adapted.adapter[f"{name}.lora_B"].grad.abs().sum() > 0 for name in rows_of(adapted))


def test_does_not_depend_on_the_split() -> None:
    model, x = net(), data()
    whole, parts = (rows_of(gf.eva(model, gf.LoRA(rank=2), x.split(size))) for size in (60, 7))
    for name, rows in whole.items():
        torch.testing.assert_close(rows, parts[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [gf.LoRA(2), gf.LoRA(2, alpha=6), gf.LoRA(2, rslora=True), gf.LoRA(2, alpha=6, rslora=True)])
def test_scale_stays(method: gf.LoRA) -> None:
    adapted = gf.eva(net(), method, [data()], rho=3)
    ranks = {lora(part).rank for part in adapted.adapted_parameters}
    assert len(ranks) > 1
    assert all(math.isclose(lora(part).scale, method.scale) for part in adapted.adapted_parameters)


def test_patterns_name_exactly_one_module_each() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(inner), nn.Linear(8, 8)).double()  # "0", "1.0.0" and "2"
    adapted = gf.eva(model, gf.LoRA(rank=2, rank_pattern={"2": 1}), [data()], rho=3)
    found = {part.name.removesuffix(".weight"): lora(part).rank for part in adapted.adapted_parameters}
    assert found == {name: len(rows) for name, rows in rows_of(adapted).items()}
    assert sum(found.values()) == 5


def test_a_site_of_rank_0_is_left_to_no_other_rule() -> None:
    model, x = net().append(nn.Linear(3, 2).double()), data()
    rules = {"0": gf.LoRA(rank=1), "2": gf.LoRA(rank=1), "4": gf.LoRA(rank=1), "*.weight": gf.Full(), "*.bias": gf.Full()}
    adapted = gf.eva(model, rules, [x], rho=3)
    dropped = {"0", "2", "4"} - set(rows_of(adapted))
    assert dropped
    names = {part.name for part in adapted.adapted_parameters}
    assert not names & {f"{name}.weight" for name in dropped}
    assert {"0.bias", "2.bias", "4.bias"} <= names


def test_strategy_is_plain_data_and_files_load(tmp_path: Path) -> None:
    model, x = net(), data()
    adapted = gf.eva(model, gf.LoRA(rank=2, alpha=3, train_bias=True), [x])
    assert adapted.strategy is not None
    assert gf.Strategy.from_json(adapted.strategy.to_json()) == adapted.strategy
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn_like(parameter))
    gf.save_adapter(adapted, tmp_path / "eva.safetensors")
    loaded = gf.load_adapter(model, tmp_path / "eva.safetensors")
    assert list(loaded.adapter) == list(adapted.adapter)
    assert torch.equal(loaded.eval()(x), adapted.eval()(x))


def test_tied_layers_are_seen_together() -> None:
    model, x = net(), data()
    model[2] = nn.Linear(8, 8).double()
    model[4] = nn.Linear(8, 3).double()
    model[2].weight = model[0].weight
    seen = inputs_of(model, x)
    both = {"0": torch.cat([seen["0"], seen["2"]]), "4": seen["4"]}
    found = rows_of(gf.eva(model, gf.LoRA(rank=2), x.split(30)))
    for name, rows in by_hand(both, 2, 2.0).items():
        same_up_to_sign(found[name], rows, 1e-8)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (9, 3, 11)),
        (nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2)), (6, 3, 9, 8)),
        (nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), (6, 2, 7, 8)),
        (nn.Conv3d(2, 3, 2), (5, 2, 4, 4, 4)),
    ],
)
def test_convolutions_see_patches(layer: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    found = gf.eva(layer, gf.LoRA(rank=3), [x]).adapter_state_dict()["lora_A"]
    # A convolution whose kernels are unit vectors reads the patches out, one feature a channel.
    width = layer.weight[0].numel()
    reader = copy.deepcopy(layer)
    reader.weight = nn.Parameter(torch.eye(width, dtype=torch.float64).reshape(width, *layer.weight.shape[1:]))
    reader.bias = None
    patches = reader(x).detach().movedim(1, -1).reshape(-1, width)
    same_up_to_sign(found.flatten(1), by_hand({"": patches}, 3, 1.0)[""], 1e-8)
    assert found.shape[1:] == layer.weight.shape[1:]


def test_transformers_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, x = conv1d(5, 8).double(), data()
    found = gf.eva(layer, gf.LoRA(rank=3), [x]).adapter_state_dict()["lora_A"]
    same_up_to_sign(found, by_hand({"": x}, 3, 1.0)[""], 1e-8)


def test_masked_positions_do_not_count() -> None:
    layer, x = nn.Linear(8, 4).double(), data().reshape(6, 10, 8)
    mask = torch.arange(10) < torch.arange(4, 10).unsqueeze(1)
    batches = [{"input": x, "mask": mask}]
    adapted = gf.eva(
        layer, gf.LoRA(rank=3), batches, forward=lambda base, batch: base(batch["input"]), mask=lambda batch: batch["mask"]
    )
    same_up_to_sign(adapted.adapter_state_dict()["lora_A"], by_hand({"": x[mask]}, 3, 1.0)[""], 1e-8)


def test_batches_of_every_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3).double()

        def forward(self, left: Tensor, right: Tensor) -> Any:
            return self.layer(input=left + right)

    x, model = data(), Two()
    for batch in ((x, x), [x, x], {"left": x, "right": x}):
        found = gf.eva(model, gf.LoRA(rank=3), [batch])
        same_up_to_sign(found.adapter_state_dict()["layer.lora_A"], by_hand({"": x + x}, 3, 1.0)[""], 1e-8)


def test_dora_and_an_adapted_base() -> None:
    model, x = net().eval(), data()
    first = gf.adapt(model, gf.LoRA(rank=2, init="random"))
    adapted = gf.eva(first, gf.DoRA(rank=2), [x])
    torch.testing.assert_close(adapted(x), first(x))
    merged = first.merge()
    wanted = by_hand(inputs_of(merged, x), 2, 2.0)
    for name, rows in rows_of(adapted).items():
        same_up_to_sign(rows, wanted[name], 1e-8)


def test_nothing_of_the_users_is_touched() -> None:
    model, x = nn.Sequential(net().train(), nn.Linear(3, 4).double(), nn.BatchNorm1d(4).double()), data()
    mess_up(model)
    before = census(model)
    batches = x.split(20)
    first = gf.eva(model, gf.LoRA(rank=2), batches)
    with pytest.raises(gf.AdaptError, match="input"):
        gf.eva(model, gf.LoRA(rank=2), [])
    assert not changes(before, census(model), rng=True)
    assert first.training == model.training
    assert not any(module._forward_pre_hooks for module in first.copy_pool.tree.modules.values())
    second = gf.eva(model, gf.LoRA(rank=2), batches)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_is_refused() -> None:
    model, x = net(), data()
    for rho in (0.5, float("nan"), float("inf")):
        with pytest.raises(gf.AdaptError, match="at least 1, got rho="):
            gf.eva(model, gf.LoRA(), [x], rho=rho)
    with pytest.raises(gf.AdaptError, match="no rule of the strategy places either"):
        gf.eva(model, gf.BitFit(), [x])
    with pytest.raises(gf.AdaptError, match=r"'0\.weight' of Linear: the method sets A by init='pissa'"):
        gf.eva(model, gf.LoRA(init="pissa"), [x])
    with pytest.raises(gf.AdaptError, match=r"'0\.weight' was given no input by the batches"):
        gf.eva(model, gf.LoRA(rank=2), [])
    with pytest.raises(gf.AdaptError, match="ranks sum to 6, and the inputs vary in 3 directions"):
        gf.eva(model, gf.LoRA(rank=2), [x[:2]])
    with pytest.raises(gf.AdaptError, match="not finite"):
        gf.eva(model, gf.LoRA(rank=2), [x * float("nan")])
    with pytest.raises(gf.AdaptError, match=r"mask has shape \(3,\), and '0\.weight' is given inputs .* \(60,\)"):
        gf.eva(model, gf.LoRA(rank=2), [x], mask=lambda batch: torch.ones(3))
    with pytest.raises(gf.AdaptError, match=r"of Embedding: it needs a Linear"):
        gf.eva(nn.Embedding(5, 4), {"*": gf.LoRA(rank=2)}, [torch.tensor([1, 2])])
    with pytest.raises(gf.AdaptError, match=r"'in_proj_weight' of MultiheadAttention: it needs a Linear"):
        gf.eva(nn.MultiheadAttention(8, 2), gf.LoRA(rank=2), [x])
    with pytest.raises(gf.AdaptError, match=r"groups=1, .* groups=2"):
        gf.eva(nn.Conv1d(4, 4, 3, groups=2), gf.LoRA(rank=2), [x])
    with pytest.raises(gf.AdaptError, match="needs conv='kernel'"):
        gf.eva(nn.Conv1d(4, 4, 3), gf.LoRA(rank=2, conv="balanced"), [x])
    with pytest.raises(gf.AdaptError, match="matches nothing"):
        gf.eva(model, {"nowhere": gf.LoRA(rank=2)}, [x])


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_as_peft_does(rho: float) -> None:
    peft = pytest.importorskip("peft")

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.middle, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            even(self.up)

        def forward(self, x: Tensor) -> Any:
            return self.down(torch.tanh(self.middle(torch.tanh(self.up(x)))))

    model, x, rank = MLP(), data(dtype=torch.float32), 2 if rho == 2 else 4  # PEFT's SVD is exact where 2·rank·rho = in
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=3,
        target_modules=["up", "middle", "down"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho),
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    peft.initialize_lora_eva_weights(
        theirs,
        [{"x": x}],
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = gf.eva(model, gf.LoRA(rank=rank, alpha=3), [{"x": x}], rho=rho)
    found = {part.name.removesuffix(".weight"): lora(part) for part in ours.adapted_parameters}
    rows = rows_of(ours)
    for name in ("up", "middle", "down"):
        layer = theirs.base_model.model.get_submodule(name)
        assert hasattr(layer, "lora_A") == (name in found)
        if name in found:
            same_up_to_sign(rows[name], layer.lora_A["default"].weight.detach(), 2e-3)
            assert layer.r["default"] == found[name].rank
            assert math.isclose(layer.scaling["default"], found[name].scale)
    if rho > 1:
        assert len({method.rank for method in found.values()}) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_it(rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = net(torch.float32).eval(), data(dtype=torch.float32)
    adapted = gf.eva(model, gf.LoRA(rank=2, alpha=3, rslora=rslora), [x])
    assert len({lora(part).rank for part in adapted.adapted_parameters}) > 1
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn_like(parameter))
    gf.interop.peft.save(adapted, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), adapted(x), rtol=1e-5, atol=1e-5)
