"""DoRA: LoRA changes the direction of a weight's rows, and a trained magnitude their length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..select import Site
from ..weights import Dense, Magnitude, Weight
from .lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA):
    """`W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖`: LoRA for the direction of each row, a trained m for its length.

    Full fine-tuning changes direction and magnitude independently of each other, LoRA in proportion; separating them
    lets a low rank learn as full fine-tuning does. m starts at ‖W + s·B·A‖.

    The norm counts as a constant in backward, as the paper proposes, and is computed without forming the matrix.
    A row of zeros (pruned, say) has the magnitude 0 and stays zero, where 0/0 would be NaN.

    Shapes: lora_A and lora_B as in `LoRA`, and one magnitude for every

    | parameter | unit | lora_magnitude_vector |
    |---|---|---|
    | Linear, any matrix | row of W, an output | `(out,)` |
    | transformers' Conv1D | column of W, an output | `(out,)` |
    | Embedding | column of W, a feature | `(dim,)` |
    | convolution | output channel (a transposed one's input channel) | `(1, out, 1, ...)` |
    | a stack of matrices | row of each | `(E, out)` |

    Args:
        rank: and all others as in `LoRA`. Dropout acts on what meets `W' − W`.
        detach_norm: whether ‖W + s·B·A‖ counts as a constant in backward. False lets the gradient flow through it.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), gf.DoRA(rank=1))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'lora_B': (2, 1), 'lora_A': (1, 4), 'lora_magnitude_vector': (2,)}

    References:
        Liu et al., DoRA, 2024 (arXiv:2402.09353). An Embedding's norms go over the vocabulary, as in PEFT.
    """

    _: KW_ONLY
    detach_norm: bool = True

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        tensors = super().init_tensors(site, generator)
        base = Dense(site.parameter.detach())
        norm = self._magnitude(base, {**tensors, **self.precompute(base)}, site.parameter).norm()
        if self.view == "kernel":
            norm = norm.reshape(1, -1, *[1] * (site.parameter.ndim - 2))
        return {**tensors, "lora_magnitude_vector": norm.to(self.dtype or site.parameter.dtype)}

    def precompute(self, base: Weight) -> dict[str, Tensor]:
        if self.view == "kernel":
            return {}
        dense = base.dense()
        wide = dense.to(torch.promote_types(dense.dtype, torch.float32))
        return {"squares": wide.square().sum(self._over)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return self._magnitude(base, tensors, tensors["lora_magnitude_vector"])

    @property
    def _over(self) -> int:
        """The dimension that the norms are taken over: -1 for one of each row, -2 for one of each column."""
        return -2 if self.view in ("transposed", "lookup") else -1

    def _magnitude(self, base: Weight, tensors: Mapping[str, Tensor], magnitude: Tensor) -> Magnitude:
        return Magnitude(super().weight(base, tensors), magnitude, tensors.get("squares"), self._over, self.detach_norm)
