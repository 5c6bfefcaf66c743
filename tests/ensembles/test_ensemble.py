"""Members in a stack and each alone: the same outputs, gradients and training, whatever their ranks and places."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers.ensembles import UNEVEN, X, members_of, nn_mlp, part, uneven
from helpers.methods import METHODS
from helpers.models import BY_NAME, Row, assert_close, loss_of, pairs, shake
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import gift_func as gf
from gift_func import testing
from gift_func.testing.laws import Case

STEPS = 50
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def mlp() -> nn.Module:
    return BY_NAME["mlp"].model()


def inputs() -> Tensor:
    x: Tensor = BY_NAME["mlp"].call()[0][0]
    return x


def check_same(ens: gf.Ensemble, members: list[gf.AdaptedModel], *args: Any, tolerance: float = 1e-9, **kwargs: Any) -> None:
    """Outputs and gradients of the ensemble and of each alone, on one input."""
    found = ens(*args, **kwargs)
    for parameter in ens.parameters():
        parameter.grad = None
    sum(loss_of(part(found, index)) for index in range(len(ens))).backward()  # type: ignore[union-attr]
    for index, member in enumerate(members):
        wanted = member(*args, **kwargs)
        pairs = zip(tree_leaves(part(found, index)), tree_leaves(wanted), strict=True)
        for got, want in ((a, b) for a, b in pairs if isinstance(b, Tensor)):
            assert_close(got, want, tolerance, f"output of member {index}")
        check_gradients(ens, member, index, torch.autograd.grad(
            loss_of(wanted), list(member.trainable_parameters()), allow_unused=True, materialize_grads=True
        ), tolerance)  # fmt: skip


def check_gradients(ens: gf.Ensemble, member: gf.AdaptedModel, index: int, wanted: Iterable[Tensor], tolerance: float) -> None:
    for (name, parameter), want in zip(member.named_trainable_parameters(), wanted, strict=True):
        stacked = ens.adapter[name].grad
        got = torch.zeros_like(ens.adapter[name])[index] if stacked is None else stacked[index]
        own = tuple(slice(n) for n in parameter.shape)
        assert_close(got[own], want, tolerance, f"gradient of {name} of member {index}")
        rest = got.clone()
        rest[own] = 0
        assert not rest.any(), f"the padding of {name} of member {index} has a gradient"


# --- every method, every kind of model


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_fifty_steps_are_those_of_separate_runs(method: gf.Method) -> None:
    host = next(name for name in testing.HOSTS if not testing.refuses(method, name))
    cases = [Case(found, testing.HOSTS[host]) for found in of_several_ranks(method, host)]
    model = gf.FrozenBase.of(cases[0].model)
    members = [gf.adapt(model, case.rules).with_adapter(case.random(seed)) for seed, case in enumerate(cases)]
    x = cases[0].x
    target = torch.linspace(-1, 1, cases[0].model(x).numel(), dtype=torch.float64).view_as(cases[0].model(x))
    ens = gf.stack(members)
    start = ens(x).detach()
    rates, decays = [1e-2, 3e-3, 2e-2], [0.0, 0.1, 0.01]
    together = gf.optim.per_member(torch.optim.AdamW, ens, lr=rates, weight_decay=decays)
    for _ in range(STEPS):
        together.zero_grad()
        (ens(x) - target).square().sum().backward()
        together.step()
    for index, member in enumerate(members):
        alone = torch.optim.AdamW(member.trainable_parameters(), lr=rates[index], weight_decay=decays[index])
        for _ in range(STEPS):
            alone.zero_grad()
            (member(x) - target).square().sum().backward()
            alone.step()
        assert_close(ens(x)[index], member(x), 1e-9, f"member {index}")
        for name, tensor in ens[index].adapter.items():
            assert_close(tensor, member.adapter[name], 1e-9, name)
    assert (ens(x) - start).abs().max() > 1e-3, "training changed nothing, so equality says nothing"


def of_several_ranks(method: gf.Method, host: str) -> list[gf.Method]:
    """Three of the method, of several ranks where they can share a stack."""
    rank = getattr(method, "rank", None)
    if rank is None:
        return [method] * 3
    try:
        others = [method.replace(rank=2 * rank), method, method.replace(rank=2 * rank)]
        cases = [Case(found, testing.HOSTS[host]) for found in others]
        base = gf.FrozenBase.of(cases[0].model)
        gf.stack([gf.adapt(base, case.rules) for case in cases])
        return others
    except gf.AdaptError:
        return [method] * 3


@pairs(brief=True)
def test_on_one_input_and_on_their_own(row: Row, method: str) -> None:
    model = row.model()
    base = gf.adapt_ensemble(model, row.strategy(method), 3, generator=torch.Generator().manual_seed(1))
    members = [shake(member, seed=index) for index, member in enumerate(base)]
    ens = gf.stack(members)
    args, kwargs = row.call()
    check_same(ens, members, *args, **kwargs)

    def own(tensor: Tensor) -> Tensor:
        return torch.stack([tensor + 0.1 * index if tensor.is_floating_point() else tensor for index in range(3)])

    mapped = tree_map_only(Tensor, own, (args, kwargs))
    found = ens.map(*mapped[0], **mapped[1])
    for index, member in enumerate(members):
        mine = part(mapped, index)
        wanted = member(*mine[0], **mine[1])
        for got, want in zip(tree_leaves(part(found, index)), tree_leaves(wanted), strict=True):
            if isinstance(want, Tensor):
                assert_close(got, want, 1e-9, f"map, member {index}")
    if row.vmaps:
        assert ens.fallback is None
        assert "at once" in repr(ens)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("lstm", "no batching rule for rnn, a LSTM"), ("lstm_cell", "lstm_cell"), ("gru", "a GRU"), ("mixtral", "dynamic shape")],
)
def test_what_cannot_be_batched_says_why(name: str, reason: str) -> None:
    row = BY_NAME[name]
    members = members_of(model := row.model(), *[row.strategy("lora")] * 2)
    ens = gf.stack(members)
    args, kwargs = row.call()
    ens(*args, **kwargs)
    assert ens.fallback is not None
    assert reason in ens.fallback
    assert f"one after another: {ens.fallback}" in repr(ens)
    del model


def test_a_mistake_in_the_arguments_is_told_by_the_network() -> None:
    ens = gf.stack(members_of(mlp(), gf.LoRA(), gf.LoRA()))
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x5 and 6x8\)"):
        ens(torch.randn(3, 5, dtype=torch.float64))
    assert ens.fallback is None, "which says nothing about other arguments"
    ens(inputs())
    assert ens.fallback is None


# --- decisions by values


class Deciding(nn.Module):
    """Takes one of two ways by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) if x.sum() > 0 else self.second(x) * x.abs().max().item()
        return out


