"""The low-rank linear layer under torch's transforms: every order of batching and differentiating, against the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.nn import functional as F

from gift_func.kernels import fused_linear, stacked_linear

SCALE = 0.7
# x, W, bias, B, A
SHAPES = [(3, 5), (4, 5), (4,), (4, 2), (2, 5)]
Layer = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "MIN_TOKENS", 1)
    monkeypatch.setattr(fused_linear, "MIN_TOKENS_TRANSFORMED", 0)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    found = fused_linear.low_rank_linear(x, weight, bias, left, right, SCALE)
    assert found is not None
    return found


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return F.linear(x, weight + SCALE * left @ right, bias)


def arguments(batched: str, sizes: tuple[int, ...] = (2,), seed: int = 0) -> list[Tensor]:
    """x, W, bias, B, A, those of which the letter (x, w, b, l, r) is named with leading axes."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for letter, shape in zip("xwblr", SHAPES, strict=True):
        lead = sizes if letter in batched else ()
        made.append(torch.randn(*lead, *shape, generator=generator, dtype=torch.float64))
    return made


def dims(batched: str) -> tuple[int | None, ...]:
    return tuple(0 if letter in batched else None for letter in "xwblr")


def close(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


BATCHED = ["x", "lr", "xlr", "l", "r", "xl", "b", "xb", "lrb", "xlrb", "w", "xwblr"]


def both(run: Callable[[Layer], object]) -> None:
    """The same, by the fused layer and by the formula."""
    close(run(fused), run(formula))


@pytest.mark.parametrize("batched", BATCHED)
def test_vmap(batched: str) -> None:
    both(lambda layer: vmap(layer, dims(batched))(*arguments(batched)))


@pytest.mark.parametrize("batched", BATCHED)
def test_gradients_of_both_orders_through_vmap(batched: str) -> None:
    given = arguments(batched)

    def run(*trained: Tensor) -> Tensor:
        x, bias, left, right = trained
        out: Tensor = vmap(fused, dims(batched))(x, given[1], bias, left, right)
        return out

    leaves = [given[i].clone().requires_grad_() for i in (0, 2, 3, 4)]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("batched", BATCHED)
@pytest.mark.parametrize("argument", [0, 2, 3, 4])
def test_vmap_of_grad_and_grad_of_vmap(batched: str, argument: int) -> None:
    given = arguments(batched)

    def inside(layer: Layer) -> object:
        return vmap(grad(lambda *args: layer(*args).square().sum(), argument), dims(batched))(*given)

    def outside(layer: Layer) -> object:
        return grad(lambda *args: vmap(layer, dims(batched))(*args).square().sum(), argument)(*given)

    both(inside)
    both(outside)


@pytest.mark.parametrize("batched", BATCHED)
def test_forward_mode_through_vmap_and_under_it(batched: str) -> None:
    given, moved = arguments(batched), arguments(batched, seed=1)
    chosen = (0, 2, 3, 4)

    def tangents(layer: Layer, *args: Tensor) -> Tensor:
        points, directions = args[:5], args[5:]

        def at(*trained: Tensor) -> Tensor:
            x, bias, left, right = trained
            return layer(x, points[1], bias, left, right)

        out: Tensor = jvp(at, tuple(points[i] for i in chosen), tuple(directions[i] for i in chosen))[1]
        return out

    both(lambda layer: vmap(lambda *args: tangents(layer, *args), dims(batched) * 2)(*given, *moved))
    both(lambda layer: tangents(lambda *args: vmap(layer, dims(batched))(*args), *given, *moved))


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("xlr", "xlr"), ("x", "lr"), ("lr", "x"), ("lr", "lr"), ("xlr", "x"), ("x", "xlr"), ("lr", "xlr"), ("b", "lr"),
        ("lrb", "x"),
    ],
)  # fmt: skip
def test_vmap_of_vmap(outer: str, inner: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = []
    for letter, shape in zip("xwblr", SHAPES, strict=True):
        lead = [size for size, letters in ((2, outer), (3, inner)) if letter in letters]
        given.append(torch.randn(*lead, *shape, generator=generator, dtype=torch.float64))

    def value(layer: Layer) -> object:
        return vmap(vmap(layer, dims(inner)), dims(outer))(*given)

    def gradient(layer: Layer) -> object:
        loss = grad(lambda *args: vmap(layer, dims(inner))(*args).square().sum(), (0, 3, 4))
        return vmap(loss, dims(outer))(*given)

    both(value)
    both(gradient)


def test_batch_axes_that_are_not_the_first() -> None:
    x, weight, bias, left, right = arguments("xblr", (2,))
    given = x.movedim(0, 1), weight, bias.movedim(0, 1), left.movedim(0, 2), right.movedim(0, 2)
    both(lambda layer: vmap(layer, (1, None, 1, 2, 2))(*given))
    wanted = torch.stack([formula(x[i], weight, bias[i], left[i], right[i]) for i in range(2)])
    close(vmap(fused, (1, None, 1, 2, 2), 1)(*given), wanted.movedim(0, 1))


def test_second_derivatives_under_vmap() -> None:
    given = arguments("xlr")

    def run(layer: Layer) -> object:
        def loss(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
            return layer(x, given[1], given[2], left, right).tanh().square().sum()

        return vmap(jacrev(grad(loss, (0, 1)), (0, 1)))(given[3], given[4], given[0])

    both(run)


@pytest.mark.parametrize("shared", [True, False])
def test_many_gradients_at_once_by_autograd(shared: bool) -> None:
    given = arguments("lr" if shared else "xlr")
    leaves = [given[i].requires_grad_() for i in (0, 2, 3, 4)]
    seeds = torch.randn(3, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(layer: Layer) -> object:
        out = vmap(layer, dims("lr" if shared else "xlr"))(*given)
        return torch.autograd.grad(out, leaves, seeds, is_grads_batched=True)

    both(run)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    for trained in [(0,), (3,), (4,), (3, 4), (2,)]:
        given = [t.requires_grad_(i in trained) for i, t in enumerate(arguments("xlr"))]
        out = vmap(fused, dims("xlr"))(*given)
        wanted = vmap(formula, dims("xlr"))(*given)
        chosen = [given[i] for i in trained]
        close(torch.autograd.grad(out.square().sum(), chosen), torch.autograd.grad(wanted.square().sum(), chosen))


def test_members_share_one_product_with_the_frozen_weight() -> None:
    seen = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in func.__name__:
                seen.append([tuple(a.shape) for a in args if isinstance(a, Tensor)])
            return func(*args, **(kwargs or {}))

    given = [t.requires_grad_(i in (0, 3, 4)) for i, t in enumerate(arguments("xlr"))]
    with Products():  # type: ignore[no-untyped-call]  # torch leaves its constructor untyped
        vmap(fused, dims("xlr"))(*given).sum().backward()
    with_weight = [shapes for shapes in seen if any(shape in {(4, 5), (5, 4)} for shape in shapes)]
    assert len(with_weight) == 2, f"forward and backward are a product each, of all six tokens: {with_weight}"
    assert all(any(shape[0] == 6 for shape in shapes) for shapes in with_weight)


def test_nothing_is_written_to_the_arguments() -> None:
    for batched in ("lr", "xlr", "xlrb"):
        given = arguments(batched)
        before = [t.clone() for t in given]
        with torch.no_grad():
            both(lambda layer, batched=batched, given=given: vmap(layer, dims(batched))(*given))  # type: ignore[misc]
        assert all(torch.equal(t, was) for t, was in zip(given, before, strict=True))


def test_few_tokens_take_the_separate_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "MIN_TOKENS_TRANSFORMED", 7)
    taken = []

    def layer(*args: Tensor) -> Tensor:
        made = fused_linear.low_rank_linear(args[0], args[1], args[2], args[3], args[4], SCALE)
        taken.append(made is not None)
        return args[0] if made is None else made.sum()

    vmap(layer, dims("xlr"))(*arguments("xlr", (2,)))
    vmap(layer, dims("xlr"))(*arguments("xlr", (3,)))
    vmap(layer, dims("lr"))(*arguments("lr", (3,)))
    assert taken == [False, True, True], "the tokens of all members count: 6, 9 and 9"


def test_a_batch_of_frozen_weights_is_left_to_torch() -> None:
    given = arguments("xwblr")
    found = stacked_linear.vmap_over(formula, (0, 0, 0, 0, 0), tuple(given))
    close(found, torch.stack([formula(*(t[i] for t in given)) for i in range(2)]))
