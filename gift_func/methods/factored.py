"""Base classes of methods whose change is a product of factors: LoRA and similar ones, and LyCORIS's."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from ..select import Site
from .layout import ConvLayout
from .matrix import TWO_FACTORS, MatrixMethod, View


class FactoredMethod(MatrixMethod):
    """A method whose change is a product of factors, which fit the parameter by a layout.

    Attributes:
        conv: the layout of kernels; `"kernel"` for methods without such a field.
        dropout: probability of dropping an input feature of the change; 0 for methods without such a field.
        dtype: element type of the tensors; None means that of the parameter.
    """

    needs = TWO_FACTORS
    conv: ConvLayout = "kernel"
    dropout: float = 0.0
    dtype: torch.dtype | None

    def why_not(self, site: Site) -> str | None:
        missing = super().why_not(site)
        if missing is None and self.dropout and isinstance(site.module, (nn.RNNBase, nn.RNNCellBase)):
            return f"dropout=0 on a {type(site.module).__name__}, whose operation reads the weight as a whole"
        return missing

    @property
    def layout(self) -> View:
        """How the parameter is seen as a matrix, or as a stack of matrices."""
        if self.view == "kernel":
            return self.conv
        return "matrix" if self.view == "lookup" else self.view

    def empty(self, parameter: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor for the adapter of a parameter."""
        return torch.empty(shape, dtype=self.dtype or parameter.dtype, device=parameter.device)


class LowRankMethod(FactoredMethod):
    """A factored method with a rank, whose change starts at zero unless `init="random"`.

    Attributes:
        rank: r.
        alpha: the numerator of s; None, as for methods without such a field, means alpha = rank.
        init: the name of the initialisation.
    """

    whole = ("rank",)

    rank: int
    alpha: float | None = None
    init: str

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def starts_as_base(self) -> bool:
        return self.init != "random"


def uniform(tensor: Tensor, fan_in: int, generator: torch.Generator | None) -> Tensor:
    """Fill the tensor in place uniformly from ±1/sqrt(fan_in)."""
    return tensor.uniform_(-1, 1, generator=generator).div_(sqrt(max(fan_in, 1)))
