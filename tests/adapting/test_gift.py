"""GIFt's names: strategies, factories, utils, and what actions may do without the user's model feeling it."""

from __future__ import annotations

import copy
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift_func as gf
import gift_func.factories as fts
import gift_func.strategies as st
from gift_func.gift_protocol import caps_of, is_pure
from gift_func.utils import num_parameters, num_trainable_parameters, trainable_parameters

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMED = [
    st.LoRALinearFineTuningStrategy,
    st.LoRAConvFineTuningStrategy,
    st.LoRAAllFineTuningStrategy,
    st.LoRAFullFineTuningStrategy,
    st.SVDiffLinearFineTuningStrategy,
    st.SVDiffConvFineTuningStrategy,
    st.SVDiffAllFineTuningStrategy,
    st.FullFineTuningStrategy,
]


class Net(nn.Module):
    """A parameter of its own, layers of every kind that strategies look for, a nested one, a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.inner = nn.ModuleDict({"line": nn.Conv1d(3, 4, 2)})
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) + self.shift[:, None, None]
        out: Tensor = self.head(self.inner["line"](x.flatten(2)).mean(2))
        return out


class Wide(nn.Linear):
    """A subclass of Linear, which a compare of class names would pass over."""


class Tied(nn.Module):
    """One Linear in two places, and an embedding that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.mix = nn.Linear(4, 4)
        self.block = nn.Sequential(self.mix, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.mix(self.table(x))))
        return out


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def image(rows: int = 2) -> Tensor:
    return torch.randn(rows, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def census(model: nn.Module) -> tuple[list[object], list[Tensor]]:
    facts: list[object] = [repr(model)]
    for name, module in model.named_modules(remove_duplicate=False):
        facts += [name, id(module), type(module), module.training]
        for key, value in module.__dict__.items():
            facts += [key, *map(id, value.values())] if isinstance(value, dict) else [key, id(value)]
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name, tensor in tensors.items():
        facts += [name, id(tensor), tensor.data_ptr(), tensor.requires_grad, id(tensor.grad)]
    return facts, [tensor.detach().clone() for tensor in tensors.values()]


def assert_same(model: nn.Module, before: tuple[list[object], list[Tensor]]) -> None:
    facts, values = census(model)
    assert facts == before[0]
    assert all(map(torch.equal, values, before[1]))


def widen(layer_obj: nn.Module, width: int = 2) -> nn.Module:
    assert isinstance(layer_obj, nn.Linear)
    return nn.Sequential(nn.Linear(layer_obj.in_features, width), nn.ReLU(), nn.Linear(width, layer_obj.out_features))


def is_head(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> bool:
    return name == "head"


def always(*where: object) -> bool:
    return True


def never(*where: object) -> bool:
    return False


# --- the tutorial


def told_by_the_seed() -> str:
    """What GIFt's README prints below its first example of a strategy."""
    line = "_" * 50
    linear = "Linear(in_features=10, out_features=10, bias=True)"
    conv = "Conv2d(10, 10, kernel_size=(3, 3), stride=(1, 1))"

    def example(first: str, layer: str) -> str:
        return (
            f"Parent Module ExampleMLP(\n  (in_model): {first}\n  (mid_model): MLP(\n    (layers): ModuleList(\n"
            f"      (0-2): 3 x {layer}\n    )\n    (relu): ReLU()\n  )\n"
            "  (out_model): Linear(in_features=10, out_features=1, bias=True)\n)\n"
        )

    def facts(name: str, global_name: str, layer: str) -> str:
        return f"Layer name: {name}\nGlobal name: {global_name}\nClass name: Linear\nLayer object: {layer}\n{line}\n"

    first = "Linear(in_features=1, out_features=10, bias=True)"
    return (
        example(first, linear)
        + facts("in_model", "in_model", first)
        + f"Parent Module ModuleList(\n  (0-2): 3 x {linear}\n)\n"
        + facts("0", "mid_model.layers.0", linear)
        + f"Parent Module ModuleList(\n  (0): {conv}\n  (1-2): 2 x {linear}\n)\n"
        + facts("1", "mid_model.layers.1", linear)
        + f"Parent Module ModuleList(\n  (0-1): 2 x {conv}\n  (2): {linear}\n)\n"
        + facts("2", "mid_model.layers.2", linear)
        + example("Conv2d(1, 10, kernel_size=(3, 3), stride=(1, 1))", conv)
        + facts("out_model", "out_model", "Linear(in_features=10, out_features=1, bias=True)")
    )


def test_the_mlp_tutorial_prints_what_the_seed_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "gift_mlp.py"))
    out = capsys.readouterr().out
    assert told_by_the_seed() in out
    assert "Number of trainable parameters: 40701\n" in out
    assert "Number of trainable parameters after adapting: 3006\n" in out
    keys = ", ".join(f"'layers.{i}.lora_{letter}'" for i in range(6) for letter in "BA")
    assert f"dict_keys([{keys}])\n" in out
    assert "{'conv_para': {'kernel_size': 3}}\n" in out
    assert "{'lora_paras': {'rank': 3, 'lora_alpha': None, 'lora_dropout': 0.0, 'train_bias': False}}\n" in out


