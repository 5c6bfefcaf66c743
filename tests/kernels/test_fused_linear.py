"""The fused low-rank linear layer: the same numbers, derivatives of every order, and where it is not used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from gift_func.kernels import fused_linear
from gift_func.weights import LowRank

SCALE = 0.7


@pytest.fixture(autouse=True, params=[1, 3])
def _few_are_many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "MIN_TOKENS", 1)
    monkeypatch.setattr(fused_linear, "MIN_TOKENS_IN_CHUNKS", 1)
    monkeypatch.setattr(fused_linear, "CHUNKS", request.param)


def arguments(bias: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (4, 5), (4,), (4, 2), (2, 5)]
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return made if bias else [made[0], made[1], torch.empty(0), *made[3:]]


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    found = fused_linear.low_rank_linear(x, weight, bias, left, right, SCALE)
    assert found is not None
    return found


def separate(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return F.linear(x, weight + SCALE * left @ right, bias)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_values_and_derivatives_of_both_orders(with_bias: bool, strided: bool) -> None:
    x, weight, b, left, right = arguments()
    bias = b if with_bias else None
    if strided:
        x = x.transpose(0, 1)
    leaves = [t.detach().requires_grad_() for t in (x, left, right)] + ([b.requires_grad_()] if with_bias else [])

    def run(x: Tensor, left: Tensor, right: Tensor, *rest: Tensor) -> Tensor:
        return fused(x, weight, rest[0] if rest else None, left, right)

    torch.testing.assert_close(run(*leaves), separate(leaves[0], weight, bias, leaves[1], leaves[2]), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("trained", [(0,), (3,), (4,), (3, 4), (2,)])
def test_only_what_is_asked_for_gets_a_gradient(trained: tuple[int, ...]) -> None:
    tensors = [t.requires_grad_(i in trained) for i, t in enumerate(arguments())]
    fused(*tensors).square().sum().backward()
    found = [t.grad for t in tensors]
    again = [t.detach().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    separate(*again).square().sum().backward()
    for got, want in zip(found, [t.grad for t in again], strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_forward_mode_outside_of_torch_func() -> None:
    tensors = arguments()
    tangents = [torch.randn_like(t) for t in tensors]
    tangents[1].zero_()
    for t in tensors:
        t.requires_grad_()
    tensors[1].requires_grad_(False)
    with forward_ad.dual_level():
        duals = [t if i == 1 else forward_ad.make_dual(t, v) for i, (t, v) in enumerate(zip(tensors, tangents, strict=True))]
        found = forward_ad.unpack_dual(fused(*duals)).tangent
        wanted = forward_ad.unpack_dual(separate(*duals)).tangent
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_without_gradients_nothing_is_written_to_the_arguments() -> None:
    tensors = arguments()
    before = [t.clone() for t in tensors]
    with torch.no_grad():
        torch.testing.assert_close(fused(*tensors), separate(*tensors), rtol=0, atol=1e-12)
    assert all(torch.equal(t, was) for t, was in zip(tensors, before, strict=True))


def test_where_it_steps_aside() -> None:
    x, weight, bias, left, right = arguments()
    call = fused_linear.low_rank_linear
    assert call(x, weight, bias, left, right, torch.tensor(SCALE)) is None, "a scale that is a tensor may be trained"
    assert call(x.float(), weight, bias, left, right, SCALE) is None, "mixed element types"
    assert call(x, weight.clone().requires_grad_(), bias, left, right, SCALE) is None, "a trained base"
    assert call(x[0, 0], weight, bias, left, right, SCALE) is None, "a vector"
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x, weight, bias, left, right, SCALE) is None


@pytest.mark.parametrize(("threshold", "taken"), [(0, True), (12, True), (13, False)])
def test_under_transforms_the_tokens_of_the_whole_batch_count(
    threshold: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "MIN_TOKENS_TRANSFORMED", threshold)
    x, weight, bias, left, right = arguments()
    seen = []

    def loss(left: Tensor) -> Tensor:
        seen.append(fused_linear.low_rank_linear(x, weight, bias, left, right, SCALE))
        return LowRank(weight, left, right, SCALE).linear(x, bias).square().sum()

    lefts = torch.stack([left, left + 1])
    found = torch.func.vmap(torch.func.grad(loss))(lefts)
    assert [made is not None for made in seen] == [taken], "two adapters on six tokens"
    for got, own in zip(found, lefts, strict=True):
        wanted = torch.func.grad(lambda left: separate(x, weight, bias, left, right).square().sum())(own)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
