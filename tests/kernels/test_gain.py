"""Features times a gain in one pass: the same numbers, derivatives of every order, and DoRA's layer through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from gift_func.kernels import fused_linear, gain
from gift_func.kernels.gain import apply_gain
from gift_func.weights import LowRank, Magnitude


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gain, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(fused_linear, "MIN_TOKENS", 1)


def arguments(stacked: bool = False, with_bias: bool = True) -> list[Tensor]:
    """v, g and, where it is asked for, b."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (2, 1, 4) if stacked else (4,), (4,)][: 2 + with_bias]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(v: Tensor, g: Tensor, b: Tensor | None = None) -> Tensor:
    return apply_gain(v, g, b)


def formula(v: Tensor, g: Tensor, b: Tensor | None = None) -> Tensor:
    return v * g + (0 if b is None else b)


def close(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_values_and_derivatives_of_both_orders(stacked: bool, with_bias: bool) -> None:
    leaves = [t.requires_grad_() for t in arguments(stacked, with_bias)]
    made = run(*leaves)
    assert made.grad_fn is not None
    assert made.grad_fn.name() == "GainBackward"
    close(made, formula(*leaves))
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_only_what_is_asked_for_gets_a_gradient_and_nothing_is_written_over(trained: tuple[int, ...]) -> None:
    given = [t.requires_grad_(i in trained) for i, t in enumerate(arguments())]
    before = [t.detach().clone() for t in given]
    seed = torch.randn(2, 3, 4, dtype=torch.float64)
    kept = seed.clone()
    run(*given).backward(seed)
    chosen = [given[i] for i in trained]
    close([t.grad for t in chosen], list(torch.autograd.grad(formula(*given), chosen, seed)))
    assert all((t.grad is not None) == (i in trained) for i, t in enumerate(given))
    assert all(torch.equal(t, was) for t, was in zip([*given, seed], [*before, kept], strict=True))


def test_a_gradient_that_is_a_view_of_one_number() -> None:
    given = [t.requires_grad_() for t in arguments()]
    found = torch.autograd.grad(run(*given).sum(), given)
    close(found, torch.autograd.grad(formula(*given).sum(), given))


@pytest.mark.parametrize("with_bias", [True, False])
def test_without_gradients_only_v_is_written_over(with_bias: bool) -> None:
    given = [t.requires_grad_() for t in arguments(with_bias=with_bias)]
    wanted, before = formula(*given).detach(), [t.detach().clone() for t in given]
    v = given[0].detach().clone()
    with torch.no_grad():
        made = run(v, *given[1:])
    close(made, wanted)
    assert made.data_ptr() == v.data_ptr()
    assert all(torch.equal(t, was) for t, was in zip(given, before, strict=True))


def test_forward_mode_outside_of_torch_func() -> None:
    given = [t.requires_grad_() for t in arguments()]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.randn_like(t)) for t in given]
        for moved in ([0], [1], [2], [0, 1, 2]):
            chosen = [duals[i] if i in moved else given[i] for i in range(3)]
            close(forward_ad.unpack_dual(run(*chosen)).tangent, forward_ad.unpack_dual(formula(*chosen)).tangent)


def test_many_gradients_at_once() -> None:
    given = [t.requires_grad_() for t in arguments()]
    seeds = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    found = torch.autograd.grad(run(*given), given, seeds, is_grads_batched=True)
    close(found, torch.autograd.grad(formula(*given), given, seeds, is_grads_batched=True))


def test_what_it_made_may_be_changed_in_place() -> None:
    given = [t.requires_grad_() for t in arguments()]
    found = torch.autograd.grad(run(*given).relu_().square().sum(), given)
    close(found, torch.autograd.grad(formula(*given).relu().square().sum(), given))


def test_mixed_element_types_are_computed_in_the_wider() -> None:
    v, g, b = arguments()
    narrow = v.bfloat16()
    made = run(narrow.clone().requires_grad_(), g, b)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, (narrow * g).bfloat16() + b.bfloat16(), rtol=0, atol=0)


# W, B, A, m, bias, x
SHAPES = [(4, 5), (4, 2), (2, 5), (4,), (4,), (6, 5)]


@pytest.mark.parametrize("detach", [True, False])
def test_a_layer_of_given_norms_against_the_dense_formula(detach: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, *rest = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES)
    leaves = [t.requires_grad_() for t in rest]

    def layer(left: Tensor, right: Tensor, m: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        v = LowRank(weight, left, right, 0.7)
        return Magnitude(v, m, weight.square().sum(-1), -1, detach).linear(x, bias)

    def dense(left: Tensor, right: Tensor, m: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        v = weight + 0.7 * left @ right
        norm = v.norm(dim=1, keepdim=True)
        return F.linear(x, m.unsqueeze(1) * v / (norm.detach() if detach else norm), bias)

    close(layer(*leaves), dense(*leaves))
    firsts, seconds = [], []
    for function in (layer, dense):
        first = torch.autograd.grad(function(*leaves).tanh().sum(), leaves, create_graph=True)
        firsts.append(first)
        seconds.append(torch.autograd.grad(torch.cat([g.flatten() for g in first]).sin().sum(), leaves))
    close(firsts[0], firsts[1])
    close(seconds[0], seconds[1])

    stacks = [torch.randn(3, *t.shape, generator=generator, dtype=torch.float64) for t in leaves]

    def gradient(function: object) -> object:
        assert callable(function)
        return torch.func.vmap(torch.func.grad(lambda *args: function(*args).tanh().sum(), (0, 1, 2, 3, 4)))(*stacks)

    close(gradient(layer), gradient(dense))
    close(torch.func.vmap(layer)(*stacks), torch.stack([dense(*(t[i] for t in stacks)) for i in range(3)]))
    tangents = tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in leaves)
    points = tuple(t.detach() for t in leaves)
    close(torch.func.jvp(layer, points, tangents), torch.func.jvp(dense, points, tangents))