def test_the_attention_tutorial_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "gift_attention.py"))
    out = capsys.readouterr().out
    assert "  (mha): MultiHeadAttentionBase()\n" in out
    lines = [line for line in out.splitlines() if line.startswith("  (w_q): ")]
    assert ["LoRA(rank=3" in line for line in lines] == [False, True, False, True]


# --- the named strategies


@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        (st.LoRALinearFineTuningStrategy(rank=2), {"head.lora_A": (2, 4), "head.lora_B": (2, 2)}),
        (
            st.LoRAConvFineTuningStrategy(rank=2, train_bias=True),
            {
                "conv.lora_A": (2, 3), "conv.lora_B": (9, 2), "conv.bias": (3,),
                "inner.line.lora_A": (2, 6), "inner.line.lora_B": (4, 2), "inner.line.bias": (4,),
            },
        ),
        (
            st.LoRAFullFineTuningStrategy(rank=1),
            {
                "conv.lora_A": (1, 3), "conv.lora_B": (9, 1), "inner.line.lora_A": (1, 6),
                "inner.line.lora_B": (4, 1), "head.lora_A": (1, 4), "head.lora_B": (2, 1),
            },
        ),
        (st.SVDiffLinearFineTuningStrategy(train_bias=True), {"head.spectral_shift": (2,), "head.bias": (2,)}),
        (st.SVDiffConvFineTuningStrategy(), {"conv.spectral_shift": (3,), "inner.line.spectral_shift": (4,)}),
        (
            st.SVDiffAllFineTuningStrategy(),
            {"conv.spectral_shift": (3,), "inner.line.spectral_shift": (4,), "head.spectral_shift": (2,)},
        ),
        (st.FullFineTuningStrategy(), {name: tuple(p.shape) for name, p in Net().named_parameters()}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, st.FineTuningStrategy) else "",
)  # fmt: skip
def test_what_each_strategy_adapts(strategy: st.FineTuningStrategy, keys: dict[str, tuple[int, ...]]) -> None:
    model = net()
    before = census(model)
    adapted = gf.adapt(model, strategy)
    assert {name: tuple(p.shape) for name, p in adapted.adapter.items()} == keys
    assert adapted.strategy is not None
    # The functional way to the same places gives the same numbers.
    again = gf.adapt(model, adapted.strategy).with_adapter(adapted.adapter_state_dict())
    torch.testing.assert_close(again.eval()(image()), adapted.eval()(image()))
    adapted.train()(image()).sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters())
    assert_same(model, before)


def test_the_seeds_scale_and_dropout_are_loras() -> None:
    adapted = gf.adapt(net(), st.LoRALinearFineTuningStrategy(4, 8.0, 0.5, True))
    assert [part.method for part in adapted.adapted_parameters] == [
        gf.LoRA(rank=4, alpha=8.0, dropout=0.5, train_bias=True, conv="balanced"),
        gf.Full(),
    ]


def test_subclasses_are_taken_and_class_names_are_not_compared() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 1), Wide(4, 4))
    adapted = gf.adapt(model, st.LoRALinearFineTuningStrategy())
    assert [name for name in adapted.adapter if "lora_A" in name] == ["0.out_proj.lora_A", "1.lora_A"]
    # While GIFt's own check is what it says:
    with pytest.raises(gf.AdaptError, match="no check of the strategy's 1 rules holds"):
        gf.adapt(model, [(fts.c_cname_func("Linear"), fts.a_adapt(gf.LoRA(rank=1)))])


