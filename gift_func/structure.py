"""A private copy of a module's structure: its own modules, dictionaries and flags, somebody else's tensors.

`copy.deepcopy` would do for many models, but not for all: non-leaf tensors kept as attributes stop
it, and it leaves closures and weak references pointing at the original. This copy follows them,
because a network that reaches its parts by any way but `self` must reach the copy's parts.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import AdaptError

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format, types.BuiltinFunctionType, types.ModuleType, Enum, range, slice, property,
)  # fmt: skip


def _same(tensor: Any) -> Any:
    return tensor


def clone(tensor: Tensor) -> Tensor:
    """A detached copy."""
    return tensor.detach().clone()


_SIMPLE = frozenset([type(None), bool, int, float, str, torch.dtype, torch.device])
_OWN = frozenset({"_parameters", "_buffers", "_modules"})


class Structure:
    """One private copy of a module tree, and where each parameter stands in it.

    Attributes:
        module: the private root module.
        modules: every module of the tree once, by its first dotted name.
        places: for every parameter's first dotted name, the modules and attributes that hold it: more than one
            where the parameter is tied.
        names: for every parameter's first dotted name, all dotted names that lead to it.
        written: the parameters that the network writes to in its own forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = dict(module.named_modules())
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        self.names: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for module_name, child in self.modules.items():
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    name = first.setdefault(id(parameter), join(module_name, attribute))
                    self.places.setdefault(name, []).append((child, attribute))
        writers = {id(parameter) for child in self.modules.values() for parameter in _written_by(child)}
        self.written = {name for name in self.places if id(self.tensor(name)) in writers}
        for module_name, child in module.named_modules(remove_duplicate=False):
            for attribute, parameter in child._parameters.items():
                if parameter is not None:
                    self.names.setdefault(first[id(parameter)], []).append(join(module_name, attribute))

    @staticmethod
    def of(module: nn.Module) -> Structure:
        """The private copy of a user's module: parameters are frozen aliases, buffers are clones.

        Raises:
            AdaptError: for a scripted module, an uninitialised lazy one, or an attribute that cannot be copied.
        """
        _refuse(module)
        writers = {id(p) for child in module.modules() for p in _written_by(child)}

        def frozen(parameter: nn.Parameter) -> nn.Parameter:
            alias = parameter.detach()
            return nn.Parameter(alias.clone() if id(parameter) in writers else alias, requires_grad=False)

        return Structure(_copy(module, frozen, clone))

    def copy(self, buffer_of: Callable[[Tensor], Tensor] = _same) -> Structure:
        """Another private copy, with the same parameters.

        Args:
            buffer_of: what the copy holds for a buffer; by default the very same one.
        """
        return Structure(_copy(self.module, _same, buffer_of))

    def detached(self, parameter_of: Callable[[Any], Tensor] = _same) -> nn.Module:
        """A module that shares nothing with this copy but what `parameter_of` makes of each parameter."""
        return _copy(self.module, parameter_of, clone)

    def tensor(self, name: str) -> nn.Parameter:
        """What stands in a parameter's place."""
        module, attribute = self.places[name][0]
        found = module._parameters[attribute]
        assert found is not None
        return found

    def bind(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in a parameter's place, wherever the parameter is tied to."""
        for module, attribute in self.places[name]:
            # Not every tensor that may stand here is a Parameter, which is what the annotation of torch asks for.
            module._parameters[attribute] = tensor  # type: ignore[assignment]

    def buffers(self) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
        """Every buffer once: its dotted name, its attribute, the module that holds it, its tensor."""
        for module_name, module in self.modules.items():
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    yield join(module_name, attribute), attribute, module, buffer

    @property
    def buffer_names(self) -> set[str]:
        """The dotted names of all buffers."""
        return {name for name, *_ in self.buffers()}

    def signature(self) -> Signature:
        """What the modules of the tree hold besides parameters and buffers, comparable between two moments.

        It looks at the attributes of every module, and into lists, dicts, sets and objects that are attributes.
        """
        found: list[object] = []
        versions: list[int] = []
        seen: set[int] = set()
        for module in self.modules.values():
            own = module.__dict__
            found.extend(own.values())
            found.extend(own["_modules"].values())
            for attribute, value in own.items():
                # A binding exchanges parameters and a forward may write buffers: they are no part of this.
                if type(value) in _SIMPLE or attribute in _OWN or (not value and isinstance(value, Mapping)):
                    continue
                if isinstance(value, Tensor):
                    versions.append(0 if value.is_inference() else value._version)
                elif isinstance(value, Mapping):
                    found.extend(value.values())
                elif isinstance(value, (list, tuple, set, frozenset, deque)):
                    found.extend(value)
                elif id(value) not in seen and hasattr(value, "__dict__"):
                    seen.add(id(value))
                    found.extend(value.__dict__.values())
        return Signature(found, versions)


@dataclass(frozen=True)
class Signature:
    """The objects that a structure's attributes held at a moment, and how often its plain tensors had been written."""

    objects: list[object]
    versions: list[int]

    def agrees(self, other: Signature) -> bool:
        """Whether nothing was set, added, removed or written between the two moments."""
        same = len(self.objects) == len(other.objects) and all(map(is_, self.objects, other.objects))
        return same and self.versions == other.versions


def join(module_name: str, attribute: str) -> str:
    """The dotted name of a module's attribute; the root module's name is empty."""
    return f"{module_name}.{attribute}" if module_name else attribute


def _refuse(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise AdaptError(
                f"{name or 'the model'} is a scripted module, whose weights cannot be exchanged. Adapt the Python module "
                "it was made from, and script merge()'s result."
            )
        for attribute, parameter in child._parameters.items():
            if parameter is not None and is_lazy(parameter):
                raise AdaptError(
                    f"{join(name, attribute)} of {type(child).__name__} is not initialised yet, so it has no shape. Run "
                    "the model once on a real input, then adapt it."
                )


def _written_by(module: nn.Module) -> list[Tensor]:
    """The parameters that a module writes to in its own forward."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return [module.weight]
    return []


def _copy(root: nn.Module, parameter_of: Callable[[Any], Tensor], buffer_of: Callable[[Tensor], Tensor]) -> nn.Module:
    memo = _Memo()
    named = list(root.named_modules())
    for _, module in named:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo.put(parameter, parameter_of(parameter))
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo.put(buffer, buffer_of(buffer))
    ordinary = [(name, module) for name, module in named if _is_ordinary(module)]
    for _, module in ordinary:
        memo.put(module, object.__new__(type(module)))
    for name, module in ordinary:
        filled = memo[id(module)].__dict__
        for attribute, value in module.__dict__.items():
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
    for module in made.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return made


def _is_ordinary(module: nn.Module) -> bool:
    """Whether a module is all in its `__dict__`, as nearly every module is."""
    kind = type(module)
    own_copy = getattr(kind, "__deepcopy__", None)
    parametrized = nn.utils.parametrize.is_parametrized(module)
    return (own_copy is None or parametrized) and kind.__reduce_ex__ is object.__reduce_ex__


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
    if isinstance(value, _ATOMS):
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    kind = type(value)
    made: Any
    if kind is dict or kind is OrderedDict:
        made = kind()
        memo[id(value)] = made
        for key, item in value.items():
            made[_deep(key, memo)] = _deep(item, memo)
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
    elif isinstance(value, torch.Generator):
        made = memo[id(value)] = value.clone_state()
    else:
        return copy.deepcopy(value, memo)
    memo.kept.append(value)
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
