"""Copies a module tree: new modules, dictionaries and flags, around given tensors.

`copy.deepcopy` is not enough for all models: it fails on attributes that are non-leaf tensors, and
closures and weak references in its result refer to the original. They must refer to the copy here,
since a network may find its submodules through them.
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

from ..errors import AdaptError

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format, types.BuiltinFunctionType, types.ModuleType, Enum, range, slice, property,
)  # fmt: skip


SIMPLE = frozenset([type(None), bool, int, float, str, torch.dtype, torch.device])
OWN = frozenset({"_parameters", "_buffers", "_modules"})
_CONTAINERS = frozenset([dict, OrderedDict, set])
# Those of every module's own dictionaries and sets, nearly all of which are empty.
_OFTEN_EMPTY = frozenset(name for name, value in vars(nn.Module()).items() if type(value) in _CONTAINERS)


def clone(tensor: Tensor) -> Tensor:
    """A detached copy."""
    return tensor.detach().clone()


def walk(root: nn.Module) -> dict[str, nn.Module]:
    """Every module of a tree once, by its first dotted name, as `named_modules` gives them."""
    found: dict[str, nn.Module] = {}
    _visit("", root, found, set())
    return found


def paths(root: nn.Module) -> dict[str, nn.Module]:
    """The module at every path of a tree, as `named_modules(remove_duplicate=False)` gives them."""
    found: dict[str, nn.Module] = {}
    _visit("", root, found, None)
    return found


def _visit(name: str, module: nn.Module, found: dict[str, nn.Module], seen: set[int] | None) -> None:
    # Not a nested function: it would refer to itself, and so keep what it found alive until the garbage collector runs.
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    found[name] = module
    children = module._modules
    if children:
        above = f"{name}." if name else ""
        for step, child in children.items():
            if child is not None:
                _visit(above + step, child, found, seen)


def copy_tree(
    modules: dict[str, nn.Module], parameter_of: Callable[[Any], Tensor], buffer_of: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of a module tree that shares nothing with it except what these functions return for its parameters and buffers.

    Args:
        modules: the tree, as `walk` gives it.
        parameter_of: returns the copy's parameter for one of the tree's.
        buffer_of: returns the copy's buffer for one of the tree's.

    Returns:
        The copy's root, and the copy as `walk` gives it.

    Raises:
        AdaptError: for an attribute that cannot be copied.
    """
    memo = _Memo()
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo.put(parameter, parameter_of(parameter))
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo.put(buffer, buffer_of(buffer))
    kinds = {type(module) for module in modules.values()}
    # If a class leaves copying to Python, copying `__dict__` is enough; parametrize adds a `__deepcopy__` to such a class.
    default = {kind for kind in kinds if kind.__reduce_ex__ is object.__reduce_ex__}
    plain = {kind for kind in default if getattr(kind, "__deepcopy__", None) is None}
    ordinary = {
        name: module
        for name, module in modules.items()
        if type(module) in plain or (type(module) in default and nn.utils.parametrize.is_parametrized(module))
    }
    for module in ordinary.values():
        memo.put(module, object.__new__(type(module)))
    for name, module in ordinary.items():
        own, filled = module.__dict__, memo[id(module)].__dict__
        filled.update(own)
        for attribute, value in own.items():
            kind = type(value)
            if kind in SIMPLE:
                continue
            if attribute in _OFTEN_EMPTY and not value and kind in _CONTAINERS:
                filled[attribute] = kind()
                continue
            try:
                filled[attribute] = _copied_dict(value, memo) if attribute in OWN and kind is dict else _deep(value, memo)
            except AdaptError:
                raise
            except Exception as error:
                raise AdaptError(
                    f"attribute {attribute!r} of {name or 'the model'} ({type(module).__name__}) holds a "
                    f"{type(value).__name__} that cannot be copied ({error}). A private copy of the model's structure "
                    "is needed; give that object a __deepcopy__, or set it up outside of the model."
                ) from None
    root = modules[""]
    copied_root: nn.Module = _deep(root, memo)
    # The copy of a module that copies itself may have other children.
    alike = len(ordinary) == len(modules)
    copies = {name: memo[id(module)] for name, module in modules.items()} if alike else walk(copied_root)
    if any(issubclass(kind, nn.RNNBase) for kind in kinds):
        for module in copies.values():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return copied_root, copies


def _copied_dict(value: dict[str, Any], memo: _Memo) -> dict[str, Any]:
    """A copy of a module's dictionary of parameters, buffers or children, nearly all of which have been copied by now."""
    made: dict[str, Any] = {}
    memo[id(value)] = made
    for key, item in value.items():
        if item is not None:
            known = dict.get(memo, id(item))  # without counting, which is for closures
            item = _deep(item, memo) if known is None else known
        made[key] = item
    return made


class _Memo(dict[int, Any]):
    """The memo of `copy.deepcopy`, which counts how often a part of the module tree was looked up in it."""

    def __init__(self) -> None:
        super().__init__()
        self.hits = 0
        self.parts: set[int] = set()
        self.kept: list[object] = []

    def put(self, original: object, made: object) -> None:
        # The tree keeps the original alive, so its id stays valid.
        self[id(original)] = made
        self.parts.add(id(original))

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
    """A hook's handle for the copied tree's hooks; that of `copy.deepcopy` would have a dead reference."""
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
    """The function, with the copied tree in its closure where it has the original."""
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
