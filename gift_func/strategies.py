"""GIFt's strategies, with GIFt's names: ordered (check, action, parameters) rules for `adapt`.

They are immutable, compare by value, and can be pickled unless they contain a lambda. They differ from GIFt's so:

- No default argument is shared between strategies, and dicts that are passed are not changed.
- Linear and convolution layers are found by `isinstance`, so subclasses are included (the `out_proj` of
  nn.MultiheadAttention, whose class is NonDynamicallyQuantizableLinear), which a comparison of class names leaves out.
- A customized parameter that no rule has is an error; GIFt warns.
- Actions return methods, and the frozen layer is not changed: no layer of ours contains a `parent_module`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from .errors import AdaptError, nearest
from .factories import AdaptByReading, Outcome, a_adapt, c_type
from .gift_protocol import Action, Cap, Check
from .methods import Full, LoRA, Method, SVDiff
from .methods.matrix import CONVOLUTIONS

Paras = Mapping[str, Mapping[str, Any]]


class FineTuningStrategy(Sequence[Cap]):
    """Ordered rules, and the named parameters of their actions.

    For every module, parents first, the action of the first check that holds is run. A check is called with
    `(parent_module, name, global_name, class_name, layer_obj)`, an action with the same and its parameters.

    Args:
        checks_actions_parnames: rules (check, action) or (check, action, name of its parameters). A method may be given as
            the action, and a dict of parameters instead of their name.
        default_action_paras: name -> parameters, for every name in the rules.
        customized_action_paras: name -> the parameters that differ from the defaults.

    Raises:
        AdaptError: for a rule of another form, or a name or a customized parameter that has no default.

    Example:
        >>> import torch, gift_func as gf, gift_func.factories as fts
        >>> from gift_func.strategies import FineTuningStrategy
        >>> rules = [(fts.c_cname_func("Linear"), fts.a_adapt_func(gf.LoRA), "lora")]
        >>> strategy = FineTuningStrategy(rules, {"lora": {"rank": 3}}, {"lora": {"rank": 2}})
        >>> strategy.paras()
        {'lora': {'rank': 2}}
        >>> list(gf.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), strategy).adapter)
        ['0.lora_B', '0.lora_A']
    """

    def __init__(
        self,
        checks_actions_parnames: Iterable[Sequence[Any]],
        default_action_paras: Paras | None = None,
        customized_action_paras: Paras | None = None,
    ) -> None:
        paras = {name: deepcopy(dict(values)) for name, values in (default_action_paras or {}).items()}
        for name, values in (customized_action_paras or {}).items():
            if name not in paras:
                raise AdaptError(f"customized_action_paras has {name!r}, which has no defaults; {nearest(name, paras)}")
            for key, value in values.items():
                if key not in paras[name]:
                    raise AdaptError(f"{name!r} has no parameter {key!r} to customize; {nearest(key, paras[name])}")
                paras[name][key] = deepcopy(value)
        rules: list[_Rule] = []
        for index, given in enumerate(checks_actions_parnames):
            rule, own = _rule_of(given, index)
            if own is not None:
                paras[rule.name] = deepcopy(dict(own))
            elif rule.name and rule.name not in paras:
                raise AdaptError(
                    f"rule {index} takes the parameters {rule.name!r}, which default_action_paras does not name; "
                    f"{nearest(rule.name, paras)}"
                )
            rules.append(rule)
        self._rules = tuple(rules)
        self._paras = paras

    def paras(self) -> dict[str, dict[str, Any]]:
        """A copy of the parameters of the actions, by name."""
        return deepcopy(self._paras)

    def checks(self) -> list[Check]:
        """The checks, in order."""
        return [rule.check for rule in self._rules]

    def actions(self) -> list[Action]:
        """The actions, in order."""
        return [rule.action for rule in self._rules]

    def __len__(self) -> int:
        return len(self._rules)

    @overload
    def __getitem__(self, index: int) -> Cap: ...
    @overload
    def __getitem__(self, index: slice) -> list[Cap]: ...
    def __getitem__(self, index: int | slice) -> Cap | list[Cap]:
        """A rule as `adapt` takes it: (check, action, parameters)."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        rule = self._rules[index]
        return rule.check, rule.action, deepcopy(self._paras[rule.name]) if rule.name else {}

    def __add__(self, other: FineTuningStrategy) -> FineTuningStrategy:
        """Both strategies' rules, this one's first: `merger_strategy([self, other])`."""
        if not isinstance(other, FineTuningStrategy):
            return NotImplemented
        return merger_strategy([self, other])

    def __eq__(self, other: object) -> bool:
        """Whether the rules and their parameters are equal, however the strategies were made."""
        return isinstance(other, FineTuningStrategy) and list(self) == list(other) and self._paras == other._paras

    __hash__ = None  # type: ignore[assignment]  # parameters may be anything, lists too

    def __repr__(self) -> str:
        rules = "".join(f"\n  {rule.check!r} -> {rule.action!r}({rule.name})" for rule in self._rules)
        return f"{type(self).__name__}(  # {self._paras}{rules}\n)"


