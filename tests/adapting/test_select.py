"""Which parameters: selectors and strategies, as values and as data."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.models import BY_NAME, CNN, MLP, Attention, Shared, Tied, bert, gpt2, llama, mixtral
from torch import Tensor, nn

import gift_func as gf
from gift_func import select
from gift_func.methods.method import Method
from gift_func.select import Selector, Site
from gift_func.weights import Delta, Weight


def taken(model: nn.Module, strategy: Any) -> dict[str, str]:
    """Parameter name -> method, as text, of what a strategy takes."""
    return {part.name: str(part.method) for part in gf.adapt(model, strategy).adapted_parameters}


def chosen(model: nn.Module, selector: Any) -> list[str]:
    """The parameters that a selector takes, by Full."""
    return list(taken(model, gf.Strategy([(selector, gf.Full())])))


class SpecialLinear(nn.Linear):
    """A subclass, which a match by class name would pass over in silence."""


class Attend(nn.MultiheadAttention):
    """Another."""


class Model(nn.Module):
    """Names to choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            [nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": SpecialLinear(4, 4)}) for _ in range(2)]
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2, bias=False)


SELECTORS: dict[str, tuple[Any, list[str]]] = {
    "a module's name": ("head", ["head.weight"]),
    "a parameter's name": ("norm.bias", ["norm.bias"]),
    "a star": (
        "*.q_proj",
        ["encoder.0.q_proj.weight", "encoder.0.q_proj.bias", "encoder.1.q_proj.weight", "encoder.1.q_proj.bias"],
    ),
    "a star on parameters": ("*.0.*.bias", ["encoder.0.q_proj.bias", "encoder.0.v_proj.bias"]),
    "a question mark": ("encoder.?.q_proj.weight", ["encoder.0.q_proj.weight", "encoder.1.q_proj.weight"]),
    "a set of letters": ("encoder.[1-9].[qv]_proj.weight", ["encoder.1.q_proj.weight", "encoder.1.v_proj.weight"]),
    "case counts": ("*.Q_proj", []),
    "no part of a name": ("hea", []),
    "name": (select.name("norm"), ["norm.weight", "norm.bias"]),
    "regex on modules": (
        select.regex(r"encoder\.1\.[qv]_proj"),
        ["encoder.1.q_proj.weight", "encoder.1.q_proj.bias", "encoder.1.v_proj.weight", "encoder.1.v_proj.bias"],
    ),
    "regex on parameters": (select.regex(r".*\d\.v_proj\.weight"), ["encoder.0.v_proj.weight", "encoder.1.v_proj.weight"]),
    "regex matches the whole name": (select.regex("head|nor"), ["head.weight"]),
    "type": (select.type_(nn.LayerNorm), ["norm.weight", "norm.bias"]),
    "type with subclasses": (
        select.type_(nn.Linear) & select.parameter("weight"),
        [
            "encoder.0.q_proj.weight",
            "encoder.0.v_proj.weight",
            "encoder.1.q_proj.weight",
            "encoder.1.v_proj.weight",
            "head.weight",
        ],
    ),
    "type of the subclass": (
        select.type_(SpecialLinear) & select.parameter("weight"),
        ["encoder.0.v_proj.weight", "encoder.1.v_proj.weight"],
    ),
    "types": (
        select.type_(nn.LayerNorm, SpecialLinear) & select.name("*.bias") & ~select.name("*.0.*"),
        ["encoder.1.v_proj.bias", "norm.bias"],
    ),
    "type by qualified name": (select.type_("torch.nn.modules.normalization.LayerNorm"), ["norm.weight", "norm.bias"]),
    "parameter": (select.parameter("b*") & ~select.name("encoder.*"), ["norm.bias"]),
    "or": (select.name("head") | select.name("norm.weight"), ["norm.weight", "head.weight"]),
    "not": (~select.name("encoder.*"), ["norm.weight", "norm.bias", "head.weight"]),
    "and not": (select.name("encoder.0.*") & ~select.parameter("bias"), ["encoder.0.q_proj.weight", "encoder.0.v_proj.weight"]),
    "de morgan": (~(select.name("encoder.*") | select.name("norm")), ["head.weight"]),
    "a function": (lambda site: site.parameter.shape == (2, 4), ["head.weight"]),
    "a selector and a function": (
        select.name("encoder.0.*") & (lambda site: site.parameter.ndim == 1),
        ["encoder.0.q_proj.bias", "encoder.0.v_proj.bias"],
    ),
    "a function and a selector": (
        (lambda site: site.parameter.ndim == 1) & ~select.name("encoder.*"),
        ["norm.weight", "norm.bias"],
    ),
    "a function or a selector": (
        (lambda site: site.param_name == "bias" and site.module_name == "norm") | select.name("head"),
        ["norm.bias", "head.weight"],
    ),
    "a glob string and a selector": (select.name("norm") & select.as_selector("*.bias"), ["norm.bias"]),
}


