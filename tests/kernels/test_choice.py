"""Fused layers of rotated weights and of shared shards: the formula, every derivative, and when they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift_func as gf
from gift_func.kernels import choice, rotated_linear, shared_linear
from gift_func.weights import cayley, neumann, rotated, shared, skew

Layer = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def rotated_layer(orthogonal: bool) -> tuple[Layer, Layer]:
    """The layer of a matrix's rotation by the elements above the diagonals of skew-symmetric blocks, and its formula."""

    def blocks(raw: Tensor) -> Tensor:
        return cayley(skew(raw, 4)) if orthogonal else neumann(skew(raw, 4), 5)

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, raw: Tensor) -> Tensor:
        return rotated_linear.rotated_linear(x, weight, bias, blocks(raw), orthogonal)

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None, raw: Tensor) -> Tensor:
        y: Tensor = x @ torch.block_diag(*blocks(raw)) @ weight.T
        return y if bias is None else y + bias

    return layer, formula


def shards(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """The formula of shared shards, element by element."""
    rows, columns = weight.shape
    rank, width = block.shape
    i, o = torch.arange(columns) % rank, torch.arange(rows) % width
    y = x @ (weight + block[i][:, o].T).T
    return y if bias is None else y + bias


CASES: dict[str, tuple[Layer, Layer, tuple[int, int], tuple[int, ...]]] = {  # layer, formula, W, what is learned
    "rotated, few rows": (*rotated_layer(False), (5, 8), (2, 6)),
    "rotated, many rows": (*rotated_layer(False), (9, 8), (2, 6)),
    "rotated exactly, few rows": (*rotated_layer(True), (5, 8), (2, 6)),
    "rotated exactly, many rows": (*rotated_layer(True), (9, 8), (2, 6)),
    "shared": (shared_linear.shared_linear, shards, (6, 8), (4, 6)),
    "shared, with a rest": (shared_linear.shared_linear, shards, (6, 8), (3, 6)),
    "shared, mini": (shared_linear.shared_linear, shards, (6, 8), (3, 2)),
}
TOKENS = 6


def make(name: str, lead: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> tuple[Layer, Layer, list[Tensor]]:
    layer, formula, shape, own = CASES[name]
    g = torch.Generator().manual_seed(0)
    sizes = [(*lead, 3, TOKENS // 3, shape[1]), shape, (*lead, shape[0]), (*lead, *own)]
    return layer, formula, [0.5 * torch.randn(size, generator=g, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("piece", [1, 2**16])
def test_formula(name: str, with_bias: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotated_linear, "CHUNK", piece)
    layer, formula, (x, weight, bias, own) = make(name)
    learned = [x, own, bias] if with_bias else [x, own]
    for tensor in learned:
        tensor.requires_grad_()
    args = (x, weight, bias if with_bias else None, own)
    found, wanted = layer(*args), formula(*args)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, learned, cotangent, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found, learned, cotangent, retain_graph=True), gradients)
    torch.testing.assert_close(torch.autograd.grad(found, learned, cotangent, create_graph=True), gradients)
    only = formula(x.detach(), weight, None, own)  # the first layer of a network has an input without a gradient
    mine = layer(x.detach(), weight, None, own)
    torch.testing.assert_close(torch.autograd.grad(mine, own, cotangent), torch.autograd.grad(only, own, cotangent))


@pytest.mark.parametrize("name", CASES)
def test_second_and_forward_derivatives(name: str) -> None:
    layer, _, (x, weight, bias, own) = make(name)
    args = tuple(tensor.requires_grad_() for tensor in (x, bias, own))

    def call(x: Tensor, bias: Tensor, own: Tensor) -> Tensor:
        return layer(x, weight, bias, own)

    assert torch.autograd.gradcheck(call, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, args)
    y = call(*args)
    cotangents = torch.randn(2, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, args, cotangents, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, args, cotangent, retain_graph=True) for cotangent in cotangents]
    torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


@pytest.mark.parametrize("name", CASES)
def test_transforms(name: str) -> None:
    layer, formula, (x, weight, bias, own) = make(name, (3,))

    def loss(made: Layer) -> Callable[..., Tensor]:
        return lambda x, bias, own: made(x, weight, bias, own).pow(3).sum()

    args = (x, bias, own)
    both = [loss(layer), loss(formula)]
    found, wanted = [torch.vmap(torch.func.grad(f, (0, 1, 2)))(*args) for f in both]
    torch.testing.assert_close(found, wanted)
    found, wanted = [torch.vmap(torch.func.grad(f, (0, 1, 2)), (None, None, 0))(x[0], bias[0], own) for f in both]
    torch.testing.assert_close(found, wanted)
    found, wanted = [torch.vmap(f, (0, None, None))(x, bias[0], own[0]) for f in both]
    torch.testing.assert_close(found, wanted)
    one = (x[0], bias[0], own[0])
    found, wanted = [torch.func.jvp(torch.func.grad(f, (0, 2)), one, one) for f in both]
    torch.testing.assert_close(found, wanted)
    found, wanted = [torch.func.hessian(lambda own, f=f: f(x[0], bias[0], own))(own[0]) for f in both]
    torch.testing.assert_close(found, wanted)


def test_one_block_for_all() -> None:
    layer, formula, (x, weight, bias, own) = make("rotated, few rows")
    raw = own[:1].requires_grad_()
    found, wanted = layer(x, weight, bias, raw), formula(x, weight, bias, raw.expand(2, -1))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), raw), torch.autograd.grad(wanted.square().sum(), raw))