@dataclass(frozen=True)
class _Rule:
    check: Check
    action: Action
    name: str


def _rule_of(given: object, index: int) -> tuple[_Rule, Mapping[str, Any] | None]:
    """A rule as it was given, and its own parameters if it has a dict of them."""
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) not in (2, 3):
        raise AdaptError(f"rule {index} is not (check, action) or (check, action, name of its parameters): {given!r}")
    check, action, third = (*given, None)[:3]
    if isinstance(action, Method):
        action = a_adapt(action)
    if not callable(check) or not callable(action):
        raise AdaptError(f"rule {index} needs a check and an action that can be called, got {given!r}")
    if isinstance(third, Mapping):
        return _Rule(check, action, f"rule_{index}"), third
    if third is not None and not isinstance(third, str):
        raise AdaptError(f"the third part of rule {index} is the name of its parameters or a dict of them, got {third!r}")
    return _Rule(check, action, third or ""), None


def merger_strategy(
    strategies: Sequence[FineTuningStrategy], additional_rules: Iterable[Sequence[Any]] = ()
) -> FineTuningStrategy:
    """One strategy with the rules of several, in order; `a + b` is short for two.

    Args:
        strategies: the strategies, which are not changed.
        additional_rules: further rules (check, action) or (check, action, dict of parameters), which come last.

    Returns:
        The merged strategy. If two have different parameters under one name, the later ones are renamed: `lora_paras_2`.

    Raises:
        AdaptError: if there is nothing to merge.

    Example:
        >>> from gift_func.strategies import LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy, merger_strategy
        >>> merged = merger_strategy([LoRALinearFineTuningStrategy(rank=8), LoRAConvFineTuningStrategy(rank=2)])
        >>> {name: paras["rank"] for name, paras in merged.paras().items()}
        {'lora_paras': 8, 'lora_paras_2': 2}
    """
    extra = list(additional_rules)
    parts = [*strategies, *([FineTuningStrategy(extra)] if extra else [])]
    if not parts:
        raise AdaptError("there is nothing to merge: give at least one strategy or one rule")
    rules: list[tuple[Check, Action, str]] = []
    paras: dict[str, dict[str, Any]] = {}
    for part in parts:
        if not isinstance(part, FineTuningStrategy):
            raise TypeError(f"merger_strategy merges FineTuningStrategy instances, got a {type(part).__name__}")
        names = {"": ""}
        for name, values in part._paras.items():
            fitting = name
            for number in range(2, len(paras) + 3):
                if paras.get(fitting, values) == values:
                    break
                fitting = f"{name}_{number}"
            names[name] = fitting
            paras[fitting] = values
        rules.extend((rule.check, rule.action, names[rule.name]) for rule in part._rules)
    return FineTuningStrategy(rules, paras)


class DeBugStrategy(FineTuningStrategy):
    """A strategy that also prints a line whenever a check holds: the rule's index, the names, the class.

    In GIFt the actions are not run, since they would change the model. Nothing changes it here, so they are run and
    `adapt` returns what it returns for the strategy itself.

    Args:
        strategy: the strategy to observe.

    Example:
        >>> import torch, gift_func as gf
        >>> from gift_func.strategies import DeBugStrategy, LoRALinearFineTuningStrategy
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 4))
        >>> adapted = gf.adapt(model, DeBugStrategy(LoRALinearFineTuningStrategy()))
        check 0 holds: name '1', global name '1', class Linear
    """

    def __init__(self, strategy: FineTuningStrategy) -> None:
        rules = [(_PrintedCheck(rule.check, index), rule.action, rule.name) for index, rule in enumerate(strategy._rules)]
        super().__init__(rules, strategy._paras)


