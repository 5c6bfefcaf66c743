"""How methods that are defined for a matrix see a parameter: as it is, transposed, or a kernel flattened."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Literal

import torch
from torch import nn

from ..select import Site
from ..weights import Reshaped, Weight
from .lora import HF_CONV1D, LoRA
from .method import Method, is_a

View = Literal["matrix", "transposed", "kernel"]
USUAL = LoRA()


class MatrixMethod(Method):
    """A method that is defined for a matrix; its usual sites are those of `LoRA`."""

    def takes(self, site: Site) -> bool:
        return USUAL.takes(site)

    def overlooks(self, module: nn.Module) -> str | None:
        return USUAL.overlooks(module)

    def refuses(self, site: Site) -> str | None:
        if site.parameter.ndim < 2:
            return "a parameter of at least 2 dimensions, which has an input and an output"
        return super().refuses(site)


def is_lookup(site: Site) -> bool:
    """Whether the parameter's rows are looked up: what a layer computes is then a row."""
    return isinstance(site.module, (nn.Embedding, nn.EmbeddingBag))


def view_of(site: Site) -> View:
    """How a site's parameter is seen as a matrix `(..., out, in)`; leading dimensions are stacks of matrices.

    transformers' Conv1D and embeddings hold `(in, out)`; a kernel has a row for each output channel.
    """
    if isinstance(site.module, nn.modules.conv._ConvNd) and site.param_name == "weight":
        return "kernel"
    return "transposed" if is_lookup(site) or is_a(site.module, HF_CONV1D) else "matrix"


def matrix_shape(shape: torch.Size, view: View) -> torch.Size:
    """Shape of the matrix that `on_matrix` works on: `(..., out, in)`."""
    if view == "kernel":
        return torch.Size([shape[0], prod(shape[1:])])
    return torch.Size([*shape[:-2], shape[-1], shape[-2]]) if view == "transposed" else shape


def on_matrix(base: Weight, view: View, change: Callable[[Weight], Weight]) -> Weight:
    """The weight whose matrix is `change` of the base's."""
    if view == "transposed":
        return change(base.mT).mT
    if view == "kernel":
        return Reshaped(change(Reshaped(base, matrix_shape(base.shape, view))), base.shape)
    return change(base)
