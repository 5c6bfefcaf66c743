"""Torch functions that a slot does not pass to its weight: reads of metadata, and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PROPERTIES = """
    shape ndim dtype device layout is_leaf grad_fn requires_grad grad _version _base output_nr is_cuda is_cpu is_xpu is_mps
    is_meta is_mkldnn is_sparse is_sparse_csr is_quantized is_nested is_ipu is_maia is_mtia is_xla is_vulkan itemsize nbytes
    names retains_grad _backward_hooks
""".split()

_METHODS = """
    size dim stride numel nelement element_size storage_offset is_contiguous is_floating_point is_complex is_signed is_conj
    is_neg is_inference get_device ndimension __len__ _is_view is_shared is_pinned is_same_size _is_zerotensor has_names
    dim_order untyped_storage storage _typed_storage storage_type data_ptr _has_symbolic_sizes_strides
""".split()

_FUNCTIONS = "is_floating_point is_complex is_conj is_neg is_inference numel is_same_size is_signed".split()


def getter(name: str) -> Callable[..., Any]:
    """The function that `__torch_function__` is given when an attribute of a tensor is read."""
    read: Callable[..., Any] = getattr(Tensor, name).__get__
    return read


METADATA: frozenset[Callable[..., Any]] = frozenset(
    [getter(name) for name in _PROPERTIES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)]
    + [getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)]
)
"""Functions that read only metadata, which the placeholder has. Dynamo calls many of them to make a fake tensor of a slot."""

WRITES = frozenset(
    """
    __set__ __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__ register_hook register_post_accumulate_grad_hook retain_grad backward
    """.split()
)
"""Names of functions that change their first argument without a trailing underscore, or register for its gradient."""
