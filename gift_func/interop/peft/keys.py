"""The keys and shapes of tensors in a PEFT file, and their names and shapes here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from ...methods.matrix import CONVOLUTIONS, HF_CONV1D
from ...methods.method import is_a
from ...select import Site

PREFIX = "base_model.model."


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """The transpose, in memory of its own."""
    return tensor.mT.contiguous()


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a PEFT file and the tensor here that it becomes.

    Attributes:
        key: its key in the file.
        local: the method's name of the tensor.
        read: from the file's tensor to the method's.
        write: from the method's tensor to the file's.
    """

    key: str
    local: str
    read: Callable[[Tensor], Tensor] = same
    write: Callable[[Tensor], Tensor] = same


class Paths:
    """The keys of modules in a file: each wrapper that PEFT puts around a module adds a step `base_layer`.

    Args:
        wrappers: module name -> how many wrappers PEFT puts around it.
    """

    def __init__(self, wrappers: Mapping[str, int]) -> None:
        self.wrappers = wrappers

    def outside(self, module_name: str) -> str:
        """The key of a module's outermost wrapper, or of the module where there is none."""
        path, done = PREFIX.removesuffix("."), ""
        for step in module_name.split(".") if module_name else []:
            path += ".base_layer" * (self.wrappers.get(done, 0) if done else 0)
            done = f"{done}.{step}" if done else step
            path += f".{step}"
        return path

    def inside(self, module_name: str) -> str:
        """The key of the module itself, within its wrappers."""
        return self.outside(module_name) + ".base_layer" * self.wrappers.get(module_name, 0)


def ties_embeddings(root: nn.Module) -> bool:
    """Whether a transformers model's config ties its head to its embedding."""
    return bool(getattr(getattr(root, "config", None), "tie_word_embeddings", False))


def is_target(module: nn.Module) -> bool:
    """Whether PEFT's LoRA adapts such a module by its weight."""
    return isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention, *CONVOLUTIONS)) or is_a(module, HF_CONV1D)


def by_module(site: Site) -> bool:
    """Whether PEFT's LoRA targets the parameter by its module's name, and not by its own."""
    if isinstance(site.module, nn.MultiheadAttention):
        return site.param_name == "in_proj_weight"
    return is_target(site.module) and site.param_name == "weight"


def lora_module(path: str, site: Site, twice: bool = False) -> list[FileTensor]:
    """The factors of a module's weight; `path` is the module's outermost wrapper.

    `twice` is for the `out_proj` of an attention that PEFT adapts. PEFT merges its change and then has the layer merge it
    again, so there a file's tensors stand for twice their product.
    """
    if isinstance(site.module, nn.Embedding):
        # PEFT's product is that of the transposed table.
        return [
            FileTensor(f"{path}.lora_embedding_A", "lora_B", transposed, transposed),
            FileTensor(f"{path}.lora_embedding_B", "lora_A", transposed, transposed),
        ]
    doubled = (partial(torch.mul, other=2), partial(torch.mul, other=0.5)) if twice else ()
    return [FileTensor(f"{path}.lora_A.weight", "lora_A"), FileTensor(f"{path}.lora_B.weight", "lora_B", *doubled)]


def lora_parameter(path: str, site: Site) -> list[FileTensor]:
    """The factors of a parameter that is targeted by its own name: a matrix, or a stack of them, one for each expert.

    PEFT flattens the experts and the ranks into one axis, in A with the expert first, in B with the rank first.
    """
    a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    if site.parameter.ndim == 2:
        if is_a(site.module, HF_CONV1D):
            return [FileTensor(a, "lora_B", transposed, transposed), FileTensor(b, "lora_A", transposed, transposed)]
        return [FileTensor(a, "lora_A"), FileTensor(b, "lora_B")]
    experts = site.parameter.shape[0]
    if getattr(site.module, "is_transposed", False):
        return [
            FileTensor(a, "lora_B", *_rearrangements("(e r) i", "e i r", experts)),
            FileTensor(b, "lora_A", *_rearrangements("o (r e)", "e r o", experts)),
        ]
    return [
        FileTensor(a, "lora_A", *_rearrangements("(e r) i", "e r i", experts)),
        FileTensor(b, "lora_B", *_rearrangements("o (r e)", "e o r", experts)),
    ]


def _rearrangements(theirs: str, ours: str, experts: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return partial(rearrange, pattern=f"{theirs} -> {ours}", e=experts), partial(rearrange, pattern=f"{ours} -> {theirs}")
