"""A census of a module: everything about it that no one may change, down to the identity of its objects."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Identity:
    """An object that equals only itself; it is kept alive so that its id is not given to another one."""

    def __init__(self, item: object) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.item is other.item

    def __hash__(self) -> int:
        return id(self.item)

    def __repr__(self) -> str:
        return f"<{type(self.item).__name__} at {id(self.item):#x}>"


def census(model: nn.Module, versions: bool = True) -> dict[str, object]:
    """Every fact about a module, by name.

    Args:
        model: the user's module.
        versions: count writes to parameters too, even those that change nothing.
    """
    facts: dict[str, object] = {"rng": torch.get_rng_state().numpy().tobytes()}
    for name, module in model.named_modules(remove_duplicate=False):
        facts[f"module {name}"] = Identity(module)
        facts[f"type {name}"] = type(module)
        facts[f"training {name}"] = module.training
        facts[f"children {name}"] = [(key, Identity(child)) for key, child in module._modules.items()]
        for key, value in vars(module).items():
            if key != "training":
                facts.update(_attribute(f"{name}.__dict__[{key!r}]", value, 0))
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    facts.update(_tensor(f"{kind} {name}.{key}", tensor, versions))
    return facts


def _attribute(label: str, value: object, depth: int) -> Iterator[tuple[str, object]]:
    yield label, Identity(value) if not isinstance(value, (bool, int, float, str, types.MethodType)) else value
    if depth > 3 or isinstance(value, (Tensor, nn.Module, type)):
        return
    if isinstance(value, dict):
        yield f"{label} keys", list(value)
        for key, item in value.items():
            yield from _attribute(f"{label}[{key!r}]", item, depth + 1)
    elif isinstance(value, (list, tuple)):
        yield f"{label} length", len(value)
        for index, item in enumerate(value):
            yield from _attribute(f"{label}[{index}]", item, depth + 1)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _attribute(f"{label} attributes", dict(vars(value)), depth + 1) if depth else _contents(label, value)


def _contents(label: str, value: object) -> Iterator[tuple[str, object]]:
    for key, item in vars(value).items():
        yield f"{label}.{key}", item if isinstance(item, (bool, int, float, str)) else Identity(item)


def _tensor(label: str, tensor: Tensor, versions: bool) -> dict[str, object]:
    facts: dict[str, object] = {
        label: Identity(tensor),
        f"{label} value": (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), bits(tensor)),
        f"{label} storage": tensor.untyped_storage().data_ptr(),
        f"{label} requires_grad": (tensor.requires_grad, tensor.is_leaf),
        f"{label} grad": Identity(tensor.grad),
        f"{label} grad value": None if tensor.grad is None else bits(tensor.grad),
        f"{label} hooks": (Identity(tensor._backward_hooks), len(tensor._backward_hooks or ())),
        f"{label} attributes": sorted(vars(tensor)) if hasattr(tensor, "__dict__") else [],
    }
    if versions:
        facts[f"{label} version"] = tensor._version
    return facts


def bits(tensor: Tensor) -> bytes:
    """The memory of a tensor's elements in order, so that NaN equals NaN and 0 differs from -0."""
    flat = tensor.detach().reshape(-1).contiguous().clone()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def changes(before: dict[str, object], after: dict[str, object], rng: bool = False) -> list[str]:
    """The facts that differ between two censuses.

    Args:
        before: the first.
        after: the second.
        rng: whether the global random state counts.
    """
    names = [*before, *(name for name in after if name not in before)]
    missing = object()
    return [
        name
        for name in names
        if (rng or name != "rng") and before.get(name, missing) != after.get(name, missing)
    ]  # fmt: skip


@contextmanager
def unchanged(model: nn.Module, rng: bool = False) -> Iterator[None]:
    """Check that a block leaves every fact about a model as it was."""
    before = census(model)
    yield
    found = changes(before, census(model), rng)
    assert not found, f"the user's model changed: {found[:8]}"


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _nothing(module: nn.Module, args: object, output: object) -> None:
    return None


def mess_up(model: nn.Module) -> None:
    """Give a model gradients, hooks, frozen parameters and odd training flags, so that there is something to lose."""
    children = list(model.modules())
    parameters = list(model.parameters())
    for index, parameter in enumerate(parameters):
        if index % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
        if index % 3 == 2:
            parameter.requires_grad_(False)
    parameters[0].register_hook(_same)
    children[-1].training = not children[-1].training
    children[-1].register_forward_hook(_nothing)
    model.note = {"kept": ["by", "the", "user"]}  # type: ignore[assignment]