@pytest.mark.parametrize("case", list(SELECTORS))
def test_selectors_select(case: str) -> None:
    selector, wanted = SELECTORS[case]
    if wanted:
        assert chosen(Model(), selector) == wanted
    else:
        with pytest.raises(gf.AdaptError, match="matches nothing"):
            chosen(Model(), selector)


PLAIN = [case for case, (selector, _) in SELECTORS.items() if isinstance(selector, Selector) and "function" not in case]


@pytest.mark.parametrize("case", PLAIN)
def test_selectors_are_values_and_data(case: str) -> None:
    selector = SELECTORS[case][0]
    data = json.loads(json.dumps(selector.to_dict()))
    for made in (select.from_dict(data), pickle.loads(pickle.dumps(selector)), copy.deepcopy(selector)):
        assert made == selector
        assert hash(made) == hash(selector)
        assert repr(made) == repr(selector)
        assert chosen(Model(), made) == SELECTORS[case][1]
    assert selector != ~selector


def test_a_site_tells_where_it_stands() -> None:
    sites: list[Site] = []
    model = Model()

    def look(site: Site) -> bool:
        sites.append(site)
        return site.param_name == "weight"

    gf.adapt(model, gf.Strategy([(look, gf.Full())]))
    found = {site.name: site for site in sites}
    assert found.keys() == dict(model.named_parameters()).keys()
    site = found["encoder.1.v_proj.bias"]
    assert site.module_name == "encoder.1.v_proj"
    assert site.param_name == "bias"
    assert site.module is model.get_submodule("encoder.1.v_proj")
    assert site.parameter is model.get_parameter("encoder.1.v_proj.bias")


# Methods as values.