def test_full_fine_tuning_reaches_every_parameter_and_ties_once() -> None:
    model = Tied()
    adapted = gf.adapt(model, st.FullFineTuningStrategy())
    assert list(adapted.adapter) == [name for name, _ in model.named_parameters()]
    attention = nn.Sequential(nn.MultiheadAttention(4, 1))
    assert set(gf.adapt(attention, st.FullFineTuningStrategy()).adapter) == set(dict(attention.named_parameters()))


@pytest.mark.parametrize("strategy", [*NAMED[:1], *NAMED[2:5], *NAMED[6:]], ids=lambda kind: kind.__name__)
def test_a_linear_by_itself_is_adapted(strategy: Callable[[], st.FineTuningStrategy]) -> None:
    adapted = gf.adapt(nn.Linear(4, 2), strategy())
    assert all("." not in name for name in adapted.adapter)
    assert adapted(torch.ones(1, 4)).shape == (1, 2)


def test_a_linear_with_children_is_adapted_too() -> None:
    model = Wide(4, 2)
    model.extra = nn.Linear(4, 2)
    assert {"lora_A", "extra.lora_A"} <= set(gf.adapt(model, st.LoRALinearFineTuningStrategy()).adapter)


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.__name__)
def test_strategies_are_sequences_that_compare_and_pickle(kind: Callable[[], st.FineTuningStrategy]) -> None:
    strategy = kind()
    assert kind() == strategy
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert copy.deepcopy(strategy) == strategy
    assert len(list(strategy)) == len(strategy) == len(strategy.checks()) == len(strategy.actions())
    check, action, paras = strategy[0]
    assert strategy[:1] == [(check, action, paras)]
    assert is_pure(caps_of(strategy))
    with pytest.raises(IndexError, match="out of range"):
        strategy[len(strategy)]


def test_other_values_are_other_strategies() -> None:
    assert st.LoRALinearFineTuningStrategy(rank=2) != st.LoRALinearFineTuningStrategy(rank=3)
    assert st.LoRALinearFineTuningStrategy() != st.LoRAConvFineTuningStrategy()
    assert st.LoRALinearFineTuningStrategy() != "LoRALinearFineTuningStrategy"
    assert st.LoRAAllFineTuningStrategy() == st.LoRAFullFineTuningStrategy()


@pytest.mark.parametrize(("values", "needed"), [((0,), "rank of at least 1"), ((3, None, 1.5), "dropout is a probability")])
def test_bad_values_are_refused_when_the_strategy_is_made(values: Any, needed: str) -> None:
    with pytest.raises(gf.AdaptError, match=needed):
        st.LoRAFullFineTuningStrategy(*values)


# --- parameters of actions


def test_paras_are_defaults_with_customized_values() -> None:
    default: dict[str, dict[str, Any]] = {"sizes": {"width": 2}, "other": {"of": [1]}}
    rules = [(is_head, fts.a_replace(widen), "sizes")]
    strategy = st.FineTuningStrategy(rules, default, {"sizes": {"width": 5}})
    assert strategy.paras() == {"sizes": {"width": 5}, "other": {"of": [1]}}
    assert strategy[0] == (is_head, fts.a_replace(widen), {"width": 5})
    assert gf.adapt(net(), strategy).adapter["head.0.weight"].shape == (5, 4)
    assert default == {"sizes": {"width": 2}, "other": {"of": [1]}}


