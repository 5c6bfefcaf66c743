"""Who shares tensors with whom, and who has copies: the README's table, row by row."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift_func as gf

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()


def adapted(model: nn.Module | gf.FrozenBase, seed: int = 0) -> gf.AdaptedModel:
    generator = torch.Generator().manual_seed(seed)
    return gf.adapt(model, {"0": gf.LoRA(rank=2, init="random"), "2.bias": gf.Full()}, generator=generator).eval()


def memory(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def own(model: Any) -> set[int]:
    """The memory of an adapter's tensors."""
    return memory(model.trainable_parameters())


def sees(run: Callable[[Tensor], Tensor], written: Tensor) -> bool:
    """Whether what is written into a tensor changes what something computes."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.BaseChangedWarning)
        before = run(X).clone()
        written.add_(1.0)
        changed = not torch.equal(run(X), before)
        written.sub_(1.0)
    return changed


@pytest.fixture
def a() -> gf.AdaptedModel:
    return adapted(network())


@pytest.fixture
def b(a: gf.AdaptedModel) -> gf.AdaptedModel:
    return a.with_adapter({name: tensor + 0.1 for name, tensor in a.adapter_state_dict().items()})


# --- the base


def runs(model: nn.Module, folder: Path) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Everything that runs on a model without a copy of it."""
    a, other = adapted(model), adapted(gf.FrozenBase.of(model), 1)
    yield "adapt", a
    yield "adapt a frozen base", other
    yield "the base", a.base
    yield "with_adapter", a.with_adapter(a.adapter_state_dict())
    yield "deepcopy", copy.deepcopy(a)
    yield "adapt on top", gf.adapt(a, gf.LoRA(rank=1))
    ens = gf.stack([a, other])
    yield "stack", ens
    yield "ens[i]", ens[0]
    yield "unstack", ens.unstack()[1]
    bank = gf.AdapterBank({"fr": a, "de": other})
    yield "a bank", lambda x: bank(x, adapters=["fr", None, "de", "de", None])
    yield "bank[name]", bank["fr"]
    yield "bank.add", bank.add("it", gf.LoRA(rank=1))["it"]
    store = gf.AdapterStore(model, folder)
    store.add("fr", a)
    yield "a store", lambda x: store(x, adapters=["fr"] * 5)
    yield "store[name]", store["fr"]
    yield "store.bank", store.bank(["fr"])["fr"]
    gf.save_adapter(a, folder / "a.safetensors")
    yield "load_adapter", gf.load_adapter(model, folder / "a.safetensors")


def test_the_base_is_shared(tmp_path: Path) -> None:
    model = network()
    weight: Any = model.get_parameter("2.weight")
    for name, run in list(runs(model, tmp_path)):
        assert sees(run, weight), name


def test_the_buffers_are_copies(tmp_path: Path) -> None:
    model = network()
    mean = model.get_buffer("1.running_mean")
    for name, run in list(runs(model, tmp_path)):
        assert not sees(run, mean), name


def test_what_leaves_the_base() -> None:
    model = network()
    weight: Any = model.get_parameter("2.weight")
    a = adapted(model)
    assert not sees(a.merge(), weight)
    assert memory(a.merge().parameters()).isdisjoint(memory(model.parameters()) | own(a))
    assert sees(adapted(model).to(torch.float32), weight)
    assert not sees(adapted(model).to(torch.float64).to(torch.float32), weight)
    assert not sees(pickle.loads(pickle.dumps(adapted(model))), weight)


# --- adapters


def test_adapt_copies_what_it_trains() -> None:
    model = network()
    assert own(gf.adapt(model, gf.Full())).isdisjoint(memory(model.parameters()))


def test_adapt_on_top_copies_the_adapter_below(a: gf.AdaptedModel) -> None:
    top = gf.adapt(a, {"0": gf.LoRA(rank=1)})
    assert torch.equal(top(X), a(X))
    assert own(top).isdisjoint(own(a))
    assert not sees(top, a.adapter["0.lora_A"])