METHODS: list[gf.Method] = [
    gf.LoRA(),
    gf.LoRA(rank=4, alpha=8, rslora=True, dropout=0.1, init="gaussian", train_bias=True, conv="balanced", dtype=torch.bfloat16),
    gf.LoRA(rank=2, rank_pattern={"q_proj": 4, r"\d\.v_proj": 1}, alpha_pattern={"q_proj": 2.0}),
    gf.SVDiff(),
    gf.SVDiff(conv="rows"),
    gf.Full(),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_are_values_and_data(method: gf.Method) -> None:
    data = json.loads(json.dumps(method.to_dict()))
    for made in (Method.from_dict(data), pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert made == method
        assert type(made) is type(method)
        assert hash(made) == hash(method)
        assert repr(made) == repr(method)
        assert str(made) == str(method)
    assert [other == method for other in METHODS].count(True) == 1


def test_methods_print_as_they_are_written() -> None:
    assert str(gf.LoRA()) == "LoRA()"
    assert str(gf.LoRA(rank=2, dropout=0.5)) == "LoRA(rank=2, dropout=0.5)"
    assert str(gf.LoRA(init="gaussian")) in ("LoRA(init=gaussian)", "LoRA(init='gaussian')")
    assert gf.LoRA(rank=4, alpha=8).scale == 2
    assert gf.LoRA(rank=4, alpha=8, rslora=True).scale == 4
    assert gf.LoRA(rank=4).scale == 1
    pattern = {"q": 2}
    method = gf.LoRA(rank_pattern=pattern)
    pattern["q"] = 3
    assert method.rank_pattern == {"q": 2}


# Strategies.

STRATEGIES: list[gf.Strategy] = [
    gf.Strategy([(None, gf.LoRA(rank=2))]),
    gf.Strategy([("*.q_proj", gf.LoRA(rank=2)), ("*.bias", gf.Full())]),
    gf.Strategy([(select.type_(nn.Linear) & ~select.name("head"), gf.LoRA(rank=1)), (select.regex("head.*"), gf.SVDiff())]),
    gf.Strategy([("*.bias", gf.Full()), ("*.q_proj", gf.LoRA(rank=2))]),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_strategies_are_values_and_data(strategy: gf.Strategy) -> None:
    wanted = taken(Model(), strategy)
    for made in (
        gf.Strategy.from_json(strategy.to_json()),
        gf.Strategy.from_dict(json.loads(json.dumps(strategy.to_dict()))),
        pickle.loads(pickle.dumps(strategy)),
        copy.deepcopy(strategy),
    ):
        assert made == strategy
        assert hash(made) == hash(strategy)
        assert repr(made) == repr(strategy)
        assert taken(Model(), made) == wanted
    assert [other == strategy for other in STRATEGIES].count(True) == 1
    assert strategy != "strategy"


def test_ways_to_write_one_strategy_agree() -> None:
    pairs = [("*.q_proj", gf.LoRA(rank=2)), ("head", gf.SVDiff())]
    wanted = gf.Strategy(pairs)
    assert (
        gf.Strategy.of(dict(pairs)) == gf.Strategy.of(pairs) == gf.Strategy.of(wanted) == gf.Strategy.of(iter(pairs)) == wanted
    )
    assert gf.Strategy.of(gf.Full()) == gf.Strategy([(None, gf.Full())])
    for given in (dict(pairs), pairs, tuple(pairs), wanted):
        adapted = gf.adapt(Model(), given)
        assert adapted.strategy == wanted
        assert list(adapted.adapter) == list(gf.adapt(Model(), wanted).adapter)


def test_functions_of_a_site_are_told_from_the_seeds_checks() -> None:
    def check(site: Site) -> bool:
        return site.param_name == "weight" and site.parameter.ndim == 2

    assert set(taken(MLP(), [(check, gf.LoRA(rank=2))])) == {"layers.0.weight", "layers.2.weight"}
    seen: list[tuple[str, str, str]] = []

    def old(parent: nn.Module, name: str, path: str, kind: str, module: nn.Module) -> bool:
        seen.append((name, path, kind))
        return kind == "Linear"

    def act(parent: nn.Module, name: str, path: str, kind: str, module: nn.Module, rank: int = 1) -> gf.Method:
        return gf.LoRA(rank=rank)

    assert taken(MLP(), [(old, act, {"rank": 3})]) == {"layers.0.weight": "LoRA(rank=3)", "layers.2.weight": "LoRA(rank=3)"}
    assert seen == [
        ("layers", "layers", "Sequential"),
        ("0", "layers.0", "Linear"),
        ("1", "layers.1", "Tanh"),
        ("2", "layers.2", "Linear"),
    ]
    assert set(taken(MLP(), [(old, act)])) == {"layers.0.weight", "layers.2.weight"}


def test_the_first_match_wins() -> None:
    narrow, wide = ("encoder.0.q_proj.weight", gf.SVDiff()), ("encoder.*.weight", gf.LoRA(rank=1))
    found = taken(Model(), gf.Strategy([narrow, wide]))
    assert found["encoder.0.q_proj.weight"] == "SVDiff()"
    assert [method for name, method in found.items() if name != "encoder.0.q_proj.weight"] == ["LoRA(rank=1)"] * 3
    with pytest.raises(gf.AdaptError, match=r"rule 1.*earlier rules take all"):
        taken(Model(), gf.Strategy([wide, narrow]))


def test_a_rule_passes_over_what_its_method_cannot_adapt_if_it_can_adapt_something() -> None:
    found = taken(Model(), {"encoder.*": gf.LoRA(rank=1), "*.bias": gf.Full()})
    assert {name for name, method in found.items() if method == "Full()"} == {
        name for name, _ in Model().named_parameters() if name.endswith("bias")
    }
    assert {name for name, method in found.items() if method != "Full()"} == {
        f"encoder.{i}.{p}_proj.weight" for i in range(2) for p in "qv"
    }


USUAL: dict[str, tuple[Any, set[str]]] = {
    "linear and its subclasses": (Model, {f"encoder.{i}.{p}_proj.weight" for i in range(2) for p in "qv"} | {"head.weight"}),
    "convolutions": (CNN, {"stem.weight", "grouped.weight", "depthwise.weight", "pointwise.weight", "head.weight"}),
    "conv 1d and 3d": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1)),
        {"0.weight", "1.weight"},
    ),
    "attention": (Attention, {"attention.in_proj_weight", "attention.out_proj.weight"}),
    "attention of a subclass": (lambda: nn.Sequential(Attend(4, 2)), {"0.in_proj_weight", "0.out_proj.weight"}),
    "attention of other dimensions": (
        lambda: Attention(kdim=6, vdim=7, add_bias_kv=True),
        {f"attention.{n}_weight" for n in ("q_proj", "k_proj", "v_proj")} | {"attention.out_proj.weight"},
    ),
    "GPT-2's Conv1D": (
        gpt2,
        {f"transformer.h.{i}.{n}.weight" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        | {"transformer.wte.weight"},
    ),
}


@pytest.mark.parametrize("case", list(USUAL))
@pytest.mark.parametrize("method", [gf.LoRA(rank=1), gf.SVDiff()], ids=str)
def test_usual_sites(case: str, method: gf.Method) -> None:
    make, wanted = USUAL[case]
    assert set(taken(make(), method)) == wanted


def test_full_takes_everything() -> None:
    for name in ("cnn", "llama", "tied", "experts", "linear"):
        model = BY_NAME[name].model()
        assert list(taken(model, gf.Full())) == [name for name, _ in model.named_parameters()]


def test_experts_are_reached_by_naming_them() -> None:
    model = mixtral()
    assert not any("experts.gate_up_proj" in name for name in taken(model, gf.LoRA(rank=1)))
    adapted = gf.adapt(model, {"*.experts.*_proj": gf.LoRA(rank=1)})
    assert adapted.adapter["model.layers.0.mlp.experts.down_proj.lora_A"].shape == (3, 1, 8)
    assert adapted.adapter["model.layers.0.mlp.experts.gate_up_proj.lora_B"].shape == (3, 16, 1)


# Patterns of rank and alpha, biases.


def test_rank_and_alpha_patterns() -> None:
    method = gf.LoRA(
        rank=2, alpha=1, rank_pattern={"q_proj": 3, r"1\.v_proj": 1}, alpha_pattern={"q_proj": 6, "head": 4}, init="random"
    )
    model = Model()
    adapted = gf.adapt(model, method)
    ranks = {name: tensor.shape[0] for name, tensor in adapted.adapter.items() if name.endswith("lora_A")}
    assert ranks == {
        "encoder.0.q_proj.lora_A": 3,
        "encoder.0.v_proj.lora_A": 2,
        "encoder.1.q_proj.lora_A": 3,
        "encoder.1.v_proj.lora_A": 1,
        "head.lora_A": 2,
    }
    merged = adapted.merge()
    scales = {"encoder.0.q_proj": 2.0, "encoder.0.v_proj": 0.5, "encoder.1.v_proj": 1.0, "head": 2.0}
    for name, scale in scales.items():
        change = merged.get_parameter(f"{name}.weight") - model.get_parameter(f"{name}.weight")
        wanted = scale * adapted.adapter[f"{name}.lora_B"] @ adapted.adapter[f"{name}.lora_A"]
        assert torch.allclose(change, wanted, atol=1e-6)


def test_a_pattern_matches_whole_parts_of_a_name() -> None:
    adapted = gf.adapt(Model(), gf.LoRA(rank=2, rank_pattern={"proj": 5, "oj": 6, "ead": 7}))
    assert {p.shape[0] for n, p in adapted.adapter.items() if n.endswith("lora_A")} == {2}


def test_train_bias_takes_the_biases_of_what_is_adapted() -> None:
    adapted = gf.adapt(Model(), {"encoder.0.*": gf.LoRA(rank=1, train_bias=True), "encoder.1.q_proj": gf.LoRA(rank=1)})
    assert {name for name in adapted.adapter if name.endswith("bias")} == {"encoder.0.q_proj.bias", "encoder.0.v_proj.bias"}
    attention = gf.adapt(Attention(), gf.LoRA(rank=1, train_bias=True))
    assert {n for n in attention.adapter if n.endswith("bias")} == {"attention.in_proj_bias", "attention.out_proj.bias"}
    own = gf.adapt(
        Model(),
        gf.Strategy([("encoder.0.q_proj.weight", gf.LoRA(rank=1, train_bias=True)), ("encoder.0.q_proj.bias", gf.Full())]),
    )
    assert {name for name in own.adapter if name.endswith("bias")} == {"encoder.0.q_proj.bias"}


# Tied parameters.


@pytest.mark.parametrize("name", ["embed", "embed.weight", "head", "head.weight", "*ea*"])
def test_a_tied_parameter_is_found_by_any_of_its_names_and_adapted_once(name: str) -> None:
    adapted = gf.adapt(Tied(), {name: gf.LoRA(rank=2)})
    assert list(adapted.adapter) == ["embed.lora_B", "embed.lora_A"]
    assert [part.name for part in adapted.adapted_parameters] == ["embed.weight"]
    body: Any = adapted.copy_pool.module
    assert body.embed.weight is body.head.weight
    merged: Any = adapted.merge()
    assert merged.embed.weight is merged.head.weight
    assert len(list(merged.parameters())) == 3


@pytest.mark.parametrize("name", ["first", "again", "all.0", "*.0.weight"])
def test_a_shared_submodule_is_found_by_any_of_its_names(name: str) -> None:
    assert [part.name for part in gf.adapt(Shared(), {f"{name}": gf.LoRA(rank=2)}).adapted_parameters] == ["first.weight"]


def test_tied_models_of_transformers() -> None:
    adapted = gf.adapt(llama(), {"lm_head": gf.LoRA(rank=2)})
    assert list(adapted.adapter) == ["model.embed_tokens.lora_B", "model.embed_tokens.lora_A"]


# The table.


def test_explain_is_a_table_of_who_takes_what() -> None:
    strategy = gf.Strategy(
        [("layers.0", gf.LoRA(rank=2)), ("*.bias", gf.Full()), ("*.q_proj", gf.SVDiff()), ("layers.0.bias", gf.Full())]
    )
    text = str(strategy.explain(MLP()))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["parameter", "shape", "rule", "method"]
    assert ["layers.0.weight", "8x6", "0", "LoRA(rank=2)"] in lines
    assert ["layers.0.bias", "8", "1", "Full()"] in lines
    assert ["layers.2.weight", "5x8", "-", "-"] in lines
    assert "rule 0: name('layers.0') -> LoRA(rank=2): 1 parameter" in text
    assert "rule 1: name('*.bias') -> Full(): 2 parameters" in text
    assert "rule 2: name('*.q_proj') -> SVDiff(): takes nothing" in text
    assert "rule 3: name('layers.0.bias') -> Full(): takes nothing" in text
    found = strategy.explain(MLP())
    assert {name: index for name, (index, _) in found.taken.items()} == {
        "layers.0.weight": 0,
        "layers.0.bias": 1,
        "layers.2.bias": 1,
    }
    assert repr(found) == text


def test_explain_shows_every_name_of_a_tied_parameter() -> None:
    assert "embed.weight = head.weight" in str(gf.Strategy([("head", gf.LoRA(rank=1))]).explain(Tied()))


def test_explain_agrees_with_adapt_and_changes_nothing() -> None:
    for make in (bert, Model, Tied):
        model = make()
        before = [(id(p), p._version) for p in model.parameters()]
        strategy = gf.Strategy([(None, gf.LoRA(rank=1, train_bias=True))])
        assert list(strategy.explain(model).taken) == list(taken(model, strategy))
        assert [(id(p), p._version) for p in model.parameters()] == before


def test_the_order_of_an_adapter_is_the_models_and_not_the_rules() -> None:
    one = gf.adapt(MLP(), {"layers.2.weight": gf.LoRA(rank=1), "layers.0.weight": gf.LoRA(rank=1)})
    two = gf.adapt(MLP(), {"layers.0.weight": gf.LoRA(rank=1), "layers.2.weight": gf.LoRA(rank=1)})
    assert list(one.adapter) == list(two.adapter)


def test_a_users_own_method_needs_a_dataclass_and_two_functions() -> None:
    @dataclass(frozen=True)
    class ShiftOfAll(gf.WeightMethod):
        """`W + c·1`."""

        size: float = 1.0

        def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
            return {"shift": torch.zeros(1, dtype=site.parameter.dtype)}

        def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
            return Delta(base, tensors["shift"].expand(base.shape), self.size)

    model = BY_NAME["cnn"].model().eval()
    adapted = gf.adapt(model, {"*.weight": ShiftOfAll(2.0)}).eval()
    (x,), _ = BY_NAME["cnn"].call()
    assert torch.equal(adapted(x), model(x))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.fill_(0.1)
    assert torch.allclose(adapted(x), adapted.merge()(x), atol=1e-12)
    assert torch.allclose(adapted.merge().get_parameter("head.weight"), model.get_parameter("head.weight") + 0.2)
    assert Method.from_dict(ShiftOfAll(2.0).to_dict()) == ShiftOfAll(2.0)
    assert "ShiftOfAll(size=2.0)" in repr(adapted)
    assert "norm.shift" in adapted.adapter


def test_a_usual_site_that_a_method_cannot_adapt_is_not_passed_over() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    blocks = gf.C3A(block_size=3)
    with pytest.raises(gf.AdaptError, match=r"rule 0 .* cannot adapt '1.weight' of Linear: it needs .* another method"):
        gf.adapt(model, blocks)
    assert list(gf.adapt(model, {"0": blocks}).adapter) == ["0.c3a_kernel"]
    mixed = gf.adapt(model, gf.Strategy([(None, blocks), ("1", gf.LoRA(rank=1))]))
    assert list(mixed.adapter) == ["0.c3a_kernel", "1.lora_B", "1.lora_A"]
    assert list(gf.adapt(model, {"*": gf.LoRA(rank=1)}).adapter)[:2] == ["0.lora_B", "0.lora_A"], "biases are no usual sites"
