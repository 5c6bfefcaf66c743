"""A low-rank convolution as two convolutions: the formed kernel's numbers, and where the kernel is formed all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gift_func.kernels import convolution
from gift_func.weights import LowRank, Magnitude, Slot

SCALE = 0.7
Layer = Callable[..., Tensor]
# The kernel's shape, the input's, and the convolution.
FORWARD: dict[str, tuple[tuple[int, ...], tuple[int, ...], Layer]] = {
    "conv1d": ((4, 3, 3), (2, 3, 7), lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1)),
    "conv1d unbatched": ((4, 3, 3), (3, 7), lambda x, w, b: F.conv1d(x, w, b, dilation=2)),
    "conv2d": ((4, 3, 3, 3), (2, 3, 5, 6), lambda x, w, b: F.conv2d(x, w, b, padding="same")),
    "conv2d, by keywords": ((4, 3, 1, 1), (2, 3, 4, 4), lambda x, w, b: F.conv2d(input=x, weight=w, bias=b, stride=(1, 2))),
    "conv3d": ((4, 3, 2, 1, 2), (2, 3, 3, 3, 3), lambda x, w, b: F.conv3d(x, w, b)),
}
OTHER: dict[str, tuple[tuple[int, ...], tuple[int, ...], Layer]] = {
    "grouped": ((4, 3, 3), (2, 6, 7), lambda x, w, b: F.conv1d(x, w, b, groups=2)),
    "transposed": ((4, 3, 3, 3), (2, 4, 4, 4), lambda x, w, b: F.conv_transpose2d(x, w, b)),
    "transposed, as many in as out": ((4, 4, 3, 3), (2, 4, 4, 4), lambda x, w, b: F.conv_transpose2d(x, w, b)),
}


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "PASSES", -(2**30))


def problem(case: tuple[tuple[int, ...], tuple[int, ...], Layer], rank: int = 2) -> tuple[Layer, Layer, list[Tensor]]:
    """The layer on a low-rank weight, on the kernel formed by hand, and x, bias, B and A."""
    shape, at, function = case
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    kernel = rand(*shape)
    outputs = function(torch.zeros(at), torch.zeros(shape), None).shape[1 - len(shape)]
    given = [rand(*at), rand(outputs), rand(shape[0], rank), rand(rank, kernel[0].numel())]

    def layer(x: Tensor, bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return function(x, Slot.of(LowRank(kernel, left, right, SCALE)), bias)

    def formula(x: Tensor, bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return function(x, kernel + SCALE * (left @ right).reshape(shape), bias)

    return layer, formula, given


def close(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def largest_kernel(run: Callable[[], object]) -> int:
    """Output channels of the widest kernel that a gradient is computed for."""
    seen: list[int] = []

    class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
                seen.append(args[2].shape[0])
            return func(*args, **(kwargs or {}))

    with Kernels():  # type: ignore[no-untyped-call]  # torch leaves its constructor untyped
        run()
    return max(seen)


@pytest.mark.parametrize("name", FORWARD)
def test_derivatives_of_both_orders_are_those_of_the_formed_kernel(name: str) -> None:
    layer, formula, given = problem(FORWARD[name])
    leaves = [t.requires_grad_() for t in given]
    close(layer(*leaves), formula(*leaves))
    firsts, seconds = [], []
    for function in (layer, formula):
        first = torch.autograd.grad(function(*leaves).tanh().sum(), leaves, create_graph=True)
        firsts.append(first)
        seconds.append(torch.autograd.grad(torch.cat([g.flatten() for g in first]).sin().sum(), leaves))
    close(firsts[0], firsts[1])
    close(seconds[0], seconds[1])
    left = leaves[2]
    assert largest_kernel(lambda: layer(*leaves).sum().backward()) == max(left.shape), "B is a kernel of one point"


@pytest.mark.parametrize("name", FORWARD)
def test_transforms(name: str) -> None:
    layer, formula, given = problem(FORWARD[name])
    generator = torch.Generator().manual_seed(1)
    stacks = [torch.stack([t, torch.randn(t.shape, generator=generator, dtype=t.dtype)]) for t in given]
    for dims in ((0, 0, 0, 0), (None, None, 0, 0), (0, None, None, 0)):
        chosen = [t if d is None else s for t, s, d in zip(given, stacks, dims, strict=True)]
        loss = [lambda *args, f=f: f(*args).tanh().sum() for f in (layer, formula)]
        close(vmap(layer, dims)(*chosen), vmap(formula, dims)(*chosen))
        close(vmap(grad(loss[0], (0, 2, 3)), dims)(*chosen), vmap(grad(loss[1], (0, 2, 3)), dims)(*chosen))
    tangents = tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in given)
    close(jvp(layer, tuple(given), tangents), jvp(formula, tuple(given), tangents))


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_groups_and_transposes_are_formed(name: str, dropout: float) -> None:
    shape, _, function = OTHER[name]
    layer, formula, given = problem(OTHER[name])
    x, bias, left, right = (t.requires_grad_() for t in given)
    if not dropout:
        close(layer(x, bias, left, right), formula(x, bias, left, right))
        return
    kernel = torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(5)
    found = function(x, Slot.of(LowRank(kernel, left, right, SCALE, dropout)), bias)
    torch.manual_seed(5)
    change = function(F.dropout(x, dropout), SCALE * (left @ right).reshape(shape), None)
    close(found, function(x, kernel, bias) + change)


@pytest.mark.parametrize("name", FORWARD)
def test_dropout_meets_the_change_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "PASSES", 2**30)
    shape, _, function = FORWARD[name]
    x, bias, left, right = (t.requires_grad_() for t in problem(FORWARD[name])[2])
    kernel = torch.randn(shape, dtype=torch.float64)

    torch.manual_seed(5)
    found = function(x, Slot.of(LowRank(kernel, left, right, SCALE, 0.5)), bias)
    torch.manual_seed(5)
    change = function(F.dropout(x, 0.5), SCALE * (left @ right).reshape(shape), None)
    close(found, function(x, kernel, bias) + change)
    assert largest_kernel(lambda: found.sum().backward()) == max(left.shape), "split, where a formed change would be worth it"


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", FORWARD)
def test_a_kernel_of_given_norms(name: str, detach: bool) -> None:
    shape, _, function = FORWARD[name]
    x, bias, left, right = problem(FORWARD[name])[2]
    generator = torch.Generator().manual_seed(1)
    kernel = torch.randn(shape, generator=generator, dtype=torch.float64)
    magnitude = torch.rand(1, shape[0], *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)

    def layer(x: Tensor, bias: Tensor, left: Tensor, right: Tensor, m: Tensor) -> Tensor:
        return function(x, Slot.of(Magnitude(LowRank(kernel, left, right, SCALE), m, None, -1, detach)), bias)

    def formula(x: Tensor, bias: Tensor, left: Tensor, right: Tensor, m: Tensor) -> Tensor:
        v = kernel + SCALE * (left @ right).reshape(shape)
        norm = v.flatten(1).norm(dim=1).reshape(-1, *[1] * (len(shape) - 1))
        return function(x, m.reshape(norm.shape) * v / (norm.detach() if detach else norm), bias)

    leaves = [t.requires_grad_() for t in (x, bias, left, right, magnitude)]
    close(layer(*leaves), formula(*leaves))
    close(*(torch.autograd.grad(f(*leaves).tanh().sum(), leaves) for f in (layer, formula)))
    stacks = [torch.stack([t.detach(), t.detach() + 1]) for t in leaves]
    close(*(vmap(grad(lambda *args, f=f: f(*args).tanh().sum(), (0, 1, 2, 3, 4)))(*stacks) for f in (layer, formula)))
    if detach:  # or the norm, which is of all rows of V, has a gradient
        wide = largest_kernel(lambda: layer(*leaves).sum().backward())
        assert wide == max(left.shape), "split"


def test_mixed_element_types_and_autocast() -> None:
    image, kernel = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    left, right = torch.randn(4, 2, requires_grad=True), torch.randn(2, 27, requires_grad=True)
    wanted = F.conv2d(image, kernel + SCALE * (left @ right).reshape(kernel.shape))
    narrow = F.conv2d(image.bfloat16(), Slot.of(LowRank(kernel.bfloat16(), left, right, SCALE)))
    with torch.autocast("cpu", torch.bfloat16):
        cast = F.conv2d(image, Slot.of(LowRank(kernel, left, right, SCALE)))
    for found in (narrow, cast):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.03 * wanted.abs().max().item())


def test_wide_layers_split_where_a_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def products(channels: int, trained: bool = True) -> int:
        kernel, image = torch.randn(channels, channels, 3, 3), torch.randn(1, channels, 8, 8)
        left, right = torch.randn(channels, 8, requires_grad=trained), torch.randn(8, channels * 9, requires_grad=trained)
        with FlopCounterMode(display=False) as counter:
            made = F.conv2d(image, Slot.of(LowRank(kernel, left, right)), padding=1)
            if trained:
                made.sum().backward()
        return int(counter.get_total_flops())

    def plain(channels: int) -> int:
        return 2 * channels * channels * 9 * 64

    assert products(64) > 2 * plain(64), "the formed kernel gets a gradient of its own"
    assert products(256) < 1.2 * plain(256), "two thin convolutions, and no gradient of anything wide"
    forming = 2 * 256 * 256 * 9 * 8
    assert products(256, trained=False) == plain(256) + forming, "no gradient: the kernel is formed"
    with torch.no_grad():
        left, right = torch.randn(256, 8, requires_grad=True), torch.randn(8, 256 * 9, requires_grad=True)
        assert not convolution.splitting_pays(torch.Size((256, 256, 3, 3)), left, right)


@pytest.mark.slow
def test_compiled() -> None:
    layer, formula, given = problem(FORWARD["conv2d"])
    leaves = [t.requires_grad_() for t in given]
    found = torch.autograd.grad(torch.compile(layer, fullgraph=True)(*leaves).tanh().sum(), leaves)
    close(found, torch.autograd.grad(formula(*leaves).tanh().sum(), leaves))

    def gradients(function: Layer) -> Layer:
        return grad(lambda *args: function(*args).tanh().sum(), (0, 2, 3))

    plain = [t.detach() for t in given]
    close(torch.compile(gradients(layer), fullgraph=True)(*plain), gradients(formula)(*plain))
