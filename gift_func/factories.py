"""Factories of checks and actions for GIFt's strategies: `c_...` make checks, `a_...` make actions.

Checks are called with `(parent_module, name, global_name, class_name, layer_obj)`, actions with the same and the rule's
parameters. These factories return frozen dataclasses with a `__call__`, which can be compared, printed and pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from .errors import AdaptError
from .gift_protocol import Action, Check, Pure
from .methods import Method
from .select import qualified

Outcome = Method | Mapping[str, Method]


def c_name_equal(name: str) -> Check:
    """A check that holds for modules of this name in their parent: `"q_proj"`, not `"layers.0.q_proj"`."""
    return _Among("name", _one(name, "c_name_equal"))


def c_name_in(names: Iterable[str]) -> Check:
    """A check that holds for modules whose name in their parent is one of these.

    Raises:
        TypeError: for a single string, whose letters would be taken for names; `c_name_equal` takes one name.
    """
    return _Among("name", _several(names, "c_name_in", "c_name_equal"))


def c_cname_equal(class_name: str) -> Check:
    """A check that holds for modules whose class has this name; `c_type` includes subclasses."""
    return _Among("class_name", _one(class_name, "c_cname_equal"))


def c_cname_in(class_names: Iterable[str]) -> Check:
    """A check that holds for modules whose class has one of these names; `c_type` includes subclasses.

    Raises:
        TypeError: for a single string, whose letters would be taken for names; `c_cname_equal` takes one name.
    """
    return _Among("class_name", _several(class_names, "c_cname_in", "c_cname_equal"))


c_name_func = c_name_equal
c_cname_func = c_cname_equal


def c_type(*classes: type[nn.Module]) -> Check:
    """A check that holds for modules of these classes and of their subclasses.

    Example:
        >>> import torch, gift_func.factories as fts
        >>> check = fts.c_type(torch.nn.Linear)
        >>> attention = torch.nn.MultiheadAttention(4, 1)  # its out_proj is of a subclass of Linear
        >>> check(attention, "out_proj", "out_proj", "NonDynamicallyQuantizableLinear", attention.out_proj)
        True
    """
    return _IsInstance(classes)


def a_replace(replace: Callable[..., nn.Module]) -> Action:
    """An action that replaces a module by the one that a function returns for it.

    Args:
        replace: called as `replace(layer_obj, **paras)` with the rule's parameters; returns the new module. It may write
            to `layer_obj`, which is a private copy, and the new module may contain it: parameters that are not changed stay
            frozen, all others become trained parameters of the adapter.

    Example:
        >>> import torch, gift_func as gf, gift_func.factories as fts
        >>> widen = fts.a_replace_func(lambda layer_obj, width: torch.nn.Linear(layer_obj.in_features, width))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapted = gf.adapt(model, [(fts.c_cname_func("Linear"), widen, {"width": 8})])
        >>> adapted(torch.zeros(1, 4)).shape, model(torch.zeros(1, 4)).shape
        (torch.Size([1, 8]), torch.Size([1, 2]))
    """
    return _Replace(replace)


a_replace_func = a_replace


def a_adapt(method: Method | type[Method] | Callable[..., Outcome]) -> Action:
    """An action that adapts a module's parameters by a method.

    Args:
        method: a method, whose fields the rule's parameters replace; or a method's class, whose arguments they are; or a
            function that is called as `method(layer_obj, **paras)` and returns a method, or a dict from names of the
            module's parameters to methods.

    Example:
        >>> import torch, gift_func as gf, gift_func.factories as fts
        >>> rule = (fts.c_cname_func("Linear"), fts.a_adapt_func(gf.LoRA), {"rank": 2})
        >>> list(gf.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), [rule]).adapter)
        ['0.lora_B', '0.lora_A']
    """
    if isinstance(method, Method) or (isinstance(method, type) and issubclass(method, Method)):
        return _Adapt(method)
    if callable(method) and not isinstance(method, type):
        return AdaptBy(method)
    raise TypeError(f"a_adapt takes a method such as gf.LoRA(rank=8), its class, or a function, got {method!r}")


a_adapt_func = a_adapt


@dataclass(frozen=True)
class _Among:
    what: Literal["name", "class_name"]
    wanted: tuple[str, ...]

    def __call__(self, parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> bool:
        return (name if self.what == "name" else class_name) in self.wanted

    def __repr__(self) -> str:
        return f"<{self.what} is {' or '.join(map(repr, self.wanted))}>"


@dataclass(frozen=True)
class _IsInstance:
    classes: tuple[type[nn.Module], ...]

    def __call__(self, parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module) -> bool:
        return isinstance(layer_obj, self.classes)

    def __repr__(self) -> str:
        return f"<is a {' or '.join(kind.__name__ for kind in self.classes)}>"


@dataclass(frozen=True)
class _ByFunction:
    """An action that returns what a function of the module returns, which must be of some types."""

    function: Callable[..., Any]
    verb: ClassVar[str]
    wanted: ClassVar[str]
    types: ClassVar[tuple[type, ...]]

    def __call__(
        self, parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module, **paras: Any
    ) -> Any:
        made = self.function(layer_obj, **paras)
        if not isinstance(made, self.types):
            raise AdaptError(
                f"{_name_of(self.function)} is to {self.verb} {global_name!r} and must return {self.wanted}, but it returned a "
                f"{type(made).__name__}"
            )
        return made

    def __repr__(self) -> str:
        return f"<{self.verb} by {_name_of(self.function)}>"


class _Replace(_ByFunction):
    verb, wanted, types = "replace", "a module", (nn.Module,)


@dataclass(frozen=True)
class _Adapt(Pure):
    method: Method | type[Method]

    def __call__(
        self, parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module, **paras: Any
    ) -> Method:
        if isinstance(self.method, type):
            return self.method(**paras)
        return Method.from_dict({**self.method.to_dict(), **paras}) if paras else self.method

    def __repr__(self) -> str:
        return f"<adapt by {self.method.__name__ if isinstance(self.method, type) else self.method}>"


class AdaptBy(_ByFunction):
    """An action that adapts a module by the method, or the dict of methods, that a function returns for it."""

    verb, types = "adapt", (Method, Mapping)
    wanted = "a method such as gf.LoRA(), or a dict from parameter names to methods"


class AdaptByReading(AdaptBy, Pure):
    """`AdaptBy` for functions that do not write to the module, so that the model's parameters need not be copied."""


def _name_of(function: Callable[..., Any]) -> str:
    return qualified(function) if isinstance(function, type) else getattr(function, "__qualname__", repr(function))


def _one(name: str, factory: str) -> tuple[str]:
    if not isinstance(name, str):
        raise TypeError(f"{factory} takes one name, got {name!r}")
    return (name,)


def _several(names: Iterable[str], factory: str, single: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{factory} takes several names, such as [{names!r}], got the string {names!r}; {single} takes one")
    return tuple(names)