def test_nothing_leaks_between_strategies_or_out_of_one() -> None:
    default: dict[str, dict[str, Any]] = {"sizes": {"width": 2, "of": [1]}}
    rules: list[Any] = [(is_head, fts.a_replace(widen), "sizes")]
    first = st.FineTuningStrategy(rules, default)
    second = st.FineTuningStrategy(rules, default, {"sizes": {"width": 9}})
    custom = {"sizes": {"of": [5]}}
    third = st.FineTuningStrategy(rules, default, custom)
    given = {"of": [6]}
    fourth = st.FineTuningStrategy([(is_head, widen, given)])
    custom["sizes"]["of"].append(0)
    given["of"].append(0)
    assert third.paras() == {"sizes": {"width": 2, "of": [5]}}
    assert fourth.paras() == {"rule_0": {"of": [6]}}
    default["sizes"]["width"] = 7
    default["sizes"]["of"].append(2)
    first.paras()["sizes"]["of"].append(3)
    first[0][2]["of"].append(4)
    rules.append((always, widen))
    assert first.paras() == {"sizes": {"width": 2, "of": [1]}}
    assert second.paras() == {"sizes": {"width": 9, "of": [1]}}
    assert len(first) == len(second) == 1
    # GIFt's own leak: rules registered on one strategy appeared in a new one.
    assert len(st.FineTuningStrategy([])) == 0


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (([(is_head, fts.a_replace(widen), "sizes")],), "rule 0 takes the parameters 'sizes', which default_action_paras"),
        (([(is_head, widen, "sizes")], {"size": {}}), "the nearest are 'size'"),
        (([], {"sizes": {"width": 1}}, {"sizes": {"with": 1}}), "'sizes' has no parameter 'with' to customize.*'width'"),
        (([], {"sizes": {"width": 1}}, {"size": {"width": 1}}), "has 'size', which has no defaults.*'sizes'"),
        (([(is_head,)],), "rule 0 is not \\(check, action\\)"),
        ((["ab"],), "rule 0 is not \\(check, action\\)"),
        (([("head", widen)],), "rule 0 needs a check and an action that can be called"),
        (([(is_head, widen, 3)],), "the third part of rule 0 is the name"),
    ],
)
def test_bad_rules_and_paras_are_refused(arguments: tuple[Any, ...], needed: str) -> None:
    with pytest.raises(gf.AdaptError, match=needed):
        st.FineTuningStrategy(*arguments)


# --- merging and debugging


def test_merged_strategies_keep_order_and_parameters() -> None:
    linear, conv = st.LoRALinearFineTuningStrategy(rank=2), st.LoRAConvFineTuningStrategy(rank=1)
    merged = st.merger_strategy([linear, conv, st.LoRALinearFineTuningStrategy(rank=2)])
    assert [paras for *_, paras in merged] == [paras for *_, paras in [*linear, *conv, *linear]]
    assert set(merged.paras()) == {"lora_paras", "lora_paras_2"}
    assert merged.checks() == linear.checks() + conv.checks() + linear.checks()
    assert linear + conv == st.merger_strategy([linear, conv])
    assert linear + conv != conv + linear
    assert len(linear) == 1
    adapted = gf.adapt(net(), linear + conv)
    assert adapted.adapter["head.lora_A"].shape[0] == 2
    assert adapted.adapter["conv.lora_A"].shape[0] == 1
    assert st.LoRALinearFineTuningStrategy() + st.LoRAConvFineTuningStrategy() == st.LoRAFullFineTuningStrategy()


def test_of_merged_rules_the_first_that_holds_decides() -> None:
    head = st.FineTuningStrategy([(is_head, gf.Full())])
    adapted = gf.adapt(net(), head + st.LoRALinearFineTuningStrategy())
    assert set(adapted.adapter) == {"head.weight", "head.bias"}
    adapted = gf.adapt(net(), st.LoRALinearFineTuningStrategy(rank=1) + head)
    assert set(adapted.adapter) == {"head.lora_A", "head.lora_B"}


def test_rules_can_be_added_in_a_merge() -> None:
    merged = st.merger_strategy([st.LoRAConvFineTuningStrategy(rank=1)], [(is_head, fts.a_replace(widen), {"width": 7})])
    assert merged.paras()["rule_0"] == {"width": 7}
    assert gf.adapt(net(), merged).adapter["head.0.weight"].shape == (7, 4)


def test_bad_merges_are_refused() -> None:
    with pytest.raises(gf.AdaptError, match="nothing to merge"):
        st.merger_strategy([])
    with pytest.raises(TypeError, match="merges FineTuningStrategy instances, got a LoRA"):
        st.merger_strategy([gf.LoRA()])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="unsupported operand"):
        st.LoRALinearFineTuningStrategy() + gf.LoRA()  # type: ignore[operator]


