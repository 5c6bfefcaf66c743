"""What the oracle tests of the methods share: a formula by hand, and PEFT's own model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

State = Mapping[str, Tensor]


def shaken(adapted: gf.AdaptedModel, seed: int = 1, size: float = 0.3) -> gf.AdaptedModel:
    """The adapted model with noise on every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    state = adapted.adapter_state_dict()
    for name, tensor in adapted.named_trainable_parameters():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        state[name] = tensor.detach() + size * noise.to(tensor)
    return adapted.with_adapter(state)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float, what: str = "output") -> None:
    """Equal within a tolerance, of the largest element where that is above 1."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)} for {tuple(wanted.shape)}"
    off, size = (found - wanted).abs().max().item(), max(1.0, wanted.abs().max().item())
    assert off <= tolerance * size, f"{what}: off by {off:.1e}, sizes up to {size:.1e}"


def assert_formula(
    adapted: gf.AdaptedModel, model: nn.Module, formula: Callable[[State], dict[str, Tensor]], *inputs: Tensor
) -> None:
    """The adapted model computes, forward and backward, what a copy of the model does on dense weights made by hand.

    Args:
        formula: the adapter's tensors -> the changed parameters by name, differentiable.
    """
    leaves = {name: t.detach().clone().requires_grad_() for name, t in adapted.named_trainable_parameters()}
    state = {**adapted.adapter_state_dict(), **leaves}
    wanted = torch.func.functional_call(copy.deepcopy(model), formula(state), inputs)
    found = adapted(*inputs)
    assert_near(found, wanted, 1e-10)
    names, tensors = zip(*adapted.named_trainable_parameters(), strict=True)
    weights = torch.sin(torch.arange(1, found.numel() + 1, dtype=found.dtype)).reshape(found.shape)
    got = torch.autograd.grad((found.tanh() * weights).sum(), tensors)
    want = torch.autograd.grad((wanted.tanh() * weights).sum(), [leaves[name] for name in names])
    for name, a, b in zip(names, got, want, strict=True):
        assert b.abs().max() > 0, f"{name}: nothing to compare"
        assert_near(a, b, 1e-10, name)
    # What rests between calls must follow an optimizer's step.
    for parameter, gradient in zip(tensors, got, strict=True):
        parameter.data.sub_(0.1 * gradient)
    stepped = torch.func.functional_call(copy.deepcopy(model), formula(adapted.adapter_state_dict()), inputs)
    assert_near(adapted(*inputs), stepped, 1e-10, "after a step")


def peft_of(model: nn.Module, config: Any, size: float = 0.3) -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's model around a copy of ours with random adapter weights, and these by the name of module and tensor."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, parameter in made.named_parameters():
        if ".default" in name:
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * size
            short = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            tensors[short] = parameter.detach().clone()
    return made.eval(), tensors
