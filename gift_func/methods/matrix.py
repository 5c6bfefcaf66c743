"""Methods that are defined for a matrix: their usual sites, and how a parameter is seen as a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..select import Site
from ..weights import Reshaped, Weight
from .method import is_a
from .weight_method import WeightMethod

View = Literal["matrix", "stacked", "transposed", "lookup", "kernel", "balanced"]

HF_CONV1D = "transformers.pytorch_utils.Conv1D"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
TWO_FACTORS = "a parameter of at least 2 dimensions, to be written as a product of two factors"


@dataclass(frozen=True)
class MatrixMethod(WeightMethod):
    """A method for parameters that can be seen as a matrix.

    Its usual sites are the weights of Linear, Conv1d, Conv2d, Conv3d, transformers' Conv1D and nn.MultiheadAttention.

    Attributes:
        needs: what a parameter must be to be seen as a matrix, in the words of an error.
        view: how the parameter is seen as a matrix, set by `for_site`.
    """

    needs: ClassVar[str] = "a parameter of at least 2 dimensions, which has an input and an output"
    view: View = field(default="matrix", init=False, repr=False, compare=False)

    def is_default_site(self, site: Site) -> bool:
        if isinstance(site.module, nn.MultiheadAttention):
            return site.param_name in PACKED
        layer = isinstance(site.module, (nn.Linear, *CONVOLUTIONS)) or is_a(site.module, HF_CONV1D)
        return layer and site.param_name == "weight"

    def computed_weight_name(self, module: nn.Module) -> str | None:
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)) or "weight" in module._parameters:
            return None
        computed = isinstance(module.__dict__.get("weight"), Tensor)  # by weight_norm or spectral_norm
        return "weight" if computed or nn.utils.parametrize.is_parametrized(module, "weight") else None

    def why_not(self, site: Site) -> str | None:
        return self.needs if site.parameter.ndim < 2 else super().why_not(site)

    def for_site(self, site: Site) -> Self:
        view: View = "stacked" if site.parameter.ndim > 2 else "matrix"
        if isinstance(site.module, nn.modules.conv._ConvNd) and site.param_name == "weight":
            view = "kernel"
        elif is_a(site.module, HF_CONV1D):
            view = "transposed"
        elif isinstance(site.module, (nn.Embedding, nn.EmbeddingBag)):
            view = "lookup"
        return super().for_site(site).replace(view=view)


def matrix_shape(shape: torch.Size, view: View) -> torch.Size:
    """Shape of a parameter seen as a matrix, or a stack of matrices: `(..., out, in)`.

    transformers' Conv1D and embeddings, whose outputs are rows, store `(in, out)`. A kernel has a row for each output
    channel, or is read as a matrix that is about square.
    """
    if view == "balanced" and len(shape) > 3:
        return torch.Size([shape[0] * shape[2], shape[1] * prod(shape[3:])])
    if view in ("kernel", "balanced"):
        return torch.Size([shape[0], prod(shape[1:])])
    return torch.Size([*shape[:-2], shape[-1], shape[-2]]) if view in ("transposed", "lookup") else shape


def on_matrix(base: Weight, view: View, change: Callable[[Weight], Weight]) -> Weight:
    """The weight whose matrix is `change` of the base's matrix."""
    if view in ("transposed", "lookup"):
        return change(base.mT).mT
    if view == "kernel":
        return Reshaped(change(Reshaped(base, matrix_shape(base.shape, view))), base.shape)
    return change(base)
