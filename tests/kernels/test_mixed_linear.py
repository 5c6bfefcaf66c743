"""The linear layer of a mixed batch against its formula, written out, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.models import assert_close
from torch import Tensor

from gift_func.kernels.mixed_linear import MixedLinear, mixed_linear

SIZES = [(2, 1, 3), (2, 2), (4,), (1, 5)]


def case(sizes: tuple[int, ...], without: int, rank: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(sizes) + without, 4), (5, 4), (5,), (len(sizes), 5, rank), (len(sizes), rank, 4)]
    x, weight, bias, left, right = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return x, weight, bias, left, right


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float, sizes: tuple[int, ...]
) -> Tensor:
    """Row by row."""
    owners = [index for index, size in enumerate(sizes) for _ in range(size)]
    rows = []
    for row, values in enumerate(x):
        whole = weight + scale * left[owners[row]] @ right[owners[row]] if row < len(owners) else weight
        rows.append(whole @ values + (0 if bias is None else bias))
    return torch.stack(rows)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("without", [0, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_formula_and_gradients(sizes: tuple[int, ...], without: int, biased: bool) -> None:
    x, weight, bias, left, right = case(sizes, without)
    given = [x, left, right, *([bias] if biased else [])]
    for tensor in given:
        tensor.requires_grad_()
    known = bias if biased else None
    ours, theirs = (f(x, weight, known, left, right, 1.7, sizes) for f in (mixed_linear, formula))
    assert_close(ours, theirs)
    with torch.no_grad():
        assert_close(mixed_linear(x, weight, known, left, right, 1.7, sizes), theirs.detach())
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), given), torch.autograd.grad(theirs.sin().sum(), given), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("without", [0, 1])
def test_second_derivatives(sizes: tuple[int, ...], without: int) -> None:
    x, weight, bias, left, right = case(sizes, without)
    given = tuple(tensor.requires_grad_() for tensor in (x, left, right, bias))
    found = []
    for function in (mixed_linear, formula):
        loss = function(x, weight, bias, left, right, 0.7, sizes).sin().sum()
        first = torch.autograd.grad(loss, given, create_graph=True)
        second = torch.autograd.grad(sum((g.cos().sum() for g in first), torch.zeros(())), given)
        found.append((*first, *second))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", ["x", "left", "right", "bias"])
def test_only_what_is_asked_for(wanted: str) -> None:
    x, weight, bias, left, right = case((2, 1), 1)
    named = {"x": x, "left": left, "right": right, "bias": bias}
    named[wanted].requires_grad_()
    found, theirs = (f(x, weight, bias, left, right, 0.7, (2, 1)) for f in (mixed_linear, formula))
    (ours,) = torch.autograd.grad(found.sin().sum(), named[wanted])
    assert_close(ours, torch.autograd.grad(theirs.sin().sum(), named[wanted])[0])


def test_nothing_given_is_written_to() -> None:
    tensors = case((2, 1), 1)
    x, weight, bias, left, right = tensors
    before = [tensor.clone() for tensor in tensors]
    for tensor in (x, left, right):
        tensor.requires_grad_()
    mixed_linear(x, weight, bias, left, right, 0.7, (2, 1)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert [tensor._version for tensor in tensors] == [0] * 5


def test_the_thin_product_alone_has_a_gradient() -> None:
    x, weight, _, left, right = case((2, 1), 1)
    x.requires_grad_()
    thin = MixedLinear.apply(x, weight, None, left, right, 0.7, (2, 1))[1]  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad(thin.sin().sum(), x)
    rows = torch.cat([x[:2] @ right[0].T, x[2:3] @ right[1].T])
    assert_close(found, torch.autograd.grad(rows.sin().sum(), x)[0])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("without", [0, 1])
@pytest.mark.parametrize("batched", [(0,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_vmap(sizes: tuple[int, ...], without: int, batched: tuple[int, ...]) -> None:
    cases = [[t + seed for t in case(sizes, without)] for seed in range(3)]

    given = [cases[0][0], cases[0][2], cases[0][3], cases[0][4]]
    stacks = [torch.stack([c[at] for c in cases]) for at in (0, 2, 3, 4)]
    mapped = [stacks[at] if at in batched else given[at] for at in range(4)]
    dims = tuple(0 if at in batched else None for at in range(4))
    for tensor in mapped:
        tensor.requires_grad_()

    def ours(x: Tensor, bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return mixed_linear(x, cases[0][1], bias, left, right, 0.7, sizes)

    found = torch.vmap(ours, dims)(*mapped)
    parts = [[t[i] if d == 0 else t for t, d in zip(mapped, dims, strict=True)] for i in range(3)]
    wanted = torch.stack([formula(x, cases[0][1], bias, left, right, 0.7, sizes) for x, bias, left, right in parts])
    assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), mapped), torch.autograd.grad(wanted.sin().sum(), mapped), strict=True
    ):
        assert_close(a, b)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("without", [0, 1])
@pytest.mark.parametrize("moved", [(0,), (1,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_jvp(sizes: tuple[int, ...], without: int, moved: tuple[int, ...]) -> None:
    x, weight, bias, left, right = case(sizes, without)
    given = [x, bias, left, right]
    tangents = tuple(torch.randn_like(given[at]) for at in moved)

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*some: Tensor) -> Tensor:
            own = list(given)
            for at, tensor in zip(moved, some, strict=True):
                own[at] = tensor
            return function(own[0], weight, own[1], own[2], own[3], 0.7, sizes)

        return call

    for tensor in (left, right):
        tensor.requires_grad_()  # so that the function is called even if only x has a tangent
    primals = tuple(given[at] for at in moved)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            ours, theirs = (torch.func.jvp(of(f), primals, tangents) for f in (mixed_linear, formula))
        assert_close(ours[0], theirs[0])
        assert_close(ours[1], theirs[1])