@pytest.mark.parametrize("signs", [[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1], [-1, 1, 1, 1]])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_decision_by_values_is_each_members_own(signs: list[int], chunk_size: int | None) -> None:
    members = members_of(Deciding().double(), *[gf.LoRA(rank=2)] * 4)
    ens = gf.stack(members, chunk_size=chunk_size)
    xs = torch.tensor(signs).view(4, 1, 1) * torch.arange(1.0, 33, dtype=torch.float64).reshape(4, 2, 4)
    found = ens.map(xs)
    assert ens.fallback is None
    found.square().sum().backward()
    for index, member in enumerate(members):
        wanted = member(xs[index])
        assert_close(found[index], wanted)
        wanted.square().sum().backward()
        for name, parameter in member.named_trainable_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            stacked = ens.adapter[name].grad
            assert_close(torch.zeros_like(grad) if stacked is None else stacked[index], grad)


# --- ranks and scales that differ


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_members_are_as_each_alone(name: str) -> None:
    members = uneven(name)
    ens = gf.stack(members)
    check_same(ens, members, X)
    for member, back in zip(members, ens.unstack(), strict=True):
        assert list(back.adapter) == list(member.adapter)
        assert all(torch.equal(back.adapter[key], tensor) for key, tensor in member.adapter.items())
        assert torch.equal(back(X), member(X))
        assert back.adapted_parameters == member.adapted_parameters
        assert back.strategy == member.strategy


