"""How an adapted model prints: the base's module tree with the methods at their places, and a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from .methods import Method
from .network.frozen_base import FrozenBase
from .network.module_tree import ModuleTree


class _Shown(nn.Module):
    """A module that prints as another one with its methods written behind it."""

    def __init__(self, module: nn.Module, methods: list[str]) -> None:
        super().__init__()
        head, *rest = repr(module).split("\n")
        self.text = "\n".join([f"{head}  <- {', '.join(methods)}", *rest])

    def __repr__(self) -> str:
        return self.text


def tree(body: ModuleTree, methods: Mapping[str, Method]) -> str:
    """The module tree as `print(module)` shows it, `weight: LoRA(rank=3)` behind every adapted module."""
    shown = ModuleTree(body.detached())
    notes: dict[int, list[str]] = {}
    for name, method in methods.items():
        for module, attribute in shown.places.get(name, []):
            notes.setdefault(id(module), []).append(f"{attribute}: {method}")
    # From the leaves up, so that a module whose children are annotated shows their notes.
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


def summary(base: FrozenBase, rows: Iterable[tuple[str, Method, list[Tensor]]]) -> str:
    """A table of adapted parameters and the count of what is trained.

    Args:
        base: the frozen base.
        rows: parameter name, method, and the adapter's tensors for it.
    """
    rows_of_table = [("parameter", "shape", "method", "trained")]
    trained, added = 0, 0
    for name, method, tensors in rows:
        own = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
        trained += own
        added += sum(tensor.numel() for tensor in tensors)
        shape = base.weights[name].shape if name in base.weights else tensors[0].shape
        rows_of_table.append((name, "x".join(map(str, shape)), str(method) if name in base.weights else "new", f"{own:,}"))
    lines = [table(rows_of_table)]
    frozen = sum(weight.shape.numel() for weight in base.weights.values())
    whole = frozen + added
    lines.append(
        f"trained: {trained:,} parameters of {whole:,} ({trained / max(whole, 1):.3%}), in {len(rows_of_table) - 1} places"
    )
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as an aligned table, the first of them its head and the last column numbers."""
    *widths, last = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1].rjust(last)]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in (*widths, last)))
    return "\n".join(lines)
