"""Banks under `torch.func`: a mixed batch inside of grad, jvp, vmap and their compositions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.models import BY_NAME, assert_close, shake
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap
from transformers.pytorch_utils import Conv1D

import gift_func as gf

Function = Callable[[Tensor], Tensor]


def summed(f: Function) -> Function:
    return lambda x: f(x).sin().sum()


TRANSFORMS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "grad": lambda f, x: grad(summed(f))(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x.cos(), x.sin()])),
    "vmap(grad)": lambda f, x: vmap(grad(summed(f)))(torch.stack([x, x.cos()])),
    "jacrev": lambda f, x: jacrev(f)(x),
    "hessian": lambda f, x: hessian(summed(f))(x),
    "jvp of grad": lambda f, x: jvp(grad(summed(f)), (x,), (x.cos(),))[1],
}
BATCHES = {
    "each once": ["a", "b"],
    "other way round": ["b", "a"],
    "unequal": ["a", "b", "a"],
    "with none": ["b", None, "a"],
    "ranks": ["a", "c", "b"],
    "methods": ["d", "a", "c", None],
}


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "transposed":  # its factors are views of the parameters
        layers = [Conv1D(5, 6), Conv1D(2, 5)]  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        return nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()
    return BY_NAME["mlp"].model()


def adapters(net: nn.Module) -> dict[str, gf.AdaptedModel]:
    methods = {"a": gf.LoRA(rank=2), "b": gf.LoRA(rank=2, alpha=3.0), "c": gf.LoRA(rank=1), "d": gf.IA3()}
    return {name: shake(gf.adapt(net, method), seed) for seed, (name, method) in enumerate(methods.items())}


def one_by_one(bank: gf.AdapterBank, names: list[str | None]) -> Function:
    models = [bank.base if name is None else bank[name] for name in names]

    def call(x: Tensor) -> Tensor:
        return torch.cat([one(row) for one, row in zip(models, x.split(1), strict=True)])

    return call


@pytest.mark.parametrize("kind", ["mlp", "transposed"])
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms(kind: str, names: list[str | None], transform: Callable[[Function, Tensor], Tensor]) -> None:
    """The first call is made inside of the transform, so whatever a bank keeps from it must be of use outside."""
    bank = gf.AdapterBank(adapters(model(kind)))
    x = torch.randn(len(names), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mixed(rows: Tensor) -> Tensor:
        made: Tensor = bank(rows, adapters=names)
        return made

    alone = one_by_one(bank, names)
    for _ in range(2):
        assert_close(transform(mixed, x), transform(alone, x))
    with torch.no_grad():
        assert_close(mixed(x), alone(x))
    parameters = list(bank.trainable_parameters())
    ours, theirs = (torch.autograd.grad(f(x).sin().sum(), parameters, allow_unused=True) for f in (mixed, alone))
    for found, wanted in zip(ours, theirs, strict=True):
        assert (found is None or not found.any()) if wanted is None else found is not None
        if wanted is not None and found is not None:
            assert_close(found, wanted)


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES.keys())
def test_a_transform_without_gradients(names: list[str | None]) -> None:
    bank = gf.AdapterBank(adapters(model("mlp")))
    x = torch.randn(len(names), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            found = vmap(lambda rows: bank(rows, adapters=names))(torch.stack([x, x.cos()]))
            wanted = torch.stack([one_by_one(bank, names)(rows) for rows in (x, x.cos())])
            assert_close(found, wanted)
        assert_close(bank(x, adapters=names), one_by_one(bank, names)(x))


@pytest.mark.parametrize("kind", ["mlp", "transposed"])
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES.keys())
def test_what_inference_mode_leaves_behind_trains(kind: str, names: list[str | None]) -> None:
    net = model(kind)
    given = adapters(net)
    with torch.inference_mode():
        bank = gf.AdapterBank(given)
        bank = bank.add("e", gf.LoRA(rank=2)).remove("e")
        x = torch.randn(len(names), 6, dtype=torch.float64)
        assert_close(bank(x, adapters=names).clone(), one_by_one(bank, names)(x).clone())
    x = x.clone()
    bank(x, adapters=names).sin().sum().backward()
    used = {name for name in names if name is not None}
    assert all((p.grad is not None) == (name.split(".")[0] in used) for name, p in bank.named_trainable_parameters())
