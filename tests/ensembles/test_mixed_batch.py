"""`Ensemble.mix`: a batch whose samples have members of their own is what the members compute one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import CNN, MLP, assert_close, shake
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gift_func as gf
from gift_func import testing
from gift_func.banks import contiguous

BATCHES: list[list[int | None]] = [
    [0, 1, 2], [2, 0, 1], [1, None, 1, 2], [None, 0], [2, 2], [1], [None], [2, 0, 2, 0, 1, 1, 1], [],
]  # fmt: skip


def ensemble(net: nn.Module, *methods: Any) -> gf.Ensemble:
    given = methods or (gf.LoRA(rank=2), gf.LoRA(rank=2), gf.LoRA(rank=2))
    return gf.stack([shake(gf.adapt(net, method), seed) for seed, method in enumerate(given)])


def one_by_one(ens: gf.Ensemble, members: list[int | None], x: Tensor) -> Tensor:
    """By the ensemble's own forward, of which each sample takes its member's part."""
    whole, base = ens(x), ens.base(x)
    return torch.stack([base[j] if i is None else whole[i, j] for j, i in enumerate(members)]) if members else base


def check(ens: gf.Ensemble, members: list[int | None], x: Tensor) -> None:
    parameters = dict(ens.named_trainable_parameters())
    for _ in range(2):
        found, wanted = ens.mix(x, members=members), one_by_one(ens, members, x)
        assert_close(found, wanted)
        ours, theirs = (
            torch.autograd.grad(out.sin().sum(), list(parameters.values()), allow_unused=True) if out.requires_grad else ()
            for out in (found, wanted)
        )
        for name, a, b in zip(parameters, ours, theirs, strict=False):
            parameter = parameters[name]
            assert_close(
                torch.zeros_like(parameter) if a is None else a, torch.zeros_like(parameter) if b is None else b, 1e-10, name
            )
        with torch.no_grad():
            assert_close(ens.mix(x, members=members), wanted.detach())
            for parameter in ens.trainable_parameters():
                parameter.add_(0.01 * parameter.cos())  # as an optimizer does


@pytest.mark.parametrize("members", BATCHES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "transposed", "conv", "ranks", "places"])
def test_mixed_is_one_by_one(members: list[int | None], kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(len(members), 6, dtype=torch.float64)
    if kind == "conv":
        net, x = CNN().double(), torch.randn(len(members), 3, 8, 8, dtype=torch.float64)
        check(ensemble(net).eval(), members, x)
    elif kind == "transposed":
        layers = [Conv1D(5, 6), Conv1D(2, 5)]  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        check(ensemble(nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()), members, x)
    elif kind == "ranks":
        check(ensemble(MLP().double(), gf.LoRA(rank=2, alpha=3.0), gf.LoRA(rank=1), gf.LoRA(rank=3)), members, x)
    elif kind == "places":
        check(
            ensemble(MLP().double(), gf.LoRA(rank=2), {"layers.0": gf.LoRA(rank=1)}, {"layers.2": gf.LoRA(rank=3)}), members, x
        )
    else:
        check(ensemble(MLP().double()), members, x)


@pytest.mark.parametrize(
    ("host", "method"),
    [(host, name) for host in ("linear", "conv2d") for name, method in METHODS.items() if not testing.refuses(method, host)],
)
def test_every_method(host: str, method: str) -> None:
    model, x = testing.HOSTS[host].make(torch.float64)
    strategy = {"inner.weight": METHODS[method]}
    models = [shake(gf.adapt(model, strategy, generator=torch.Generator().manual_seed(seed)), seed) for seed in range(3)]
    check(gf.stack(models), [(2 * j + 1) % 3 for j in range(len(x))], x)


def test_a_batch_of_all_reads_the_stacks_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    ens = ensemble(MLP().double())
    found: list[Tensor | None] = []
    before = contiguous._parts_of_stack

    def seen(tensors: Sequence[Tensor]) -> Tensor | None:
        found.append(before(tensors))
        return found[-1]

    monkeypatch.setattr(contiguous, "_parts_of_stack", seen)
    x = torch.randn(3, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(ens.trainable_parameters(), lr=0.1)
    for _ in range(3):
        ens.mix(x, members=[2, 0, 1]).sum().backward()
        optimizer.step()
    stacks = {id(parameter) for parameter in ens.parameters()}
    assert {id(one) for one in found} == stacks
    assert len(found) == len(stacks)  # and they are looked for once


def test_a_step_with_rates_of_their_own_is_training_apart() -> None:
    torch.manual_seed(0)
    ens = ensemble(MLP().double())
    alone = ens.unstack()
    rates, members = [0.1, 0.02, 0.3], [1, 0, 2, 1, 0, 2, 2]
    ours = gf.optim.per_member(torch.optim.AdamW, ens, lr=rates, weight_decay=0.1)
    theirs = [
        torch.optim.AdamW(m.trainable_parameters(), lr=rate, weight_decay=0.1) for m, rate in zip(alone, rates, strict=True)
    ]
    for step in range(20):
        x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        ours.zero_grad()
        ens.mix(x, members=members).square().sum().backward()
        ours.step()
        for index, (model, optimizer) in enumerate(zip(alone, theirs, strict=True)):
            optimizer.zero_grad()
            model(x[[j for j, i in enumerate(members) if i == index]]).square().sum().backward()
            optimizer.step()
    for index, model in enumerate(alone):
        for name, parameter in model.named_trainable_parameters():
            assert_close(ens.adapter[name][index].detach(), parameter.detach(), 1e-9, name)


def test_members_by_an_index_tensor() -> None:
    ens = ensemble(MLP().double())
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(ens.mix(x, members=torch.tensor([2, -1, 0, 0])), ens.mix(x, members=[2, None, 0, 0]))


def test_what_is_no_member() -> None:
    ens = ensemble(MLP().double())
    x = torch.randn(2, 6, dtype=torch.float64)
    wrong: list[Any] = [[0, 3], [0, -1], [0, "1"], [True, 0]]
    for members in wrong:
        with pytest.raises(gf.AdaptError, match="there is no member"):
            ens.mix(x, members=members)
    with pytest.raises(gf.AdaptError, match="members are whole numbers"):
        ens.mix(x, members=torch.tensor([0.0, 1.0]))
    with pytest.raises(gf.AdaptError, match="names 3 samples"):
        ens.mix(x, members=[0, 1, 2])


def test_compile_goes_around_it() -> None:
    ens = ensemble(MLP().double())
    x = torch.randn(2, 6, dtype=torch.float64)
    compiled = torch.compile(lambda x: ens.mix(x.sin(), members=[1, 0]).cos(), backend="eager")
    with torch.no_grad():  # with gradients, Dynamo itself warns of a tensor that is no leaf
        assert_close(compiled(x), ens.mix(x.sin(), members=[1, 0]).cos())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="prepare"):
        torch.compile(lambda x: ens.mix(x, members=[0, 1]), backend="eager", fullgraph=True)(x)


def test_statistics_of_members() -> None:
    """In training a mixed batch cannot keep them; in eval each member uses its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    ens = ensemble(net).train()
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    with pytest.raises(gf.AdaptError, match="'1' takes statistics"):
        ens.mix(x[0], members=[0] * 8)
    ens.map(x)
    ens.eval()
    check(ens, [0, 2, 1, None], x[0, :4])
    ens.train()
    ens.map(x.cos())
    check(ens.eval(), [0, 2, 1, None], x[0, :4])


