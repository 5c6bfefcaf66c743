"""Copies a module tree: its own modules, dictionaries and flags, any tensors.

`copy.deepcopy` would do for many models, but not for all: non-leaf tensors kept as attributes stop
it, and it leaves closures and weak references pointing at the original. This copy follows them,
because a network that reaches its parts by any way but `self` must reach the copy's parts.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import AdaptError

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format, types.BuiltinFunctionType, types.ModuleType, Enum, range, slice, property,
)  # fmt: skip


SIMPLE = frozenset([type(None), bool, int, float, str, torch.dtype, torch.device])
OWN = frozenset({"_parameters", "_buffers", "_modules"})
_MAPPINGS = frozenset([dict, OrderedDict])
# What every module has for itself, and hardly ever anything in it.
_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if type(value) in _MAPPINGS) - OWN


def clone(tensor: Tensor) -> Tensor:
    """A detached copy."""
    return tensor.detach().clone()


def walk(root: nn.Module) -> dict[str, nn.Module]:
    """Every module of a tree once, by its first dotted name, as `named_modules` gives them."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
            above = f"{name}." if name else ""
            for step, child in module._modules.items():
                if child is not None:
                    visit(above + step, child)

    visit("", root)
    return found


def replica(root: nn.Module, parameter_of: Callable[[Any], Tensor], buffer_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module tree that shares nothing with it but what these functions make of its parameters and buffers.

    Raises:
        AdaptError: for an attribute that cannot be copied.
    """
    memo = _Memo()
    modules = walk(root)
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo.put(parameter, parameter_of(parameter))
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo.put(buffer, buffer_of(buffer))
    ordinary = {name: module for name, module in modules.items() if _is_ordinary(module)}
    for module in ordinary.values():
        memo.put(module, object.__new__(type(module)))
    for name, module in ordinary.items():
        filled = memo[id(module)].__dict__
        filled.update(module.__dict__)
        for attribute, value in module.__dict__.items():
            kind = type(value)
            if kind in SIMPLE:
                continue
            if attribute in _HOOKS and kind in _MAPPINGS and not value:
                filled[attribute] = kind()
                continue
            try:
                filled[attribute] = _deep(value, memo)
            except AdaptError:
                raise
            except Exception as error:
                raise AdaptError(
                    f"attribute {attribute!r} of {name or 'the model'} ({type(module).__name__}) holds a "
                    f"{type(value).__name__} that cannot be copied ({error}). A private copy of the model's structure "
                    "is needed; give that object a __deepcopy__, or set it up outside of the model."
                ) from None
    made: nn.Module = _deep(root, memo)
    if any(isinstance(module, nn.RNNBase) for module in modules.values()):
        for module in made.modules():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return made


def _is_ordinary(module: nn.Module) -> bool:
    """Whether a module is all in its `__dict__`, as nearly every module is."""
    kind = type(module)
    if kind.__reduce_ex__ is not object.__reduce_ex__:
        return False
    return getattr(kind, "__deepcopy__", None) is None or nn.utils.parametrize.is_parametrized(module)


class _Memo(dict[int, Any]):
    """The memo of `copy.deepcopy`, which counts how often it led to a part of the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.hits = 0
        self.parts: set[int] = set()
        self.kept: list[object] = []

    def put(self, original: object, made: object) -> None:
        self[id(original)] = made
        self.parts.add(id(original))
        self.kept.append(original)

    def get(self, key: int, default: Any = None) -> Any:
        if key in self.parts:
            self.hits += 1
        return super().get(key, default)


def _deep(value: Any, memo: _Memo) -> Any:
    kind = type(value)
    if kind in SIMPLE:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    made: Any
    if kind is dict or kind is OrderedDict:
        made = memo[id(value)] = kind()
        for key, item in value.items():
            made[key if type(key) is str else _deep(key, memo)] = item if type(item) in SIMPLE else _deep(item, memo)
    elif isinstance(value, _ATOMS):
        return value
    elif kind is list:
        made = []
        memo[id(value)] = made
        made.extend(_deep(item, memo) for item in value)
    elif kind is tuple or kind is set or kind is frozenset:
        made = kind([_deep(item, memo) for item in value])
    elif isinstance(value, Tensor):
        made = memo[id(value)] = clone(value)
    elif kind is types.MethodType:
        made = types.MethodType(value.__func__, _deep(value.__self__, memo))
    elif kind is types.FunctionType:
        made = _with_closure(value, memo)
    elif isinstance(value, weakref.ref):
        target = memo.get(id(value()))
        made = value if target is None else weakref.ref(target)
    elif kind is RemovableHandle:
        made = memo[id(value)] = _handle(value, memo)
    elif isinstance(value, torch.Generator):
        made = memo[id(value)] = value.clone_state()
    else:
        return copy.deepcopy(value, memo)
    memo.kept.append(value)
    return made


def _handle(handle: RemovableHandle, memo: _Memo) -> RemovableHandle:
    """A hook's handle, for the copied tree's hooks; `copy.deepcopy` would leave one whose reference is dead."""
    hooks = handle.hooks_dict_ref()
    if hooks is None:
        return handle
    made = object.__new__(RemovableHandle)
    made.id = handle.id
    made.hooks_dict_ref = weakref.ref(_deep(hooks, memo))
    extra = (reference() for reference in handle.extra_dict_ref)
    made.extra_dict_ref = tuple(weakref.ref(_deep(found, memo)) for found in extra if found is not None)
    return made


def _with_closure(function: types.FunctionType, memo: _Memo) -> types.FunctionType:
    """The function, closing over the copied tree where it closed over the original."""
    cells = function.__closure__ or ()
    before, made = memo.hits, []
    for cell in cells:
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            made.append(cell)
            continue
        hits = memo.hits
        found = _deep(content, memo) if isinstance(content, (nn.Module, Tensor, types.MethodType, tuple, list)) else content
        made.append(types.CellType(found) if memo.hits > hits else cell)
    if memo.hits == before:
        return function
    rebuilt = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(made))
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    rebuilt.__dict__.update(function.__dict__)
    return rebuilt
