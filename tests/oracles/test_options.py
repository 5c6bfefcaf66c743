"""How methods are constructed: typed keyword arguments, one of them called `init` as their function is."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import gift_func as gf
from gift_func.methods.options import FrozenMap
from gift_func.weights import Dense, Weight

METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (gf.LoRA, {"init": "olora", "rank_pattern": {"a": 3}, "alpha_pattern": {"b": 2.0}}),
    (gf.DoRA, {"init": "gaussian", "detach_norm": False, "rank_pattern": {"a": 3}}),
    (gf.MixingLoRA, {"alpha": 2.0}),
    (gf.AdaLoRA, {"init": "random", "rank_pattern": {"a": 3}}),
    (gf.HiRA, {"init": "gaussian"}),
    (gf.LoHa, {"init": "normal"}),
    (gf.LoKr, {"init": "lycoris", "decompose_factor": 4}),
    (gf.FourierFT, {"init": "zeros", "n_frequency_pattern": {"a": 3}}),
    (gf.C3A, {"init": "zeros", "block_size_pattern": {"a": 2}}),
]
EVERY = pytest.mark.parametrize(("kind", "options"), METHODS, ids=[kind.__name__ for kind, _ in METHODS])


@EVERY
def test_what_is_given_is_kept_and_compared(kind: type[Any], options: dict[str, Any]) -> None:
    method = kind(5, **options)
    assert method.to_dict() == {"method": kind.__name__, next(iter(inspect.signature(kind).parameters)): 5, **options}
    for again in (kind(5, **options), pickle.loads(pickle.dumps(method)), copy.deepcopy(method), dataclasses.replace(method)):
        assert again == method
        assert hash(again) == hash(method)
    assert kind(4, **options) != method
    assert str(method).startswith(f"{kind.__name__}(")
    assert all(f"{name}={value!r}" in str(method) for name, value in options.items())
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        method.init = "kaiming"
    patterns = {name: dict(value) for name, value in options.items() if name.endswith("_pattern")}
    for name in patterns:
        assert isinstance(getattr(method, name), FrozenMap)
        options[name]["other"] = 1
    assert method.to_dict() == {**method.to_dict(), **patterns}, "a pattern is the caller's own dict"
    for name in patterns:
        del options[name]["other"]


@EVERY
def test_names_are_those_of_the_documentation(kind: type[Any], options: dict[str, Any]) -> None:
    shown = inspect.signature(kind).parameters
    first, *others = shown.values()
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)
    assert options.keys() <= shown.keys()
    assert not {"layout", "view", "by_column"} & shown.keys()
    with pytest.raises(TypeError, match="unexpected keyword argument 'initialisation'"):
        kind(initialisation="zeros")
    with pytest.raises(TypeError, match="positional argument"):
        kind(4, 4)


LOW_RANK = (gf.LoRA, gf.DoRA, gf.MixingLoRA, gf.AdaLoRA, gf.HiRA, gf.VeRA, gf.LoHa, gf.LoKr)
REFUSED: list[tuple[type[gf.Method], dict[str, Any], str]] = [
    *((kind, {"rank": 0}, f"{kind.__name__} needs a whole rank of at least 1, got rank=0") for kind in LOW_RANK),
    *((kind, {"dropout": 1.0}, r"dropout is a probability in \[0, 1\), got dropout=1.0") for kind in LOW_RANK[:6]),
    *((kind, {"rank_pattern": {"a": 0}}, r"got rank=0 \(rank_pattern 'a'\)") for kind in LOW_RANK if kind is not gf.VeRA),
    *((kind, {"init": "x"}, "init is one of .*, got init='x'") for kind in LOW_RANK if kind is not gf.VeRA),
    (gf.LoRA, {"init": "pissa_niter_<iterations>"}, "init is one of .*, got init='pissa_niter_<iterations>'"),
    (gf.LoRA, {"init": "orthogonal", "rank": 3}, "splits the rank in two halves and needs an even one, got rank=3"),
    (gf.LoRA, {"conv": "x"}, "conv is one of kernel, balanced, got conv='x'"),
    (gf.LoKr, {"decompose_factor": 0}, "decompose_factor is -1 or at least 1, got decompose_factor=0"),
]


@pytest.mark.parametrize(("kind", "options", "said"), REFUSED)
def test_what_is_no_value_of_an_option_is_refused(kind: type[Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.AdaptError, match=said):
        kind(**options)


@dataclass(frozen=True)
class Own(gf.Full):
    """A method of a user's own."""

    size: int
    _: KW_ONLY
    init: str = "zeros"
    size_pattern: dict[str, int] = field(default_factory=dict)
    groups: int = field(default=1, init=False, repr=False, compare=False)


def test_a_method_of_a_users_own() -> None:
    own = Own(3, init="ones", size_pattern={"a": 2})
    assert (own.size, own.init, own.groups) == (3, "ones", 1)
    assert own.replace(groups=2).groups == 2
    assert own.replace(groups=2) == own
    assert gf.Method.from_dict(own.to_dict()) == own
    with pytest.raises(gf.AdaptError, match="Own has no field 'groups'"):
        gf.Method.from_dict({**own.to_dict(), "groups": 2})
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        Own()  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted(gf.WeightMethod):
    """A user's method whose fields are slots, with a pattern."""

    size: int = 1
    size_pattern: FrozenMap[int] = field(default_factory=FrozenMap)

    def init_tensors(self, site: gf.Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"shift": torch.zeros(self.size, *site.parameter.shape)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return Dense(base.dense() + tensors["shift"].sum(0))


def test_a_method_with_slots_obeys_its_patterns() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    adapted = gf.adapt(model, {"*.weight": Slotted(2, FrozenMap({"1": 5}))})
    assert {name: len(tensor) for name, tensor in adapted.adapter.items()} == {"0.shift": 2, "1.shift": 5}
    x = torch.randn(4, 2)
    assert torch.equal(adapted(x), model(x))


@dataclass(frozen=True)
class Checked(gf.Full):
    """A user's method whose options are checked by how they are named and annotated."""

    mode: Literal["fast", 8] = "fast"
    inner_dropout: float = 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "slow"}, "mode is one of fast, 8, got mode='slow'"),
        ({"inner_dropout": -0.1}, r"inner_dropout is a probability in \[0, 1\), got inner_dropout=-0.1"),
    ],
)
def test_options_of_a_users_own_are_checked(options: dict[str, Any], said: str) -> None:
    assert Checked(mode=8, inner_dropout=0.5).mode == 8
    with pytest.raises(gf.AdaptError, match=said):
        Checked(**options)


def test_annotations_that_cannot_be_evaluated_check_nothing() -> None:
    Mode = Literal["fast"]  # known to this function only

    @dataclass(frozen=True)
    class Local(gf.Full):
        mode: Mode = "fast"

    mode: Any = "slow"
    assert Local(mode).mode == mode


def test_a_method_is_of_one_of_two_kinds() -> None:
    with pytest.raises(TypeError, match=r"Neither subclasses gf.Method itself: subclass gf.WeightMethod, .* gf.ModuleMethod"):

        class Neither(gf.Method):
            def why_not(self, site: gf.Site) -> str | None:
                return None

    with pytest.raises(TypeError, match="abstract"):
        gf.Method()  # type: ignore[abstract]