def test_members_with_modules_of_their_own() -> None:
    torch.manual_seed(0)
    both = ensemble(MLP().double(), {"layers.0": gf.Bottleneck(2)}, {"layers.0": gf.Bottleneck(2)})
    check(both, [1, 0, None, 1], torch.randn(4, 6, dtype=torch.float64))


def test_an_ensemble_that_was_moved_or_copied() -> None:
    torch.manual_seed(0)
    ens = ensemble(MLP().double())
    x = torch.randn(3, 6, dtype=torch.float64)
    ens.mix(x, members=[0, 1, 2])
    twin = copy.deepcopy(ens)
    ens.float()
    found = ens.mix(x.float(), members=[0, 1, 2])
    assert found.dtype == torch.float32
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in ens.trainable_parameters())
    check(ens.double(), [2, 0, None], x)
    check(twin, [2, 0, None], x)


def test_dropout_is_drawn_from_the_generator() -> None:
    ens = ensemble(MLP().double(), *[gf.LoRA(rank=2, dropout=0.5)] * 3).train()
    ens.generator = torch.Generator()
    x = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for _ in range(2):
        ens.generator.manual_seed(0)
        found.append(ens.mix(x, members=[0, 1, 2]))
    assert torch.equal(*found)
    assert not torch.equal(found[0], ens.mix(x, members=[0, 1, 2]))


def test_the_model_is_not_touched() -> None:
    net = MLP().double()
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in net.named_parameters()}
    ens = ensemble(net)
    ens.mix(torch.randn(3, 6, dtype=torch.float64), members=[0, 1, None]).sum().backward()
    for name, tensor in net.named_parameters():
        assert tensor.grad is None
        assert torch.equal(tensor, before[name][0])
        assert tensor.requires_grad == before[name][1]
