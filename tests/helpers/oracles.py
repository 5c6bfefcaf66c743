"""What the oracle tests of the methods share: networks, a formula by hand, and PEFT's own model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gift_func as gf

State = Mapping[str, Tensor]
IDS = (torch.arange(10).reshape(2, 5) * 7) % 11


class EveryKind(nn.Module):
    """A layer of every kind that PEFT's low-rank methods take."""

    def __init__(self, dilation: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lin = nn.Linear(4, 6)
        self.gpt = Conv1D(5, 6)  # type: ignore[no-untyped-call]
        self.conv1 = nn.Conv1d(5, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, padding=dilation, dilation=dilation)
        self.conv3 = nn.Conv3d(1, 2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.gpt(torch.tanh(self.lin(self.embed(ids)))))
        x = torch.tanh(self.conv1(x.mT)).unsqueeze(1)
        x = torch.tanh(self.conv2(x)).unsqueeze(1)
        return self.conv3(x).flatten(1)  # type: ignore[no-any-return]


class Products(nn.Module):
    """Layers whose sides are products of several factors, one convolution with groups, one of single elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.lin = nn.Linear(8, 36)
        self.gpt = Conv1D(16, 36)  # type: ignore[no-untyped-call]
        self.conv1 = nn.Conv1d(16, 16, 3, padding=2, dilation=2)
        self.point = nn.Conv1d(16, 16, 1)
        self.conv2 = nn.Conv2d(16, 24, (3, 2), stride=2, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.gpt(torch.tanh(self.lin(self.embed(ids)))))
        x = torch.tanh(self.point(torch.tanh(self.conv1(x.mT))))
        return self.conv2(x.unsqueeze(-1)).flatten(1)  # type: ignore[no-any-return]


def net(dtype: torch.dtype, kind: Callable[[], nn.Module] = EveryKind) -> nn.Module:
    """A network, the same each time."""
    torch.manual_seed(0)
    return kind().to(dtype)


def layers(model: nn.Module) -> list[str]:
    """The names of a network's layers."""
    return [name for name, _ in model.named_children()]


def attention() -> tuple[nn.MultiheadAttention, tuple[Tensor, Tensor, Tensor]]:
    """An attention layer in float64, and a key and value apart from the query: rows of its packed weight are sliced."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (3, 5, 5))
    return nn.MultiheadAttention(4, 2).double(), (query, key, value)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer as the matrix `(out, in)`; an embedding's as it is."""
    weight = model.get_parameter(f"{name}.weight").detach()
    return weight.T if name == "gpt" else weight.flatten(1)


def stored(model: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices `(out, in)` by layer as the layers store their weights, by the weights' names."""
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in matrices}
    return {f"{name}.weight": m.T if name == "gpt" else m.reshape(shapes[name]) for name, m in matrices.items()}


def shaken(adapted: gf.AdaptedModel, seed: int = 1, by: float = 0.3) -> gf.AdaptedModel:
    """The adapted model with noise on every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    state = adapted.adapter_state_dict()
    for name, tensor in adapted.named_trainable_parameters():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        state[name] = tensor.detach() + by * noise.to(tensor)
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
    # Weights that stay bound between calls must follow an optimizer's step.
    for parameter, gradient in zip(tensors, got, strict=True):
        parameter.data.sub_(0.1 * gradient)
    stepped = torch.func.functional_call(copy.deepcopy(model), formula(adapted.adapter_state_dict()), inputs)
    assert_near(adapted(*inputs), stepped, 1e-10, "after a step")


def assert_drops_inputs(method: gf.Method, model: nn.Module, x: Tensor) -> None:
    """Dropout, of a half, acts in training on the input of the change and on nothing else."""
    adapted = shaken(gf.adapt(model, {"weight": method}))
    changed = adapted.merge()
    torch.manual_seed(5)
    found = adapted.train()(x)
    torch.manual_seed(5)
    thin = nn.functional.dropout(x, 0.5)
    assert_near(found, model(x) + changed(thin) - model(thin), 1e-10)
    assert_near(adapted.eval()(x), changed(x), 1e-10)


def assert_starts(model: nn.Module, as_base: Sequence[gf.Method], elsewhere: Sequence[gf.Method]) -> None:
    """An adapted network computes exactly what its base does where a method starts so, and something else where not."""
    for method in (*as_base, *elsewhere):
        assert torch.equal(gf.adapt(model, {"*.weight": method})(IDS), model(IDS)) == (method in as_base), str(method)


def peft_of(model: nn.Module, config: Any, size: float = 0.3) -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's model around a copy of ours with random adapter weights, and these by the name of module and tensor.

    An embedding's A and B, which PEFT names apart and keeps the other way round and transposed, go by our names.
    """
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
            start, embedding, factor = short.partition("_embedding_")
            tensor = parameter.detach().clone()
            tensors[f"{start}_{'BA'['AB'.index(factor)]}" if embedding else short] = tensor.T if embedding else tensor
    return made.eval(), tensors
