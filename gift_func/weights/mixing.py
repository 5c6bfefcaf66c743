"""A grouped convolution and the low-rank change of an ungrouped one, added up."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..errors import AdaptError
from .value import Convolution, OnBase, Weight, add_scaled, as_weight


class Mixing(OnBase):
    """`W ∗ x + s·left ∗ (right ∗ x)`, where W and `left` are grouped and `right` is not.

    Args:
        base: W, `(out, in/g, k, ...)` for g groups.
        left: `(out, r/g, 1, ...)`.
        right: `(r, in, k, ...)`.
        scale: s.
        dropout: probability of dropping an input feature of the change.
    """

    def __init__(
        self, base: Weight | Tensor, left: Tensor, right: Tensor, scale: float | Tensor = 1.0, dropout: float = 0.0
    ) -> None:
        self.base = as_weight(base)
        self.left = left
        self.right = right
        self.scale = scale
        self.dropout = dropout

    @property
    def needs_input(self) -> bool:
        return True

    def dense(self) -> Tensor:
        raise AdaptError(
            f"the change beside the grouped kernel of shape {tuple(self.shape)} mixes its groups, so no kernel of that shape "
            "has it: it cannot be merged or read as a whole. Use gf.LoRA, whose change stays within the groups."
        )

    def convolve(self, x: Tensor, conv: Convolution, bias: Tensor | None = None) -> Tensor:
        groups, dims = self.right.shape[1] // self.base.shape[1], self.right.ndim - 2
        # `conv` is grouped: each group computes its part of all r channels, and the parts are summed.
        kernels = rearrange(self.right, "r (g c) ... -> (g r) c ...", g=groups)
        thin = conv(F.dropout(x, self.dropout) if self.dropout else x, kernels.to(x.dtype), None)
        size = thin.shape[-dims:]
        thin = thin.unflatten(-dims - 1, (groups, self.right.shape[0])).sum(-dims - 2).flatten(-dims)
        left = rearrange(self.left.flatten(1), "(g o) r -> g o r", g=groups).to(thin.dtype)
        change = (left @ thin.unflatten(-2, (groups, -1))).flatten(-3, -2).unflatten(-1, size)
        return add_scaled(self.base.convolve(x, conv, bias), change, self.scale)
