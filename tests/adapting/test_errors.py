"""Bad input: what was needed, what was given, where, and what to do; and nothing has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.census import unchanged
from helpers.models import BY_NAME, MLP, Tied, gpt2, shake
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gift_func as gf
from gift_func.methods.method import Method

LORA = gf.LoRA(rank=2)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(torch.jit.script(nn.Linear(3, 3)))


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))


def spectral_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)), nn.Conv2d(3, 3, 3))


def old_weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))


def whole_numbers() -> nn.Module:
    module = nn.Module()
    module.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return module


class Uncopyable:
    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise RuntimeError("a handle to the outside")


def uncopyable() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3))
    module.handle = Uncopyable()  # type: ignore[assignment]
    return module


ADAPT: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "a pattern matches nothing": (MLP, {"layers.O": LORA}, r"matches nothing.*Patterns are globs.*nearest are .*'layers\.0'"),
    "a misspelt parameter": (
        MLP,
        {"layers.0.wieght": LORA},
        r"matches nothing in a model of 4 parameters.*'layers\.0\.weight'",
    ),
    "a second pattern matches nothing": (
        MLP,
        {"*.bias": gf.Full(), "*.q_proj": LORA},
        r"rule 1 \(name\('\*\.q_proj'\): LoRA.*matches nothing",
    ),
    "a regex matches nothing": (
        MLP,
        gf.Strategy([(gf.select.regex(r"layer\.\d"), LORA)]),
        r"regex\('layer.*matches nothing.*layers",
    ),
    "a type matches nothing": (
        MLP,
        gf.Strategy([(gf.select.type_(nn.Conv2d), LORA)]),
        r"type_\(torch.*Conv2d\).*matches nothing",
    ),
    "a function matches nothing": (
        MLP,
        gf.Strategy([(lambda site: False, LORA)]),
        r"matches nothing in a model of 4 parameters",
    ),
    "a composed selector matches nothing": (
        MLP,
        gf.Strategy([(gf.select.name("*.0") & gf.select.name("*.2"), LORA)]),
        r"&.*matches nothing",
    ),
    "no usual site": (lambda: nn.LayerNorm(3), LORA, r"usual sites.*matches nothing.*Name a parameter to adapt it.*'weight'"),
    "an embedding has no usual site": (lambda: nn.Embedding(3, 3), gf.SVDiff(), r"usual sites.*Name a parameter.*'weight'"),
    "a model without parameters": (nn.Tanh, LORA, r"matches nothing in a model of 0 parameters.*there are none"),
    "a shadowed rule": (
        MLP,
        {"layers.*": LORA, "layers.0.weight": gf.SVDiff()},
        r"rule 1.*takes nothing: earlier rules take all.*Move it up",
    ),
    "LoRA on a bias": (
        MLP,
        {"*.bias": LORA},
        r"cannot adapt 'layers\.0\.bias' of Linear: it needs a parameter of at least 2 dim.*shape \(8,\)",
    ),
    "LoRA on LayerNorm": (
        lambda: nn.LayerNorm(3),
        {"weight": LORA},
        r"cannot adapt 'weight' of LayerNorm.*at least 2 dimensions",
    ),
    "SVDiff on a bias": (MLP, {"*.bias": gf.SVDiff()}, r"cannot adapt 'layers\.0\.bias'.*at least 2 dimensions"),
    "a number that is no float": (
        whole_numbers,
        {"codes": LORA},
        r"cannot adapt 'codes'.*a floating-point parameter.*torch\.int8",
    ),
    "Full on whole numbers": (whole_numbers, {"codes": gf.Full()}, r"cannot adapt 'codes'.*floating-point"),
    "dropout on an RNN": (
        lambda: nn.LSTM(3, 3),
        {"weight_ih_l0": gf.LoRA(rank=1, dropout=0.1)},
        r"'weight_ih_l0' of LSTM: it needs dropout=0",
    ),
    "a lazy module": (conv, LORA, r"3\.weight of LazyLinear is not initialised yet.*Run the model once on a real input"),
    "a scripted module": (scripted, LORA, r"0 is a scripted module.*Adapt the Python module it was made from"),
    "weight_norm": (
        weight_normed,
        LORA,
        r"0\.weight of Parametrized\w* is computed from other parameters.*remove_parametrizations",
    ),
    "spectral_norm": (
        spectral_normed,
        LORA,
        r"0\.weight of Parametrized\w* is computed from other parameters.*remove_parametrizations",
    ),
    "old weight_norm": (old_weight_normed, LORA, r"0\.weight of Linear is computed from other parameters"),
    "an attribute that cannot be copied": (
        uncopyable,
        LORA,
        r"attribute 'handle' of the model \(Sequential\) holds a Uncopyable.*outside",
    ),
    "an empty dict": (MLP, {}, r"a strategy needs at least one rule"),
    "an empty list": (MLP, [], r"a strategy needs at least one rule"),
    "rules of GIFt that never hold": (
        MLP,
        [(lambda *_: False, lambda *_: None)],
        r"no check of the strategy's 1 rules holds.*Linear, MLP, Sequential, Tanh",
    ),
    "an action that returns a number": (MLP, [(lambda *_: True, lambda *_: 3)], r"the action for '?layers'? returned a int"),
    "a rule of four parts": (
        MLP,
        [(lambda *_: True, lambda *_: None, {}, 1)],
        r"\(check, action\) or \(check, action, paras\), got 4 parts",
    ),
}


@pytest.mark.parametrize("case", list(ADAPT))
def test_adapt_refuses(case: str) -> None:
    make, strategy, message = ADAPT[case]
    model = make()
    with pytest.raises(gf.AdaptError, match=f"(?s){message}") as caught:
        gf.adapt(model, strategy)
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "case", ["a pattern matches nothing", "LoRA on a bias", "a shadowed rule", "an action that returns a number"]
)
def test_a_refusal_changes_nothing(case: str) -> None:
    make, strategy, _ = ADAPT[case]
    model = make()
    with unchanged(model, rng=True), pytest.raises(gf.AdaptError, match=r".+"):
        gf.adapt(model, strategy)


TYPES: dict[str, tuple[Any, Any, str]] = {
    "a model that is none": (torch.randn, LORA, r"adapt takes a torch\.nn\.Module, got a builtin"),
    "a state dict for a model": ({}, LORA, r"adapt takes a torch\.nn\.Module, got a dict"),
    "None": (MLP(), None, r"a strategy is a method .*not None"),
    "a string": (MLP(), "*.q_proj", r"a strategy is a method .*not '\*\.q_proj'"),
    "a class": (MLP(), gf.LoRA, r"a strategy is a method"),
    "a number": (MLP(), 8, r"a strategy is a method .*not 8"),
    "a dict to a class": (
        MLP(),
        {"*": gf.LoRA},
        r"the right side of a rule is a method such as gf\.LoRA\(rank=8\), got <class",
    ),
    "a dict to a number": (MLP(), {"*": 8}, r"the right side of a rule is a method .*got 8"),
    "a rule that is no pair": (MLP(), [3], r"rules are pairs .*got 3"),
    "a key that is no selector": (
        MLP(),
        {3: LORA},
        r"a selector is a glob, a gf\.select selector or a function of a Site, not a int",
    ),
}


@pytest.mark.parametrize("case", list(TYPES))
def test_adapt_refuses_by_type(case: str) -> None:
    model, strategy, message = TYPES[case]
    with pytest.raises(TypeError, match=message):
        gf.adapt(model, strategy)


METHODS: dict[str, tuple[Callable[[], object], str]] = {
    "rank 0": (lambda: gf.LoRA(rank=0), r"rank.*at least 1.*0"),
    "rank below 0": (lambda: gf.LoRA(rank=-2), r"rank.*-2"),
    "a rank that is no number": (lambda: gf.LoRA(rank=2.0), r"rank.*2\.0"),  # type: ignore[arg-type]
    "a rank that is a bool": (lambda: gf.LoRA(rank=True), r"rank.*True"),
    "rank 0 in a pattern": (lambda: gf.LoRA(rank_pattern={"q_proj": 0}), r"rank.*q_proj.*0|0.*q_proj"),
    "dropout 1": (lambda: gf.LoRA(dropout=1.0), r"dropout.*1\.0"),
    "dropout below 0": (lambda: gf.LoRA(dropout=-0.1), r"dropout.*-0\.1"),
    "an unknown init": (lambda: gf.LoRA(init="zeros"), r"init.*kaiming.*zeros"),
    "an unknown conv": (lambda: gf.LoRA(conv="flat"), r"conv.*kernel.*flat"),  # type: ignore[arg-type]
    "an odd rank with orthogonal": (lambda: gf.LoRA(rank=3, init="orthogonal"), r"orthogonal.*even|even.*orthogonal"),
    "an unknown conv of SVDiff": (lambda: gf.SVDiff(conv="kernel"), r"conv is one of balanced, rows.*kernel"),  # type: ignore[arg-type]
    "a bad regex": (lambda: gf.select.regex("(unclosed"), r"regex\('\(unclosed'\) is not a regular expression"),
    "no rules": (lambda: gf.Strategy([]), r"a strategy needs at least one rule"),
    "an unknown method": (lambda: Method.from_dict({"method": "LoRa"}), r"there is no method 'LoRa'; the nearest are 'LoRA'"),
    "no method at all": (lambda: Method.from_dict({}), r"there is no method None"),
    "an unknown field": (
        lambda: Method.from_dict({"method": "LoRA", "rnak": 3}),
        r"LoRA has no field 'rnak'; the nearest are 'rank'",
    ),
    "a bad value": (lambda: Method.from_dict({"method": "LoRA", "rank": 0}), r"rank.*0"),
    "a field of a bad type": (
        lambda: Method.from_dict({"method": "LoRA", "rank_pattern": 3}),
        r"LoRA cannot be made from|rank_pattern",
    ),
    "an element type that is none": (
        lambda: Method.from_dict({"method": "LoRA", "dtype": "torch.nothing"}),
        r"dtype|torch\.nothing",
    ),
    "an element type that is a function": (
        lambda: Method.from_dict({"method": "LoRA", "dtype": "torch.load"}),
        r"dtype|torch\.load",
    ),
    "no strategy": (lambda: gf.Strategy.from_dict({"rule": []}), r"not a strategy"),
    "a strategy of numbers": (lambda: gf.Strategy.from_dict({"rules": [3]}), r"not a strategy"),
    "a strategy that is a list": (lambda: gf.Strategy.from_dict([]), r"not a strategy"),  # type: ignore[arg-type]
    "an unknown selector": (
        lambda: gf.Strategy.from_dict({"rules": [{"select": {"nam": "*"}, "method": {"method": "Full"}}]}),
        r"\{'nam': '\*'\} is no selector: expected one of the keys name, regex, type",
    ),
    "a selector of a bad value": (lambda: gf.select.from_dict({"name": 3}), r"is no selector"),
    "a function to plain data": (
        lambda: gf.Strategy([(lambda site: True, gf.Full())]).to_dict(),
        r"a Python function, which cannot be written as plain data\. Use gf\.select\.name",
    ),
    "a function inside to plain data": (
        lambda: (gf.select.name("*") & (lambda site: True)).to_dict(),
        r"cannot be written as plain data",
    ),
}


@pytest.mark.parametrize("case", list(METHODS))
def test_methods_and_strategies_refuse(case: str) -> None:
    make, message = METHODS[case]
    with pytest.raises(gf.AdaptError, match=message):
        make()


RULE_TYPES: dict[str, tuple[Any, str]] = {
    "a rule of one part": ([("*",)], r"a rule is a pair \(selector, method\), got \('\*',\)"),
    "a rule that is a string": (["*"], r"a rule is a pair .*got '\*'"),
    "a number for a selector": ([(3, LORA)], r"not a int"),
    "a class for a method": ([("*", gf.LoRA)], r"the right side of a rule is a method"),
}


@pytest.mark.parametrize("case", list(RULE_TYPES))
def test_strategies_refuse_by_type(case: str) -> None:
    rules, message = RULE_TYPES[case]
    with pytest.raises(TypeError, match=message):
        gf.Strategy(rules)


def test_methods_take_keywords_after_the_first() -> None:
    with pytest.raises(TypeError, match="positional"):
        gf.LoRA(4, 8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="rnak"):
        gf.LoRA(rnak=3)  # type: ignore[call-arg]


def test_methods_are_frozen() -> None:
    with pytest.raises(AttributeError, match="rank"):
        LORA.rank = 3  # type: ignore[misc]


# Tensors that do not fit.


@pytest.fixture
def adapted() -> gf.AdaptedModel:
    return gf.adapt(BY_NAME["mlp"].model(), gf.LoRA(rank=2, init="random"))


X = torch.ones(2, 6, dtype=torch.float64)
State = dict[str, Tensor]

BAD_STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "an unknown name": (
        lambda s: {**s, "layers.0.lora_C": torch.zeros(2)},
        r"no 'layers\.0\.lora_C'; the nearest are 'layers\.0\.lora_",
    ),
    "a missing name": (
        lambda s: {n: t for n, t in s.items() if n != "layers.0.lora_A"},
        r"lacks 1 of the adapter's 4 tensors, 'layers\.0\.lora_A'",
    ),
    "nothing": (lambda s: {}, r"lacks 4 of the adapter's 4 tensors.*there are none"),
    "a wrong shape": (
        lambda s: {**s, "layers.0.lora_A": torch.zeros(3, 6)},
        r"'layers\.0\.lora_A' has shape \(2, 6\) in this adapter and \(3, 6\)",
    ),
    "a prefix": (lambda s: {f"model.{n}": t for n, t in s.items()}, r"lacks 4 of.*nearest are 'model\.layers"),
}


@pytest.mark.parametrize("case", list(BAD_STATES))
@pytest.mark.parametrize("way", ["with_adapter", "load_adapter_state_dict"])
def test_states_that_do_not_fit_are_refused_whole(adapted: gf.AdaptedModel, case: str, way: str) -> None:
    change, message = BAD_STATES[case]
    before = {name: tensor.clone() for name, tensor in adapted.adapter_state_dict().items()}
    bad = change({name: torch.zeros_like(tensor) for name, tensor in before.items()})
    with pytest.raises(gf.StateError, match=message):
        getattr(adapted, way)(bad)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.adapter_state_dict().items())


def test_a_wrong_shape_is_refused_without_strict_too(adapted: gf.AdaptedModel) -> None:
    with pytest.raises(gf.StateError, match=r"has shape \(2, 6\)"):
        adapted.load_adapter_state_dict({"layers.0.lora_A": torch.zeros(1)}, strict=False)


CALLS: dict[str, tuple[Callable[[gf.AdaptedModel, State], object], str]] = {
    "an unknown name": (
        lambda a, s: gf.functional_call(a, {"layers.0.lora_C": X}, X),
        r"no 'layers\.0\.lora_C'; the nearest are",
    ),
    "the base's own name": (lambda a, s: gf.functional_call(a, {"layers.0.weight": X}, X), r"no 'layers\.0\.weight'"),
    "twice": (lambda a, s: gf.functional_call(a, [s, s], X), r"'layers\.0\.lora_B' is given twice"),
    "twice by two names": (
        lambda a, s: gf.functional_call(a, [{"layers.0.lora_A": s["layers.0.lora_A"]}, dict(a.named_parameters())], X),
        r"given twice",
    ),
    "not all": (
        lambda a, s: gf.functional_call(a, {"layers.0.lora_A": s["layers.0.lora_A"]}, X, strict=True),
        r"'layers\.0\.lora_B' is missing",
    ),
}


@pytest.mark.parametrize("case", list(CALLS))
def test_functional_call_refuses(adapted: gf.AdaptedModel, case: str) -> None:
    call, message = CALLS[case]
    with pytest.raises(gf.StateError, match=message):
        call(adapted, dict(adapted.adapter.items()))


def test_functional_call_of_another_module() -> None:
    with pytest.raises(TypeError, match=r"expected an AdaptedModel, got a MLP; use torch\.func\.functional_call"):
        gf.functional_call(MLP(), {}, X)  # type: ignore[arg-type]


def test_a_wrong_shape_in_functional_call_is_an_error(adapted: gf.AdaptedModel) -> None:
    with pytest.raises((gf.StateError, RuntimeError), match=r"layers\.0\.lora_A|shape"):
        gf.functional_call(adapted, {"layers.0.lora_A": torch.zeros(2, 7, dtype=torch.float64)}, X)


def test_the_adapters_names_are_fixed(adapted: gf.AdaptedModel) -> None:
    with pytest.raises(KeyError, match=r"no 'layers\.0\.lora_C'; the nearest are 'layers\.0\.lora_"):
        adapted.adapter["layers.0.lora_C"]
    with pytest.raises(KeyError, match=r"no 'new'"):
        adapted.adapter["new"] = X
    with pytest.raises(gf.StateError, match=r"holds a tensor of shape \(2, 6\), got \(3, 6\)"):
        adapted.adapter["layers.0.lora_A"] = torch.zeros(3, 6)
    with pytest.raises(gf.StateError, match=r"got float"):
        adapted.adapter["layers.0.lora_A"] = 0.5
    for remove in (
        lambda: adapted.adapter.clear(),
        lambda: adapted.adapter.pop("layers.0.lora_A"),
        lambda: adapted.adapter.popitem(),
    ):
        with pytest.raises(TypeError, match="names are fixed"):
            remove()
    with pytest.raises(TypeError, match="names are fixed"):
        del adapted.adapter["layers.0.lora_A"]
    assert len(adapted.adapter) == 4
    adapted(X)


def test_what_is_not_there_is_said_so(adapted: gf.AdaptedModel) -> None:
    with pytest.raises(AttributeError, match=r"neither AdaptedModel nor the adapted MLP has 'generate'"):
        adapted.generate  # noqa: B018
    with pytest.raises(AttributeError, match="nothing"):
        adapted.base.nothing  # noqa: B018


def test_a_models_own_error_comes_through(adapted: gf.AdaptedModel) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adapted(torch.ones(2, 7, dtype=torch.float64))
    with pytest.raises(TypeError, match="unexpected keyword"):
        adapted(X, mask=None)


def test_a_forward_that_writes_to_its_weight_is_refused() -> None:
    class Writer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
            return super().forward(x)

    model = Writer(3, 3)
    with unchanged(model):
        adapted = gf.adapt(model, LORA)
        with pytest.raises(gf.AdaptError, match=r"clamp_'? would write to an adapted weight of shape \(3, 3\)"):
            adapted(torch.ones(1, 3))


# Parametrized weights work where they are named by what is really there.


@pytest.mark.parametrize("make", [weight_normed, spectral_normed])
def test_what_a_parametrization_is_computed_from_may_be_named(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(2, 3, dtype=torch.float64) if make is weight_normed else torch.randn(1, 3, 6, 6, dtype=torch.float64)
    with unchanged(model):
        adapted = gf.adapt(model, {"0.parametrizations.weight.original*": gf.Full(), "1": LORA}).eval()
        assert torch.allclose(adapted(x), model(x), atol=1e-12, rtol=0)
        shake(adapted)
        assert not torch.allclose(adapted(x), model(x), atol=1e-3, rtol=0)
        assert torch.allclose(adapted.merge()(x), adapted(x), atol=1e-12, rtol=0)
        adapted(x).sum().backward()
        assert all(p.grad is not None for p in adapted.parameters())


@pytest.mark.parametrize("make", [weight_normed, spectral_normed, old_weight_normed])
def test_a_parametrized_neighbour_is_left_alone(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(2, 3, dtype=torch.float64) if make is not spectral_normed else torch.randn(1, 3, 6, 6, dtype=torch.float64)
    wanted = model(x).detach()
    with unchanged(model):
        adapted = gf.adapt(model, {"1.weight": gf.LoRA(rank=2, init="random")})
        assert torch.allclose(adapted.base(x), wanted, atol=1e-12, rtol=0)
        assert torch.allclose(adapted.merge()(x), adapted(x), atol=1e-12, rtol=0)
        adapted.train()
        adapted(x)


# Near misses that are no errors.


def test_a_tied_weight_is_no_conflict() -> None:
    adapted = gf.adapt(Tied(), {"head": LORA, "body": LORA})
    assert len(adapted.adapted_parameters) == 2


def test_a_rule_that_is_partly_shadowed_is_fine() -> None:
    adapted = gf.adapt(MLP(), {"layers.0.weight": gf.SVDiff(), "*.weight": LORA})
    assert set(adapted.adapter) == {"layers.0.spectral_shift", "layers.2.lora_A", "layers.2.lora_B"}


def test_two_sites_that_would_share_a_name_are_refused() -> None:
    model = nn.Module()
    model.a = nn.Linear(3, 3)
    model.a.register_parameter("lora_A", nn.Parameter(torch.zeros(2, 3)))
    with pytest.raises(gf.AdaptError, match=r"two adapted parameters would both name a tensor 'a\.lora_A'"):
        gf.adapt(model, {"a.weight": LORA, "a.lora_A": gf.Full()})


def test_gpt2_says_what_its_modules_are_called() -> None:
    with pytest.raises(gf.AdaptError, match=r"'\*\.q_proj'.*matches nothing"):
        gf.adapt(gpt2(), {"*.q_proj": LORA})
