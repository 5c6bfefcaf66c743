"""Bottleneck adapters: two thin layers beside or behind a module."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import AdaptError
from .matrix import HF_CONV1D
from .method import is_a
from .module_method import AddedModule, ModuleMethod

FUNCTIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Bottleneck(ModuleMethod):
    """`h' = h + s·(W_up·f(W_down·z + b_down) + b_up)`: a residual bottleneck at a module's output h.

    Sequential, as in Houlsby et al.: `z = h`, behind the module. Parallel, as in He et al.: `z` is the module's input,
    beside it. W_up and b_up start at zero, so an adapted network starts as the base. The rule must name the modules:
    whole blocks, or the sublayers in them.

    Shapes (`d` = width of z and of h): bottleneck.down.weight `(dim, d)`, bottleneck.down.bias `(dim,)`,
    bottleneck.up.weight `(d, dim)`, bottleneck.up.bias `(d,)`.

    Args:
        dim: width of the bottleneck, at least 1.
        parallel: take the module's input instead of its output.
        nonlinearity: f: `"relu"`, `"gelu"`, `"silu"` or `"tanh"`.
        scale: s.
        dropout: probability of dropping a feature of the bottleneck, in training.
        width: d; None reads it off a Linear, Embedding, LayerNorm or Conv1D, or, of a module made of others, off the one
            that was registered last.

    Raises:
        AdaptError: for a `dim` below 1, an unknown nonlinearity, a dropout outside [0, 1).

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> adapted = gf.adapt(model, {"0": gf.Bottleneck(dim=3)})
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'0.bottleneck.down.weight': (3, 8), '0.bottleneck.down.bias': (3,),
         '0.bottleneck.up.weight': (8, 3), '0.bottleneck.up.bias': (8,)}

    References:
        Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019 (arXiv:1902.00751); He et al., Towards a
        Unified View of Parameter-Efficient Transfer Learning, 2021 (arXiv:2110.04366). We start W_up at zero, not near it.
    """

    dim: int = 64
    _: KW_ONLY
    parallel: bool = False
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scale: float = 1.0
    dropout: float = 0.0
    width: int | None = None

    attribute = "bottleneck"
    whole = ("dim",)

    def module(self, host: nn.Module) -> AddedModule:
        width = self.width or _width(host, self.parallel)
        if width is None:
            raise AdaptError(f"the width of a {type(host).__name__} cannot be told from it; give Bottleneck(..., width=...)")
        return Residual(self, width)


class Residual(AddedModule):
    """The two layers of a bottleneck."""

    def __init__(self, method: Bottleneck, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, method.dim)
        self.act = FUNCTIONS[method.nonlinearity]()
        self.drop = nn.Dropout(method.dropout)
        self.up = nn.Linear(method.dim, width)
        self.parallel = method.parallel
        self.scale = method.scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, z: Tensor) -> Tensor:
        """`(..., d)` to `(..., d)`."""
        out: Tensor = self.up(self.drop(self.act(self.down(z)))) * self.scale
        return out

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Blocks of transformers return tuples whose first element are the hidden states.
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden + self(args[0] if self.parallel else hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _width(module: nn.Module, of_input: bool) -> int | None:
    """The number of features that a module returns, or takes."""
    if isinstance(module, nn.Linear):
        return module.in_features if of_input else module.out_features
    if isinstance(module, nn.Embedding):
        return None if of_input else module.embedding_dim
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if is_a(module, HF_CONV1D):
        rows, columns = module.get_parameter("weight").shape
        return rows if of_input else columns
    children = list(module.children())
    known = (_width(child, of_input) for child in (children if of_input else reversed(children)))
    return next((width for width in known if width is not None), None)
