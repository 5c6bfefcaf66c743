"""The hosts: small modules, one for each kind of parameter, on which methods are tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Around(nn.Module):
    """A host's module with a tanh after it, so that gradients of second order are not zero."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """The host on one batch, `(batch, ...)`."""
        return self.call(self.inner, x).tanh()


class Experts(nn.Module):
    """A stack of matrices as one parameter, `(experts, out, in)`."""

    def __init__(self, experts: int, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, d_out, d_in) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, experts, tokens, in)` to `(batch, experts, tokens, out)`."""
        return x @ self.weight.mT


class Conv1D(nn.Module):
    """The linear layer of transformers, with a weight `(in, out)`; methods recognise it by its qualified name."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * 0.3)
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


# The laws do not need transformers to be installed.
Conv1D.__module__ = "transformers.pytorch_utils"


@dataclass(frozen=True)
class Host:
    """A small module to test methods on.

    Attributes:
        parameter: the name of the parameter that is adapted.
        module: makes the module.
        inputs: makes a batch of four samples.
        call: calls the module on a batch.
    """

    parameter: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)

    def make(self, dtype: torch.dtype) -> tuple[Around, Tensor]:
        """The host and its input, with the same values each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, x = Around(self.module(), self.call).to(dtype), self.inputs()
        return module, x.to(dtype) if x.is_floating_point() else x


HOSTS: dict[str, Host] = {
    "linear": Host("weight", lambda: nn.Linear(8, 12), lambda: torch.randn(4, 3, 8)),
    "linear square": Host("weight", lambda: nn.Linear(8, 8, bias=False), lambda: torch.randn(4, 8)),
    "conv1d": Host("weight", lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), lambda: torch.randn(4, 4, 9)),
    "conv2d": Host(
        "weight", lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2, padding_mode="circular"), lambda: torch.randn(4, 4, 6, 6)
    ),
    "conv2d grouped": Host("weight", lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: torch.randn(4, 4, 5, 5)),
    "conv2d pointwise": Host("weight", lambda: nn.Conv2d(4, 8, 1), lambda: torch.randn(4, 4, 3, 3)),
    "conv3d": Host("weight", lambda: nn.Conv3d(4, 8, 2), lambda: torch.randn(4, 4, 3, 3, 3)),
    "embedding": Host("weight", lambda: nn.Embedding(12, 8), lambda: torch.arange(16).reshape(4, 4) % 12),
    "attention": Host(
        "in_proj_weight",
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: torch.randn(4, 3, 8),
        lambda module, x: module(x, x, x)[0],
    ),
    "conv1d of transformers": Host("weight", lambda: Conv1D(12, 8), lambda: torch.randn(4, 3, 8)),
    "experts": Host("weight", lambda: Experts(2, 8, 4), lambda: torch.randn(4, 2, 3, 4)),
    "bias": Host("bias", lambda: nn.Linear(8, 12), lambda: torch.randn(4, 8)),
    "norm": Host("weight", lambda: nn.LayerNorm(8), lambda: torch.randn(4, 3, 8)),
}
