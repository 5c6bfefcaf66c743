"""MiSS: one small trained shard is shared by all shards of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import AdaptError
from ..select import Site
from ..weights import BlockAffine, SharedShards, Weight
from .matrix import MatrixMethod, matrix_shape, on_matrix
from .options import FrozenMap


@dataclass(frozen=True)
class MiSS(MatrixMethod):
    """`W' = W + Δ` with `Δ[o, i] = D[i mod r, o]`: inputs r apart share one trained weight.

    The inputs are added up in r groups before they meet D, so a change of rank r costs one thin product, half of LoRA's.
    D starts at zero, so an adapted network starts as the base.

    Shapes of miss_block, by mode; a kernel is a matrix `(out, in/groups·k...)`:

    | mode | shape | change |
    |---|---|---|
    | `"default"` | `(r, out)` | `Δ[o, i] = D[i mod r, o]` |
    | `"mini"` | `(r, mini_rank)` | `Δ[o, i] = D[i mod r, o mod mini_rank]` |
    | `"bat"` | `(out/r, r, r)` | `W·D + D`, every r×r block of W by the D of its row |

    Args:
        rank: r, at most in; in the mode `"bat"` a divisor of in and out.
        mode: `"default"`, `"mini"` or `"bat"` (PEFT's `init_weights`).
        mini_rank: a divisor of out, for the mode `"mini"`.
        dropout: probability of dropping an input feature on its way into the change, in training; not in `"bat"`.
        rank_pattern: rank of the sites whose module name ends in what a key (a regular expression) matches; first hit.

    Raises:
        AdaptError: for a rank below 1, an unknown mode, or a dropout outside [0, 1) or in the mode `"bat"`.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(8, 4), gf.MiSS(rank=2))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'miss_block': (2, 4)}

    References:
        Kang and Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing ModuleTree, 2024
        (arXiv:2409.15371), at first named Bone and Bat.
    """

    whole = ("rank", "mini_rank")

    rank: int = 64
    _: KW_ONLY
    mode: Literal["default", "mini", "bat"] = "default"
    mini_rank: int = 1
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenMap)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout and self.mode == "bat":
            raise AdaptError(f"dropout is 0 in the mode 'bat', whose change needs all inputs, got dropout={self.dropout!r}")

    def why_not(self, site: Site) -> str | None:
        here, parameter = self.for_site(site), site.parameter
        if parameter.ndim >= 2:
            rows, columns = matrix_shape(parameter.shape, here.view)[-2:]
            if here.rank > columns:
                return f"at least rank={here.rank} inputs"
            if self.mode == "bat" and (rows % here.rank or columns % here.rank):
                return f"a rank={here.rank} that divides its {rows} outputs and {columns} inputs"
            if self.mode == "mini" and rows % self.mini_rank:
                return f"a mini_rank={self.mini_rank} that divides its {rows} outputs"
        whole = here.view in ("lookup", "kernel") or isinstance(site.module, (nn.RNNBase, nn.RNNCellBase))
        if self.dropout and whole:
            return f"dropout=0 on a {type(site.module).__name__}, whose operation reads the weight as a whole"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        *lead, rows, _ = matrix_shape(site.parameter.shape, self.view)
        shape = {
            "default": (self.rank, rows),
            "mini": (self.rank, self.mini_rank),
            "bat": (rows // self.rank, self.rank, self.rank),
        }[self.mode]
        return {"miss_block": torch.zeros(*lead, *shape, dtype=site.parameter.dtype, device=site.parameter.device)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        block = tensors["miss_block"]
        if self.mode == "bat":
            return on_matrix(base, self.view, lambda matrix: BlockAffine(matrix, block))
        return on_matrix(base, self.view, lambda matrix: SharedShards(matrix, block, self.dropout))