def test_the_state_dict_shares(a: gf.AdaptedModel) -> None:
    state = a.adapter_state_dict()
    assert {state[name].data_ptr() for name in a.adapter} == {parameter.data_ptr() for parameter in a.adapter.values()}
    assert not any(tensor.requires_grad for tensor in state.values())


def test_with_adapter_copies(a: gf.AdaptedModel) -> None:
    state = a.adapter_state_dict()
    assert own(a.with_adapter(state)).isdisjoint(memory(state.values()))


def test_load_adapter_state_dict_writes_in_place(a: gf.AdaptedModel, b: gf.AdaptedModel) -> None:
    before = [(parameter, parameter.data_ptr()) for parameter in a.parameters()]
    state = b.adapter_state_dict()
    a.load_adapter_state_dict(state)
    assert all(now is then and now.data_ptr() == at for now, (then, at) in zip(a.parameters(), before, strict=True))
    assert own(a).isdisjoint(memory(state.values()))
    assert torch.equal(a(X), b(X))


def test_functional_call_takes_the_tensors_that_it_is_given(a: gf.AdaptedModel) -> None:
    given = {name: tensor.clone() for name, tensor in a.adapter_state_dict().items()}
    given["0.lora_A"].requires_grad_()
    gf.functional_call(a, given, (X,)).sum().backward()
    assert given["0.lora_A"].grad is not None
    assert all(parameter.grad is None for parameter in a.parameters())


@pytest.mark.parametrize("kind", ["adapted", "ensemble", "bank"])
def test_deepcopy_copies_the_adapter(a: gf.AdaptedModel, b: gf.AdaptedModel, kind: str) -> None:
    made: Any = {"adapted": a, "ensemble": gf.stack([a, b]), "bank": gf.AdapterBank({"fr": a, "de": b})}[kind]
    assert own(copy.deepcopy(made)).isdisjoint(own(made))


def test_a_stack_and_its_members_are_copies(a: gf.AdaptedModel, b: gf.AdaptedModel) -> None:
    ens = gf.stack([a, b])
    assert own(ens).isdisjoint(own(a) | own(b))
    for taken in (ens[0], ens[:1], ens[[1, 0]], *ens.unstack()):
        assert own(taken).isdisjoint(own(ens))


def test_a_bank_copies_what_it_is_given_and_shares_what_it_gives(a: gf.AdaptedModel, b: gf.AdaptedModel) -> None:
    bank = gf.AdapterBank({"fr": a, "de": b})
    assert own(bank).isdisjoint(own(a) | own(b))
    assert bank["fr"].adapter["0.lora_A"] is dict(bank.named_trainable_parameters())["fr.0.lora_A"]
    bigger = bank.add("it", a)
    assert own(bigger).isdisjoint(own(a))
    ids = [
        {id(parameter) for parameter in other.trainable_parameters()}
        for other in (bank.remove("de"), bank, bank.rename("fr", "french"), bigger)
    ]
    assert ids[0] < ids[1] == ids[2] < ids[3]


def test_a_store_gives_copies(a: gf.AdaptedModel, tmp_path: Path) -> None:
    store = gf.AdapterStore(network(), tmp_path)
    store.add("fr", a)
    one, two = store["fr"], store["fr"]
    assert own(one).isdisjoint(own(two) | own(a) | own(store.bank(["fr"])))
    for taken in (one, store.bank(["fr"])["fr"]):
        assert not sees(lambda x: store(x, adapters=["fr"] * 5), taken.adapter["0.lora_A"])


def test_a_file_gives_copies(tmp_path: Path) -> None:
    model = network()
    a = adapted(model)
    gf.save_adapter(a, tmp_path / "a.safetensors")
    first, second = (gf.load_adapter(model, tmp_path / "a.safetensors") for _ in range(2))
    assert own(first).isdisjoint(own(second) | own(a))