class NoisySGD(torch.optim.SGD):
    """SGD that adds noise to every element (Langevin dynamics), whether it has a gradient or not."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        super().step(closure)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_members_train_as_each_alone(name: str, optimizer: str) -> None:
    members, make = uneven(name), OPTIMIZERS[optimizer]
    ens = gf.stack(members)
    steps = make(ens.trainable_parameters())
    for _ in range(STEPS):
        steps.zero_grad()
        (ens(X) - 1).square().sum().backward()
        steps.step()
    for index, member in enumerate(members):
        alone = make(member.trainable_parameters())
        for _ in range(STEPS):
            alone.zero_grad()
            (member(X) - 1).square().sum().backward()
            alone.step()
        assert_close(ens(X)[index], member(X), 1e-9, f"member {index}")
        assert_close(ens[index](X), member(X), 1e-9, f"member {index}, unstacked")


@pytest.mark.parametrize("name", UNEVEN)
def test_what_an_optimizer_does_to_the_padding_changes_nothing(name: str) -> None:
    ens = gf.stack(uneven(name))
    steps = NoisySGD(ens.trainable_parameters(), lr=1e-3)
    for _ in range(5):
        steps.zero_grad()
        ens(X).square().sum().backward()
        steps.step()
    found = ens(X)
    for index, member in enumerate(ens.unstack()):
        assert_close(found[index], member(X), 1e-9, f"member {index} and what of it was cut out of the stack")
    check_same(ens, ens.unstack(), X)


def test_a_frozen_tensor_that_all_share_is_kept_once() -> None:
    ens = gf.adapt_ensemble(nn_mlp(), gf.VeRA(rank=3), 4)
    shapes = {name: tuple(tensor.shape) for name, tensor in ens.adapter.items()}
    assert shapes["layers.0.vera_lambda_d"] == (4, 3)
    frozen = {name: shape for name, shape in shapes.items() if not ens.adapter[name].requires_grad}
    assert all(shape[0] != 4 or len(shape) == 2 for shape in frozen.values()), frozen
    check_same(ens, ens.unstack(), X)


def test_a_members_gradient_is_zero_for_the_others_outputs() -> None:
    ens = gf.stack(uneven("LoRA"))
    names, parameters = zip(*ens.named_trainable_parameters(), strict=True)
    for index in range(len(ens)):
        grads = torch.autograd.grad(ens(X)[index].square().sum(), parameters)
        for name, grad in zip(names, grads, strict=True):
            others = [row for row in range(len(ens)) if row != index]
            assert grad[index].any(), f"{name} of member {index} gets nothing"
            assert not grad[others].any(), f"{name}: member {index}'s output gives others a gradient"


def test_members_that_bring_modules_of_their_own() -> None:
    members = members_of(nn_mlp(), *[{"layers.0": gf.Bottleneck(2)}] * 3)
    ens = gf.stack(members)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    for _ in range(2):
        for index, member in enumerate(members):
            assert_close(ens(x[0])[index], member(x[0]))
            assert_close(ens.map(x)[index], member(x[index]))


# --- errors


def batch_norm(training: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(training)


def other_structure() -> list[gf.AdaptedModel]:
    model = nn_mlp()
    return [gf.adapt(model, gf.LoRA()), gf.adapt(model, {"layers.0": gf.Bottleneck(2)})]


def other_mode() -> list[gf.AdaptedModel]:
    model = nn_mlp()
    return [gf.adapt(model, gf.LoRA()), gf.adapt(model, gf.LoRA()).eval()]


def of_one(*strategies: Any) -> Callable[[], list[gf.AdaptedModel]]:
    return lambda: members_of(nn_mlp(), *strategies)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (list, "needs at least one adapted model"),
        (lambda: [gf.adapt(nn_mlp(), gf.LoRA()), gf.adapt(nn_mlp(), gf.LoRA())], "member 1 was adapted from another model"),
        (of_one(gf.LoRA(), gf.IA3()), r"members 0 and 1 adapt 'layers.\d.weight' by other tensors .*gf.AdapterBank"),
        (of_one(gf.LoRA(rank=2), gf.HiRA(rank=2)), "by other tensors"),
        (of_one(gf.LoRA(rank=8, dropout=0.5), gf.LoRA(rank=8)), "only rank, scale and initialisation may differ"),
        (of_one(gf.OFT(2), gf.OFT(4)), "its tensors cannot be filled up with zeros"),
        (of_one(gf.C3A(2), gf.C3A(4)), "its tensors cannot be filled up with zeros"),
        (of_one({"layers.0": gf.C3A(4)}, {"layers.2": gf.C3A(4)}), "cannot stand there without changing anything"),
        (other_structure, "member 1 cannot share a stack with member 0"),
        (other_mode, "is in training mode in one of them only. Call train.. or eval.. on both"),
    ],
)
def test_members_that_cannot_share_a_stack(members: Callable[[], list[gf.AdaptedModel]], message: str) -> None:
    with pytest.raises(gf.AdaptError, match=message):
        gf.stack(members())


def test_stack_takes_adapted_models() -> None:
    with pytest.raises(TypeError, match=r"item 1 is a Linear; adapt\(\) makes one"):
        gf.stack([gf.adapt(nn.Linear(2, 2), gf.LoRA()), nn.Linear(2, 2)])  # type: ignore[list-item]


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_an_ensemble_has_members(size: Any) -> None:
    with pytest.raises(gf.AdaptError, match=f"at least 1, got size={size}"):
        gf.adapt_ensemble(nn_mlp(), gf.LoRA(), size)


def test_map_wants_the_members_first() -> None:
    ens = gf.stack(uneven("LoRA"))
    with pytest.raises(gf.AdaptError, match=r"needs a leading axis of 3, and one has shape \(2, 3, 8\)"):
        ens.map(X.expand(2, 3, 8))
    with pytest.raises(gf.AdaptError, match=r"shape \(\)"):
        ens.map(torch.tensor(1.0))
    with pytest.raises(gf.AdaptError, match="map was given no tensor"):
        ens.map(3)


def test_an_output_that_hides_its_tensors() -> None:
    row = BY_NAME["llama"]
    ens = gf.adapt_ensemble(row.model(), row.strategy("lora"), 2)
    args, kwargs = row.call()
    with pytest.raises(gf.AdaptError, match=r"holds a DynamicCache.*use_cache=False"):
        ens(*args, **{**kwargs, "use_cache": True})


def test_a_bias_trained_along_with_a_rank_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    members = [gf.adapt(model, gf.LoRA(rank=rank, train_bias=True, init="random")) for rank in (2, 3)]
    for member in members:
        with torch.no_grad():
            for parameter in member.trainable_parameters():
                parameter.add_(0.1)
    ens, x = gf.stack(members), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(ens(x), torch.stack([member(x) for member in members]), rtol=0, atol=1e-12)
    assert [m.adapter["0.lora_A"].shape[0] for m in ens] == [2, 3]