def test_debugging_tells_which_check_holds_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    strategy = st.LoRAFullFineTuningStrategy(rank=1)
    told = st.DeBugStrategy(strategy)
    adapted = gf.adapt(net(), told, generator=torch.Generator().manual_seed(1))
    assert capsys.readouterr().out.splitlines() == [
        "check 2 holds: name 'conv', global name 'conv', class Conv2d",
        "check 1 holds: name 'line', global name 'inner.line', class Conv1d",
        "check 0 holds: name 'head', global name 'head', class Linear",
    ]
    plain = gf.adapt(net(), strategy, generator=torch.Generator().manual_seed(1))
    assert adapted.strategy == plain.strategy
    assert all(map(torch.equal, adapted.parameters(), plain.parameters()))
    assert told.paras() == strategy.paras()
    assert pickle.loads(pickle.dumps(told)) == told
    assert is_pure(caps_of(told))


# --- factories


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (fts.c_name_func("head"), True), (fts.c_name_equal("body.head"), False), (fts.c_name_equal("hea"), False),
        (fts.c_name_in(["tail", "head"]), True), (fts.c_name_in({"tail"}), False),
        (fts.c_cname_func("Wide"), True), (fts.c_cname_equal("Linear"), False),
        (fts.c_cname_in(("Linear", "Wide")), True), (fts.c_cname_in(["Linear"]), False),
        (fts.c_type(nn.Linear), True), (fts.c_type(nn.Conv1d, nn.Bilinear), False),
    ],
)  # fmt: skip
def test_checks(check: Callable[..., bool], holds: bool) -> None:
    layer = Wide(2, 2)
    assert check(nn.Sequential(layer), "head", "body.head", "Wide", layer) is holds
    assert pickle.loads(pickle.dumps(check)) == check
    assert hash(pickle.loads(pickle.dumps(check))) == hash(check)


