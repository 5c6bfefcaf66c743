"""The `repr` of an adapted model, which is the base's module tree with the methods, and the tables of `summary`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from .methods import Method
from .network.frozen_base import FrozenBase
from .network.module_tree import ModuleTree


class _Shown(nn.Module):
    """A module whose `repr` is another's, with its methods after the first line."""

    def __init__(self, module: nn.Module, methods: list[str]) -> None:
        super().__init__()
        head, *rest = repr(module).split("\n")
        self.text = "\n".join([f"{head}  <- {', '.join(methods)}", *rest])

    def __repr__(self) -> str:
        return self.text


def tree(modules: ModuleTree, methods: Mapping[str, Method]) -> str:
    """The module tree as `print(module)` shows it, with `weight: LoRA(rank=3)` after every adapted module."""
    shown = ModuleTree(modules.detached())
    notes: dict[int, list[str]] = {}
    for name, method in methods.items():
        for module, attribute in shown.places.get(name, []):
            notes.setdefault(id(module), []).append(f"{attribute}: {method}")
    # Children first, so that their notes are in the text of their parents.
    for path, module in reversed(list(shown.modules.items())):
        if id(module) not in notes:
            continue
        note = _Shown(module, notes[id(module)])
        if not path:
            return repr(note)
        for parent in shown.modules.values():
            for child_name, child in parent._modules.items():
                if child is module:
                    parent._modules[child_name] = note
    return repr(shown.module)


def summary(base: FrozenBase, parameters: Iterable[tuple[str, Method, Collection[str]]], tensors: Mapping[str, Tensor]) -> str:
    """A table of adapted parameters, and how many numbers are trained of how many.

    Args:
        base: the frozen base.
        parameters: name, method and global names of the tensors of each adapted parameter.
        tensors: the adapter's tensors under global names; those that several parameters share are counted once.
    """
    rows = [("parameter", "shape", "method", "trained")]
    whole, counted = sum(weight.shape.numel() for weight in base.weights.values()), set[str]()
    for name, method, names in parameters:
        sizes = {full: tensors[full].numel() for full in names if full not in counted}
        counted.update(sizes)
        whole += sum(sizes.values())
        trained = sum(size for full, size in sizes.items() if tensors[full].requires_grad)
        shape = base.weights[name].shape if name in base.weights else tensors[next(iter(names))].shape
        rows.append((name, "x".join(map(str, shape)), str(method) if name in base.weights else "new", f"{trained:,}"))
    total = sum(tensors[full].numel() for full in counted if tensors[full].requires_grad)
    return f"{table(rows)}\ntrained: {total:,} parameters of {whole:,} ({total / max(whole, 1):.3%}), in {len(rows) - 1} places"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as an aligned table; the first is its head, and the last column is aligned to the right."""
    *widths, last = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1].rjust(last)]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in (*widths, last)))
    return "\n".join(lines)