@dataclass(frozen=True)
class _PrintedCheck:
    check: Check
    index: int

    def __call__(self, parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> bool:
        holds = self.check(parent_module, name, global_name, class_name, layer_obj)
        if holds:
            print(f"check {self.index} holds: name {name!r}, global name {global_name!r}, class {class_name}")
        return holds


def lora(layer_obj: nn.Module, rank: int, lora_alpha: float | None, lora_dropout: float, train_bias: bool) -> LoRA:
    """LoRA with GIFt's parameters."""
    return LoRA(rank, alpha=lora_alpha, dropout=lora_dropout, train_bias=train_bias, conv="balanced")


def svdiff(layer_obj: nn.Module, train_bias: bool) -> Outcome:
    """SVDiff with GIFt's parameters: a layer's bias may be trained together with the spectrum of its weight."""
    biased = train_bias and layer_obj._parameters.get("bias") is not None
    return {"weight": SVDiff(), "bias": Full()} if biased else SVDiff()


class _LoRAStrategy(FineTuningStrategy):
    layers: tuple[type[nn.Module], ...]

    def __init__(
        self, rank: int = 3, lora_alpha: float | None = None, lora_dropout: float = 0.0, train_bias: bool = False
    ) -> None:
        LoRA(rank, alpha=lora_alpha, dropout=lora_dropout)  # bad values are refused here, not at the first layer
        paras = {"rank": rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "train_bias": train_bias}
        super().__init__([(c_type(kind), AdaptByReading(lora), "lora_paras") for kind in self.layers], {"lora_paras": paras})


class LoRALinearFineTuningStrategy(_LoRAStrategy):
    """LoRA on every nn.Linear, subclasses included.

    Args:
        rank: the rank of the change, at least 1.
        lora_alpha: the change is scaled by lora_alpha / rank; None means 1.
        lora_dropout: the probability with which an input feature of the change is zeroed, in training.
        train_bias: also train the layers' biases.

    Raises:
        AdaptError: for values that `gf.LoRA` refuses.
    """

    layers = (nn.Linear,)


class LoRAConvFineTuningStrategy(_LoRAStrategy):
    """LoRA on every nn.Conv1d, Conv2d and Conv3d, subclasses included; `conv="balanced"`, as GIFt flattens kernels.

    Arguments and errors are those of `LoRALinearFineTuningStrategy`.
    """

    layers = CONVOLUTIONS


class LoRAFullFineTuningStrategy(_LoRAStrategy):
    """LoRA on every nn.Linear, Conv1d, Conv2d and Conv3d, subclasses included.

    Arguments and errors are those of `LoRALinearFineTuningStrategy`.
    """

    layers = LoRALinearFineTuningStrategy.layers + LoRAConvFineTuningStrategy.layers


class LoRAAllFineTuningStrategy(LoRAFullFineTuningStrategy):
    """GIFt's newer name of `LoRAFullFineTuningStrategy`."""


class _SVDiffStrategy(FineTuningStrategy):
    layers: tuple[type[nn.Module], ...]

    def __init__(self, train_bias: bool = False) -> None:
        rules = [(c_type(kind), AdaptByReading(svdiff), "svdiff_paras") for kind in self.layers]
        super().__init__(rules, {"svdiff_paras": {"train_bias": train_bias}})


class SVDiffLinearFineTuningStrategy(_SVDiffStrategy):
    """SVDiff on every nn.Linear, subclasses included.

    Args:
        train_bias: also train the layers' biases.
    """

    layers = LoRALinearFineTuningStrategy.layers


class SVDiffConvFineTuningStrategy(_SVDiffStrategy):
    """SVDiff on every nn.Conv1d, Conv2d and Conv3d, subclasses included, with kernels flattened as in GIFt.

    The argument is that of `SVDiffLinearFineTuningStrategy`.
    """

    layers = LoRAConvFineTuningStrategy.layers


class SVDiffAllFineTuningStrategy(_SVDiffStrategy):
    """SVDiff on every nn.Linear, Conv1d, Conv2d and Conv3d, subclasses included.

    The argument is that of `SVDiffLinearFineTuningStrategy`.
    """

    layers = LoRAFullFineTuningStrategy.layers


class FullFineTuningStrategy(FineTuningStrategy):
    """Trains every parameter of every module, those of the model itself too."""

    def __init__(self) -> None:
        super().__init__([(_HasParameters(), a_adapt(Full()))])


@dataclass(frozen=True)
class _HasParameters:
    def __call__(self, parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> bool:
        return any(parameter is not None for parameter in layer_obj._parameters.values())

    def __repr__(self) -> str:
        return "<has parameters>"