def test_bad_arguments_of_factories_are_refused() -> None:
    with pytest.raises(TypeError, match=r"c_name_in takes several names.*c_name_equal takes one"):
        fts.c_name_in("q_proj")
    with pytest.raises(TypeError, match=r"c_cname_in takes several names.*c_cname_equal takes one"):
        fts.c_cname_in("Linear")
    with pytest.raises(TypeError, match="c_cname_equal takes one name"):
        fts.c_cname_func(["Linear"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a_adapt takes a method"):
        fts.a_adapt_func("LoRA")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a_adapt takes a method"):
        fts.a_adapt_func(nn.Linear)  # type: ignore[arg-type]


def test_actions_replace_or_adapt_with_the_rules_parameters() -> None:
    layer = nn.Linear(4, 2)
    where = (nn.Sequential(layer), "0", "0", "Linear", layer)
    assert isinstance(fts.a_replace_func(widen)(*where, width=3)[0], nn.Linear)
    assert fts.a_adapt_func(gf.LoRA)(*where, rank=2) == gf.LoRA(rank=2)
    assert fts.a_adapt_func(gf.LoRA(rank=2, alpha=4.0))(*where, rank=3) == gf.LoRA(rank=3, alpha=4.0)
    assert fts.a_adapt_func(gf.Full())(*where) == gf.Full()
    assert fts.a_adapt_func(lambda layer_obj, s: gf.LoRA(layer_obj.in_features // s))(*where, s=2) == gf.LoRA(rank=2)
    for action in (fts.a_replace(widen), fts.a_adapt(gf.LoRA), fts.a_adapt(gf.LoRA(rank=2)), fts.a_adapt(widen)):  # type: ignore[arg-type]
        assert pickle.loads(pickle.dumps(action)) == action
    with pytest.raises(gf.AdaptError, match=r"widen is to adapt '0' and must return a method.* returned a Sequential"):
        fts.a_adapt(widen)(*where)  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="is to replace '0' and must return a module, but it returned a Parameter"):
        fts.a_replace(lambda layer_obj: layer_obj.weight)(*where)
    with pytest.raises(gf.AdaptError, match="LoRA has no field 'lora_rank'"):
        fts.a_adapt(gf.LoRA(rank=2))(*where, lora_rank=3)


def test_only_actions_that_cannot_write_spare_the_copy() -> None:
    rules: list[Any] = [(always, fts.a_adapt(gf.LoRA), {}), (always, fts.a_adapt(gf.Full()), {})]
    assert is_pure(rules)
    assert not is_pure([*rules, (always, fts.a_replace(widen), {})])
    assert not is_pure([*rules, (always, fts.a_adapt(lambda layer_obj: gf.Full()), {})])


# --- what actions do to the private copy


def set_on_parent(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> None:
    setattr(parent_module, name, widen(layer_obj))


def give_module(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> nn.Module:
    return widen(layer_obj)


def write_data(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> None:
    assert isinstance(layer_obj, nn.Linear)
    layer_obj.weight.data.mul_(2.0)


def write_in_place(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> None:
    assert isinstance(layer_obj, nn.Linear)
    nn.init.zeros_(layer_obj.weight)


def wrap(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> nn.Module:
    return nn.Sequential(layer_obj, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("action", "names"),
    [
        (set_on_parent, ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]),
        (give_module, ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]),
        (fts.a_replace(widen), ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]),
        (write_data, ["head.weight"]),
        (write_in_place, ["head.weight"]),
        (wrap, ["head.1.weight", "head.1.bias"]),
    ],
)
def test_what_an_action_makes_is_the_adapter_and_the_model_never_feels_it(action: Any, names: list[str]) -> None:
    model = net()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, answer = census(model), model.eval()(image())
    model.train()
    adapted = gf.adapt(model, [(is_head, action)])
    assert list(adapted.adapter) == names
    assert all(parameter.requires_grad for parameter in adapted.parameters())
    assert adapted.strategy is None
    assert not torch.equal(adapted.eval()(image()), answer)
    torch.testing.assert_close(adapted.base(image()), answer)

    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    start = {name: parameter.clone() for name, parameter in adapted.adapter.items()}
    adapted.train()(image()).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(start[name], parameter) for name, parameter in adapted.adapter.items())

    wanted = adapted.eval()(image())
    state = adapted.adapter_state_dict()
    assert set(names) <= set(state)
    for other in (
        adapted.with_adapter(state),
        adapted.merge().eval(),
        copy.deepcopy(adapted),
        pickle.loads(pickle.dumps(adapted)),
        gf.adapt(model, [(is_head, action)]).with_adapter(state).eval(),
    ):
        torch.testing.assert_close(other(image()), wanted)
    pure = gf.functional_call(adapted, start, (image(),))
    assert not torch.equal(pure, wanted)
    assert_same(model, before)


def test_a_written_parameter_holds_what_was_written() -> None:
    model = net()
    adapted = gf.adapt(model, [(is_head, write_data)])
    assert torch.equal(adapted.adapter["head.weight"], 2 * model.head.weight)
    assert adapted.adapter["head.weight"].data_ptr() != model.head.weight.data_ptr()
    merged = adapted.merge()
    assert isinstance(merged, Net)
    assert torch.equal(merged.head.weight, 2 * model.head.weight)


def test_writing_the_value_that_was_there_counts_as_a_write() -> None:
    model = net()
    nn.init.zeros_(model.head.weight)
    assert list(gf.adapt(model, [(is_head, write_in_place)]).adapter) == ["head.weight"]


def test_the_walk_passes_over_what_actions_put_in_or_take_out() -> None:
    def rebuild(parent: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> None:
        seen.append(global_name)
        parent.add_module("head", nn.Linear(4, 2))
        parent.add_module("extra", nn.Conv2d(1, 1, 1))
        del parent._modules["norm"]
        parent.add_module("norm", nn.BatchNorm2d(3))

    seen: list[str] = []
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    adapted = gf.adapt(net(), [(fts.c_type(*kinds), rebuild)])
    assert seen == ["conv"]
    assert set(adapted.adapter) == {f"{layer}.{kind}" for layer in ("head", "extra", "norm") for kind in ("weight", "bias")}


def test_a_change_that_is_no_parameter_is_kept_and_known() -> None:
    def slower(parent: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> None:
        setattr(layer_obj, "eps", 1.0)  # noqa: B010

    model = net().eval()
    rules = [(fts.c_name_equal("norm"), slower), *st.LoRALinearFineTuningStrategy()]
    adapted = gf.adapt(model, rules)
    assert adapted.strategy is None  # the placements alone would not lead to this network
    assert not torch.allclose(adapted(image()), model(image()))
    assert model.norm.eps == 1e-5


def test_parameters_that_cannot_be_trained_are_handed_out_too() -> None:
    model = net()
    model.codes = nn.Parameter(torch.arange(3), requires_grad=False)
    adapted = gf.adapt(model, [(is_head, give_module)])
    assert "codes" not in adapted.adapter
    assert torch.equal(adapted.codes, model.codes)


def test_what_an_action_leaves_alone_stays_shared_and_frozen() -> None:
    model = net()
    adapted = gf.adapt(model, [(is_head, wrap)])
    inner = adapted.head[0]
    assert inner.weight.data_ptr() == model.head.weight.data_ptr()
    assert not inner.weight.requires_grad
    assert num_trainable_parameters(adapted) == 6


def test_new_buffers_are_saved_with_the_adapter() -> None:
    model = net()
    rules = [(fts.c_name_equal("norm"), fts.a_replace(lambda layer_obj: nn.BatchNorm2d(layer_obj.num_features, momentum=0.9)))]
    adapted = gf.adapt(model, rules).train()
    adapted(image())
    state = adapted.adapter_state_dict()
    assert {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"} <= set(state)
    again = gf.adapt(model, rules).with_adapter(state)
    torch.testing.assert_close(again.eval()(image()), adapted.eval()(image()))


def test_a_frozen_parameter_of_a_new_module_is_kept_and_not_trained() -> None:
    def half_frozen(layer_obj: nn.Module) -> nn.Module:
        made = nn.Linear(4, 2)
        made.bias.requires_grad_(False)
        return made

    adapted = gf.adapt(net(), [(is_head, fts.a_replace(half_frozen))])
    assert list(adapted.adapter) == ["head.weight", "head.bias"]
    assert [name for name, _ in adapted.named_trainable_parameters()] == ["head.weight"]


def test_an_action_may_leave_a_module_to_no_later_rule() -> None:
    leave = [(fts.c_name_equal("conv"), lambda *where: None)]
    adapted = gf.adapt(net(), [*leave, *st.LoRAFullFineTuningStrategy()])
    assert [name for name in adapted.adapter if "lora_A" in name] == ["inner.line.lora_A", "head.lora_A"]


def test_the_whole_model_may_be_replaced() -> None:
    model = nn.Linear(4, 2)
    adapted = gf.adapt(model, [(always, fts.a_replace(widen), {"width": 3})])
    assert list(adapted.adapter) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert adapted(torch.ones(1, 4)).shape == adapted.base(torch.ones(1, 4)).shape == (1, 2)


def test_a_module_in_two_places_is_replaced_by_one() -> None:
    model = Tied()
    calls: list[str] = []

    def action(layer_obj: nn.Module) -> nn.Module:
        calls.append("called")
        return nn.Linear(4, 4)

    adapted = gf.adapt(model, [(fts.c_type(nn.Linear), fts.a_replace(action))])
    assert calls == ["called", "called"]  # head and mix; block.0 is mix
    assert list(adapted.adapter) == ["head.weight", "head.bias", "mix.weight", "mix.bias"]
    assert adapted.mix is adapted.block[0]
    assert adapted(torch.tensor([1, 2])).shape == (2, 4)


def test_tied_parameters_are_adapted_once() -> None:
    adapted = gf.adapt(Tied(), st.LoRALinearFineTuningStrategy(rank=1))
    assert set(adapted.adapter) == {"table.lora_A", "table.lora_B", "mix.lora_A", "mix.lora_B"}


def test_new_modules_draw_from_the_generator() -> None:
    model, state = net(), torch.get_rng_state()
    drawn = [
        gf.adapt(model, [(is_head, give_module)], generator=torch.Generator().manual_seed(seed)).adapter["head.0.weight"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_an_adapted_model_takes_the_seeds_strategies_on_top() -> None:
    first = gf.adapt(net(), gf.LoRA(rank=2, init="random")).eval()
    before = first(image())
    for strategy in (st.LoRALinearFineTuningStrategy(), st.FullFineTuningStrategy(), [(is_head, wrap)]):
        second = gf.adapt(first, strategy).eval()
        torch.testing.assert_close(second.base(image()), before)
        if isinstance(strategy, st.FineTuningStrategy):
            torch.testing.assert_close(second(image()), before)
        second(image()).sum().backward()
    assert torch.equal(first(image()), before)
    assert all(parameter.grad is None for parameter in first.parameters())


# --- what cannot be


def of_type(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> Any:
    return gf.LoRA


def replace_sibling(parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> None:
    setattr(parent_module, "conv", nn.Conv2d(1, 3, 3))  # noqa: B010


@pytest.mark.parametrize(
    ("rules", "needed"),
    [
        (
            [(never, give_module)],
            "no check of the strategy's 1 rules holds for any module.*BatchNorm2d, Conv1d, Conv2d, Linear",
        ),
        ([(is_head, lambda *where: None)], "actions of the strategy ran for 1 modules, but none replaced or changed"),
        ([(is_head, lambda *where: True)], "the action for head returned a bool: an action returns a module, a method"),
        ([(is_head, of_type)], "the action for head returned LoRA itself"),
        ([(is_head, lambda *where: {"wait": gf.Full()})], "gave a method for 'wait' of head, a Linear, which has weight, bias"),
        ([(is_head, lambda *where: {"bias": gf.LoRA()})], "cannot adapt 'head.bias': it needs a parameter of at least 2"),
        ([(fts.c_name_equal("norm"), fts.a_adapt(gf.LoRA()))], r"LoRA\(\) cannot adapt any parameter of norm, a BatchNorm2d"),
        ([(is_head, lambda *where: gf.Bottleneck())], r"Bottleneck\(\) for head, a Linear, which adapts no parameter.*pattern"),
        ([(is_head, lambda *where: nn.LazyLinear(2))], "made 'head.weight', which is not initialised yet"),
        (
            [(fts.c_name_equal("conv"), fts.a_adapt(gf.LoRA(rank=1))), (is_head, replace_sibling)],
            "gave a method for 'conv.weight', and another one replaced",
        ),
        ([(is_head, give_module, {}, 1)], "a rule is \\(check, action\\) or \\(check, action, paras\\), got 4 parts"),
    ],
)
def test_bad_rules_change_nothing_and_say_why(rules: Any, needed: str) -> None:
    model = net()
    before = census(model)
    with pytest.raises(gf.AdaptError, match=needed):
        gf.adapt(model, rules)
    assert_same(model, before)


def test_a_method_and_a_write_to_the_same_parameter_are_refused() -> None:
    def both(parent: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> gf.Method:
        write_data(parent, name, global_name, class_name, layer_obj)
        return gf.LoRA(rank=1)

    with pytest.raises(gf.AdaptError, match=r"LoRA\(rank=1\) was given for 'head.weight', and an action wrote to that"):
        gf.adapt(net(), [(is_head, both)])


def test_a_tied_parameter_whose_other_place_is_replaced_is_refused() -> None:
    rules = [(fts.c_name_equal("table"), lambda *where: nn.Embedding(6, 4)), (is_head, fts.a_adapt(gf.LoRA(rank=1)))]
    with pytest.raises(gf.AdaptError, match=r"gave a method for 'head.weight', and another one replaced 'table.weight'"):
        gf.adapt(Tied(), rules)


def test_a_computed_weight_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(gf.AdaptError, match=r"weight of 0, a Parametrized.*, is computed from other parameters"):
        gf.adapt(model, st.LoRALinearFineTuningStrategy())


# --- counting


def test_counts() -> None:
    model = net()
    own = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(model) == num_trainable_parameters(model) == own
    model.shift.requires_grad_(False)
    assert num_trainable_parameters(model) == own - 3
    assert [id(p) for p in trainable_parameters(model)] == [id(p) for p in model.parameters() if p is not model.shift]
    adapted = gf.adapt(model, st.LoRALinearFineTuningStrategy(rank=1))
    assert num_trainable_parameters(adapted) == 4 + 2
    assert num_parameters(adapted) == own + 4 + 2
    assert [id(p) for p in trainable_parameters(adapted)] == [id(p) for p in adapted.trainable_parameters()]
    assert num_parameters(Tied()) == 6 * 4 + 4 * 4 + 4