METHODS = [gf.OFT(4), gf.OFT(4, neumann=0), gf.OFT(4, block_share=True), gf.OFT(4, dropout=0.5), gf.BOFT(4), gf.MiSS(4)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are computed by a fused kernel."""
    seen: list[str] = []

    def spied(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            seen.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(rotated, "MIN_TOKENS_ROTATED", 12)
    monkeypatch.setattr(rotated, "rotated_linear", spied("rotated", rotated_linear.rotated_linear))
    monkeypatch.setattr(shared, "shared_linear", spied("shared", shared_linear.shared_linear))
    return seen


def adapted_layer(method: gf.Method) -> gf.AdaptedModel:
    torch.manual_seed(0)
    adapted = gf.adapt(nn.Linear(8, 6), method)
    state = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in adapted.adapter.items()}
    return adapted.with_adapter(state)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_taken_where_a_network_trains_on_many_tokens(method: gf.Method, taken: list[str]) -> None:
    adapted = adapted_layer(method).eval()
    x = torch.randn(2, 8, 8, requires_grad=True)
    y = adapted(x)
    assert len(taken) == 1
    torch.testing.assert_close(y, adapted.merge()(x))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.trainable_parameters())
    adapted(x[:, :1])
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), y)
    assert len(taken) == 1
    torch.testing.assert_close(torch.compile(adapted, backend="aot_eager", fullgraph=True)(x), y)
    assert len(taken) == 1


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_stacked_networks_equal_separate_ones(method: gf.Method, taken: list[str]) -> None:
    first = adapted_layer(method).eval()
    members = [first, first.with_adapter({name: 2 * p.detach() for name, p in first.adapter.items()})]
    x = torch.randn(2, 16, 8)
    stacked = gf.stack(members)
    found = stacked.map(x)
    assert not taken
    torch.testing.assert_close(found, torch.stack([member(x[i]) for i, member in enumerate(members)]))
    assert len(taken) == 2


def test_when_it_is_refused() -> None:
    x, weight, bias, own = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), torch.randn(2, 6)
    assert choice.can_fuse(x, weight, bias, own)
    assert choice.can_fuse(x, weight, None, nn.Parameter(own))
    assert not choice.can_fuse(x[0], weight, bias, own)
    assert not choice.can_fuse(x, weight.expand(2, -1, -1), bias, own)
    assert not choice.can_fuse(x, weight.clone().requires_grad_(), bias, own)
    assert not choice.can_fuse(x, weight, bias, own.double())
    assert not choice.can_fuse(*(t.bfloat16() for t in (x, weight, bias, own)))
    assert not torch.vmap(lambda own: own.sum() * choice.can_fuse(x, weight, bias, own))(own.expand(3, 2, 6)).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert not choice.can_fuse(x, weight, bias, own)
    with torch.no_grad():
        assert not choice.can_fuse(x, weight, bias, own)


def test_of_shared_shards_only_the_sums_are_kept() -> None:
    x, weight, block = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32), torch.randn(4, 16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shared_linear.shared_linear(x, weight, None, block)
    assert sum(t.numel() for t in kept if t is not weight and t is not block) == 64 * 4
