"""Banks: mixed batches are what their samples are one by one, for every method; and the mapping that a bank is."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.batches import assert_same, check, gradients, one_by_one
from helpers.census import bits, census, changes, mess_up, unchanged
from helpers.methods import METHODS
from helpers.models import BY_NAME, MLP, assert_close, flat, shake
from torch import Tensor, nn

import gift_func as gf
from gift_func import testing
from gift_func.banks import contiguous
from gift_func.tracking.sample_axis import TrackSamples

MLP_ROW = BY_NAME["mlp"]


def trio(model: nn.Module | None = None) -> dict[str, gf.AdaptedModel]:
    """Adapters of three kinds on one model."""
    model = MLP_ROW.model() if model is None else model
    return {
        "fr": shake(gf.adapt(model, gf.LoRA(rank=2, alpha=3.0), generator=torch.Generator().manual_seed(1)), 1),
        "de": shake(gf.adapt(model, gf.LoRA(rank=3), generator=torch.Generator().manual_seed(2)), 2),
        "it": shake(gf.adapt(model, gf.IA3(), generator=torch.Generator().manual_seed(3)), 3),
    }


def x_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- mixed is one by one


@pytest.mark.parametrize(
    "names",
    [
        ["fr", "de", "it", None],
        [None, "it", "fr", "de"],
        ["de", None, "de", "fr", None, "fr", "de"],
        ["it", "it", "fr", "fr"],
        [None, None, None],
        ["fr", "fr"],
        ["de", None],
        [None, "de"],
        ["it"],
        [None],
        [],
    ],
    ids=lambda names: "-".join(map(str, names)) or "empty",
)
def test_mixed_is_one_by_one(names: list[str | None]) -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    x = x_of(len(names))
    if not names:
        assert bank(x, adapters=[]).shape == (0, 5)
        return
    check(bank, models, names, ((x,), {}))


def test_every_order_of_adapters() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    x = x_of(4)
    for names in itertools.permutations(["fr", None, "de", "it"]):
        check(bank, models, names, ((x,), {}))


@pytest.mark.parametrize("host", testing.HOSTS)
def test_every_method_beside_every_other(host: str) -> None:
    found = testing.HOSTS[host]
    model, x = found.make(torch.float64)
    models = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        if not testing.refuses(method, host):
            rules = {f"inner.{found.parameter}": method}
            models[name] = shake(gf.adapt(model, rules, generator=torch.Generator().manual_seed(seed)), seed)
    bank = gf.AdapterBank(models)
    kinds = [*models, None]
    random.Random(0).shuffle(kinds)
    rows = torch.arange(len(kinds) + 5) % len(x)
    names = [*kinds, *kinds[:5]]
    x = x[rows] + torch.linspace(0, 0.5, len(names), dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if (
        x.is_floating_point()
    ) else (x[rows] + torch.arange(len(names)).reshape(-1, *[1] * (x.ndim - 1))) % 12  # fmt: skip
    check(bank, models, names, ((x,), {}), tolerance=1e-9)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not testing.refuses(method, "linear")])
def test_two_adapters_of_one_method(method: str) -> None:
    model, x = testing.HOSTS["linear"].make(torch.float64)
    models = {}
    for seed, name in enumerate("ab"):
        adapted = gf.adapt(model, {"inner.weight": METHODS[method]}, generator=torch.Generator().manual_seed(seed))
        models[name] = shake(adapted, seed)
    check(gf.AdapterBank(models), models, ["b", None, "a", "b"], ((x,), {}))


def test_index_tensors() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    x = x_of(5)
    for dtype in (torch.int64, torch.int32, torch.int8):
        index = torch.tensor([2, -1, 0, 1, 0], dtype=dtype)
        assert torch.equal(bank(x, adapters=index), bank(x, adapters=["it", None, "fr", "de", "fr"]))


def test_buffers_of_an_adapter_and_modules_of_its_own_share_the_batch() -> None:
    model = MLP_ROW.model()

    def tall(parent: nn.Module, name: str, *_: object) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 5)).double()

    models = trio(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models["neck"] = shake(gf.adapt(model, {"layers.0": gf.Bottleneck(3)}))
        models["seed"] = shake(gf.adapt(model, [(lambda *a: a[2] == "layers.2", tall)]))
    bank = gf.AdapterBank(models)
    names = ["neck", "fr", None, "seed", "it", "neck"]
    check(bank, models, names, ((x_of(6),), {}))
    del models["fr"]
    check(bank.remove("fr"), models, ["seed", None, "neck"], ((x_of(3),), {}))


# --- training


def test_training_mixed_is_training_apart() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    names: list[str | None] = ["fr", "it", None, "de", "fr", "it", "de", "de"]
    x, target = x_of(len(names)), torch.randn(len(names), 5, dtype=torch.float64)
    ours = torch.optim.AdamW(bank.trainable_parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(20):
        ours.zero_grad()
        (bank(x, adapters=names) - target).square().sum().backward()
        ours.step()
    for name, model in models.items():
        mine = [index for index, other in enumerate(names) if other == name]
        theirs = torch.optim.AdamW(model.trainable_parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(20):
            theirs.zero_grad()
            (model(x[mine]) - target[mine]).square().sum().backward()
            theirs.step()
        for key, parameter in model.named_trainable_parameters():
            assert_close(bank[name].adapter[key], parameter, 1e-9, f"{name}.{key}")


def test_training_adapters_that_lie_stacked() -> None:
    """Adapters of one shape are one stack as they lie, which follows an optimizer, and notices a step at the wrong time."""
    model = MLP_ROW.model()
    models = {name: shake(gf.adapt(model, gf.LoRA(rank=2)), seed) for seed, name in enumerate("abc")}
    bank = gf.AdapterBank(models)
    x, names = x_of(4), ["b", "a", None, "c"]
    ours = torch.optim.SGD(bank.trainable_parameters(), lr=0.01)
    theirs = torch.optim.SGD([p for m in models.values() for p in m.trainable_parameters()], lr=0.01)
    for _ in range(4):
        for optimizer, out in ((ours, bank(x, adapters=names)), (theirs, one_by_one(models, bank.base, names, ((x,), {})))):
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
    for name, adapted in models.items():
        for key, parameter in adapted.named_trainable_parameters():
            assert_close(bank[name].adapter[key], parameter, 1e-9, f"{name}.{key}")
    late = bank(x, adapters=names).square().sum()
    with torch.no_grad():
        bank["c"].adapter["layers.0.lora_A"].add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified (by an )?in-?place"):
        late.backward()


def test_a_model_of_the_bank_trains_the_banks_tensors() -> None:
    bank = gf.AdapterBank(trio())
    x = x_of(2)
    before = bank(x, adapters=["de", "fr"]).detach()
    optimizer = torch.optim.SGD(bank["de"].trainable_parameters(), lr=0.1)
    bank["de"](x).sum().backward()
    optimizer.step()
    after = bank(x, adapters=["de", "fr"])
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert_close(after[:1], bank["de"](x[:1]))
    held = dict(bank.named_trainable_parameters())
    assert all(held[f"de.{name}"] is p for name, p in bank["de"].named_trainable_parameters())


def test_gradients_of_others_are_exactly_zero() -> None:
    bank = gf.AdapterBank(trio())
    x = x_of(6).requires_grad_()
    names = ["fr", "de", None, "it", "de", "fr"]
    out = bank(x, adapters=names)
    for row, name in enumerate(names):
        (toward,) = torch.autograd.grad(out[row].sum(), x, retain_graph=True)
        assert toward[row].abs().sum() > 0
        assert toward[[i for i in range(6) if i != row]].abs().sum() == 0
        named = dict(bank.named_trainable_parameters())
        found = torch.autograd.grad(out[row].sum(), list(named.values()), retain_graph=True, allow_unused=True)
        for key, gradient in zip(named, found, strict=True):
            size = 0.0 if gradient is None else gradient.abs().sum().item()
            assert (size > 0) == (key.split(".")[0] == name), (row, key)


def test_others_change_nothing_but_rounding() -> None:
    models = trio(MLP_ROW.model(torch.float32))
    bank = gf.AdapterBank(models)
    x = x_of(6).float()
    whole = bank(x, adapters=["fr", "de", None, "it", "de", "fr"])
    fewer = bank(x[:4], adapters=["fr", "de", None, "it"])
    assert_close(fewer, whole[:4], 1e-6)
    # An adapter of other values changes no bit, be they as far off as can be.
    wild = shake(models["de"].with_adapter(models["de"].adapter_state_dict()), 9, size=100.0)
    other = bank.remove("de").add("de", wild)
    changed = other(x, adapters=["fr", "de", None, "it", "de", "fr"])
    rows = [0, 2, 3, 5]
    assert bits(changed[rows]) == bits(whole[rows])
    assert not torch.equal(changed[1], whole[1])


def test_nan_of_one_adapter_stays_with_its_samples() -> None:
    models = trio()
    with torch.no_grad():
        for parameter in models["de"].trainable_parameters():
            parameter.fill_(float("nan"))
    bank = gf.AdapterBank(models)
    out = bank(x_of(4), adapters=["fr", "de", None, "it"])
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]].isnan().any()
    out[[0, 2, 3]].sum().backward()
    for name, parameter in bank.named_trainable_parameters():
        if parameter.grad is not None and not name.startswith("de."):
            assert not parameter.grad.isnan().any(), name


def test_second_derivatives() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    names = ["fr", "de", None, "de"]
    found = []
    for run in (bank(x := x_of(4).requires_grad_(), adapters=names), None):
        out = one_by_one(models, bank.base, names, ((x,), {})) if run is None else run
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        named = {name: bank[name] if run is not None else models[name] for name in models}
        found.append(gradients(first, named))
    for name, gradient in found[0].items():
        assert_close(gradient, found[1][name], 1e-9, name)


# --- as a mapping


def test_mapping() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    assert list(bank) == ["fr", "de", "it"]
    assert len(bank) == 3
    assert "de" in bank
    assert "es" not in bank
    assert [name for name, _ in bank.items()] == list(bank)
    assert bank["fr"] is bank["fr"]
    assert "AdapterBank of 3 on MLP" in repr(bank)
    assert "'it': IA3" in repr(bank)
    x = x_of(3)
    for name, model in models.items():
        assert torch.equal(bank[name](x), model(x))
    assert torch.equal(bank.base(x), models["fr"].base(x))


def test_other_banks_share_tensors_and_leave_this_one() -> None:
    models = trio()
    bank = gf.AdapterBank({name: models[name] for name in ("fr", "de")})
    before = dict(bank.named_trainable_parameters())
    more = bank.add("it", models["it"])
    fewer, renamed = more.remove("fr"), more.rename("de", "german")
    assert (list(bank), list(more), list(fewer), list(renamed)) == (
        ["fr", "de"], ["fr", "de", "it"], ["de", "it"], ["fr", "german", "it"],
    )  # fmt: skip
    for name, parameter in fewer.named_trainable_parameters():
        assert parameter is dict(more.named_trainable_parameters())[name]
    for name, parameter in before.items():
        assert dict(bank.named_trainable_parameters())[name] is parameter
        assert dict(renamed.named_trainable_parameters())[name.replace("de.", "german.")] is parameter
    x = x_of(3)
    wanted = one_by_one(models, bank.base, ["de", None, "it"], ((x,), {}))
    assert_same(fewer(x, adapters=["de", None, "it"]), wanted)
    assert_same(renamed(x, adapters=["german", None, "it"]), wanted)
    with pytest.raises(KeyError, match="no adapter 'it'"):
        bank(x, adapters=["de", None, "it"])


def test_a_bank_without_adapters() -> None:
    models = trio()
    model = MLP_ROW.model()
    bank = gf.AdapterBank(base=model)
    x = x_of(3)
    assert torch.equal(bank(x, adapters=[None] * 3), model(x))
    assert list(bank.add("fr", gf.adapt(model, gf.IA3()))) == ["fr"]
    with pytest.raises(gf.AdaptError, match="another model"):
        bank.add("fr", models["fr"])
    with pytest.raises(gf.AdaptError, match="needs to know its base"):
        gf.AdapterBank()


def test_a_bank_copies_what_it_is_given() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    x = x_of(3)
    before = bank(x, adapters=list(models))
    for model in models.values():
        shake(model, 5)
    assert torch.equal(bank(x, adapters=list(models)), before)
    outside = {id(p) for model in models.values() for p in model.parameters()}
    assert not outside & {id(p) for p in bank.trainable_parameters()}


def test_adapters_of_one_model_adapted_twice_over() -> None:
    model = MLP_ROW.model()
    below = shake(gf.adapt(model, gf.LoRA(rank=2)))
    base = gf.adapt(below, gf.IA3()).base
    models = {"a": shake(gf.adapt(base, gf.LoRA(rank=1)), 1), "b": shake(gf.adapt(base, gf.Full()), 2)}
    check(gf.AdapterBank(models), models, ["b", None, "a"], ((x_of(3),), {}))


def test_unreadable_adapters() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    x = x_of(3)
    cases: list[tuple[object, type[Exception], str]] = [
        (["fr", "de"], gf.AdaptError, r"names 2 samples, and the first tensor has shape \(3, 6\)"),
        (["fr", "de", "it", None], gf.AdaptError, "names 4 samples"),
        (["fr", "dee", "it"], KeyError, "no adapter 'dee'.*'de'"),
        ("fr", TypeError, "one name for each sample, got the text 'fr'"),
        (torch.tensor([0.0, 1.0, 2.0]), gf.AdaptError, "whole numbers"),
        (torch.tensor([True, False, True]), gf.AdaptError, "whole numbers"),
        (torch.tensor([[0, 1, 2]]), gf.AdaptError, r"of shape \(batch,\)"),
        (torch.tensor([0, 3, 1]), gf.AdaptError, "no adapter 3 in a bank of 3"),
        (torch.tensor([0, -2, 1]), gf.AdaptError, "no adapter -2"),
    ]
    for adapters, kind, message in cases:
        with pytest.raises(kind, match=message):
            bank(x, adapters=adapters)
    with pytest.raises(gf.AdaptError, match="no tensor"):
        bank(adapters=["fr"])
    with pytest.raises(gf.AdaptError, match="first tensor has shape"):
        bank(torch.tensor(1.0), adapters=["fr"])
    with pytest.raises(KeyError, match="'italian'"):
        bank["italian"]
    with pytest.raises(AttributeError, match="generate"):
        bank.generate(x, adapters=["fr", "fr", None])


def test_names() -> None:
    models = trio()
    bank = gf.AdapterBank(models)
    with pytest.raises(gf.AdaptError, match="already"):
        bank.add("fr", models["fr"])
    with pytest.raises(gf.AdaptError, match="already"):
        bank.rename("fr", "de")
    with pytest.raises(gf.AdaptError, match="not empty"):
        bank.rename("fr", "")
    with pytest.raises(gf.AdaptError, match="not empty"):
        gf.AdapterBank({"": models["fr"]})
    with pytest.raises(KeyError, match="'es'"):
        bank.remove("es")
    with pytest.raises(KeyError, match="'es'"):
        bank.rename("es", "pt")
    with pytest.raises(TypeError, match="adapt\\(\\) makes one"):
        bank.add("es", nn.Linear(2, 2))
    with pytest.raises(gf.AdaptError, match="'other' was adapted from another model"):
        gf.AdapterBank({"fr": models["fr"], "other": gf.adapt(MLP_ROW.model(), gf.IA3())})


# --- as a value


def test_the_users_model_and_the_adapted_ones_are_not_touched() -> None:
    model = MLP_ROW.model()
    mess_up(model)
    models = trio(model)
    states = {name: {k: bits(t) for k, t in m.adapter_state_dict().items()} for name, m in models.items()}
    kept = [census(adapted) for adapted in models.values()]
    with unchanged(model):
        bank = gf.AdapterBank(models)
        x = x_of(4)
        bank(x, adapters=["fr", "de", None, "it"]).sum().backward()
        torch.optim.SGD(bank.trainable_parameters(), lr=1.0).step()
        bank.train().eval()(x, adapters=["fr", "it", None, "it"])
        bank.to(torch.float32)
        bank.remove("fr")
        copy.deepcopy(bank)
    for before, adapted in zip(kept, models.values(), strict=True):
        assert not changes(before, census(adapted))
    for name, m in models.items():
        assert {k: bits(t) for k, t in m.adapter_state_dict().items()} == states[name]
        assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))], ids=["deepcopy", "pickle"])
def test_copies(way: Callable[[gf.AdapterBank], gf.AdapterBank]) -> None:
    bank = gf.AdapterBank(trio()).eval()
    x, names = x_of(4), ["fr", "it", None, "de"]
    bank(x, adapters=names)
    before = bank(x, adapters=names).detach()
    made = way(bank)
    assert list(made) == list(bank)
    assert not made.training
    assert_close(made(x, adapters=names), before)
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(1.0)
    assert torch.equal(bank(x, adapters=names), before)
    assert not torch.equal(made(x, adapters=names), before)
    made(x, adapters=names).sum().backward()


def test_a_bank_is_a_module_whose_parameters_are_the_adapters() -> None:
    bank = gf.AdapterBank(trio())
    held = {f"adapters.{name}": tensor for name, tensor in bank.named_trainable_parameters()}
    assert {name: p for name, p in bank.named_parameters() if p.requires_grad}.keys() == held.keys()
    assert all(p is held.get(name, p) for name, p in bank.named_parameters())
    assert bank.requires_grad_(False) is bank
    assert not list(bank.trainable_parameters())


def test_modes_and_moves_act_in_place() -> None:
    bank = gf.AdapterBank(trio())
    x, names = x_of(4), ["fr", "it", None, "de"]
    wanted = bank(x, adapters=names)
    held = dict(bank.named_parameters())
    assert bank.training
    bank.eval()
    assert not bank.training
    assert not bank["fr"].training
    assert bank.train() is bank
    assert bank.training
    calls: list[bool] = []
    bank.register_forward_pre_hook(lambda *_: calls.append(True))
    bank.to(torch.float32)
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    assert all(p is held[name] for name, p in bank.named_parameters()), "an optimizer would have lost them"
    for _ in range(2):
        out = bank(x.float(), adapters=names)
        assert out.dtype == torch.float32
        assert_close(out.double(), wanted, 1e-6)
    assert len(calls) == 2, "the bank's hooks are gone"
    fr = bank["fr"](x[:1].float())
    assert_close(fr, out[:1], 1e-6)
    (bank(x.float(), adapters=names) ** 2).sum().backward()
    torch.optim.SGD(bank.trainable_parameters(), lr=0.1).step()
    assert (bank(x.float(), adapters=names) - out)[:2].abs().max() > 1e-3, "it does not follow its own training"
    bank.double()
    assert bank(x, adapters=names).dtype == torch.float64
    assert gf.AdapterBank(base=MLP_ROW.model()).to(torch.float32).base(x.float()).dtype == torch.float32


def test_a_bank_that_shares_tensors_with_one_that_is_moved() -> None:
    """As any modules that share parameters; neither computes with what was there before."""
    bank = gf.AdapterBank(trio())
    x, names = x_of(4), ["fr", "it", None, "de"]
    bigger = bank.add("more.1", bank["fr"])
    wanted = bank(x, adapters=names)
    bigger.float()
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    assert_close(bank(x, adapters=names), wanted, 1e-6)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.zero_()
    assert (bank(x, adapters=names) - wanted).abs().max() > 1e-3, "it computes with the old tensors"


def test_states_of_a_bank() -> None:
    bank = gf.AdapterBank(trio())
    x, names = x_of(4), ["fr", "it", None, "de"]
    wanted = bank(x, adapters=names)
    state = {name: tensor.clone() for name, tensor in bank.adapter_state_dict().items()}
    of_module = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    assert state.keys() == {name.removeprefix("adapters.") for name in of_module}
    assert {f"fr.{name}" for name in bank["fr"].adapter_state_dict()} <= state.keys()
    for load in (lambda: bank.load_adapter_state_dict(state), lambda: bank.load_state_dict(of_module)):
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.add_(1.0)
        assert (bank(x, adapters=names) - wanted).abs().max() > 1e-3
        load()
        assert torch.equal(bank(x, adapters=names), wanted)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "adapters.other.no", "adapters.fr.no"'):
        bank.load_state_dict({**of_module, "adapters.fr.no": x, "adapters.other.no": x})
    missing = dict(state)
    name = next(iter(missing))
    del missing[name]
    with pytest.raises(gf.StateError, match="the state lacks 1 of the adapter's"):
        bank.load_adapter_state_dict(missing)
    assert bank.load_adapter_state_dict({**missing, "no": x}, strict=False) == ([name], ["no"])
    assert "fr" in bank.summary()
    assert str(len(bank["fr"].adapted_parameters)) in bank.summary()


@pytest.mark.parametrize(
    "way", [lambda bank: bank, copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))], ids=["", "copy", "pickle"]
)
def test_a_part_that_is_in_another_mode(way: Callable[[gf.AdapterBank], gf.AdapterBank]) -> None:
    """A frozen BatchNorm in a network in training mode, as fine-tuning has it; and a layer whose dropout is off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model(torch.randn(50, 6, dtype=torch.float64) * 3)
    model.train()
    model[1].eval()
    model[2].eval()
    strategy = {"0": gf.LoRA(rank=2), "2": gf.LoRA(rank=2, dropout=0.9)}
    models = {name: shake(gf.adapt(model, strategy), seed) for seed, name in enumerate("ab")}
    bank, x = way(gf.AdapterBank(models)), x_of(6)
    assert bank.training
    names: list[str | None] = ["a", "b", None] * 2
    wanted = one_by_one(models, models["a"].base, names, ((x,), {}))
    assert_same(bank(x, adapters=names), wanted)
    assert_same(bank["a"](x), models["a"](x))
    assert_same(bank(x, adapters=["a"] * 6), models["a"](x))
    assert_same(gf.stack(models.values()).mix(x, members=[0, 1, None] * 2), wanted)
    assert_same(bank.eval()(x, adapters=names), wanted)  # whatever else there is does the same in both
    with pytest.raises(AssertionError, match="off by"):
        assert_same(bank.train()(x, adapters=names), wanted)


def test_dropout_is_that_of_the_mode() -> None:
    model = MLP_ROW.model()
    models = {
        "a": shake(gf.adapt(model, gf.LoRA(rank=2, dropout=0.5))),
        "b": shake(gf.adapt(model, gf.LoRA(rank=2)), 3),
    }
    bank = gf.AdapterBank(models)
    x, names = x_of(4), ["a", "b", None, "a"]
    assert not torch.equal(bank(x, adapters=names)[0], bank(x, adapters=names)[0])
    assert torch.equal(bank(x, adapters=names)[1:3], bank(x, adapters=names)[1:3])
    check(bank.eval(), {name: m.eval() for name, m in models.items()}, names, ((x,), {}))


def test_a_base_that_was_written_to() -> None:
    model = MLP_ROW.model()
    models = trio(model)
    bank = gf.AdapterBank(models)
    x, names = x_of(4), ["fr", "it", None, "de"]
    bank(x, adapters=names)
    with torch.no_grad():
        model.get_parameter("layers.0.weight").mul_(2.0)
    with pytest.warns(gf.BaseChangedWarning, match="layers.0.weight"):
        found = bank(x, adapters=names)
    with pytest.warns(gf.BaseChangedWarning):
        wanted = one_by_one(models, models["de"].base, names, ((x,), {}))
    assert_close(flat(found), flat(wanted))
    bank(x, adapters=names)


def test_mlp_is_not_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen weights meet all samples in one product each."""
    bank = gf.AdapterBank(trio())
    calls = []
    forward = MLP.forward

    def counted(self: MLP, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(MLP, "forward", counted)
    bank(x_of(5), adapters=["fr", "de", None, "it", "fr"])
    assert calls == [(5, 6)]


class Turning(nn.Module):
    """A network that turns its batch around if a value says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.flip(0) if bool((x[..., 0] > 0).any()) else x)
        return found


def test_a_call_that_goes_another_way_by_its_values_is_followed_anew() -> None:
    torch.manual_seed(0)
    model = Turning().double()
    adapters = {name: gf.adapt(model, gf.LoRA(rank=2, init="random")) for name in "abc"}
    bank = gf.AdapterBank(adapters)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    for sign in (-1, 1, -1):
        x[..., 0] = sign * x[..., 0].abs()
        whole = [adapters[name](x) for name in "abc"]
        place = range(3) if sign < 0 else range(2, -1, -1)
        wanted = torch.stack([whole[owner][row] for row, owner in enumerate(place)])
        torch.testing.assert_close(bank(x, adapters=list("abc")), wanted, rtol=0, atol=1e-12)


class Masked(nn.Module):
    """Attention over tokens, with a mask that is left out where it hides nothing, as transformers' models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = x @ x.mT
        if not bool(mask.all()):
            scores = scores.masked_fill(~mask[:, None, :], -1e9)
        found: Tensor = self.out(scores.softmax(-1) @ self.value(x))
        return found


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each call that is followed."""
    calls: list[int] = []
    before = TrackSamples.__init__

    def counted(self: TrackSamples, batch: int) -> None:
        calls.append(batch)
        before(self, batch)

    monkeypatch.setattr(TrackSamples, "__init__", counted)
    return calls


def masked(count: int) -> dict[str, gf.AdaptedModel]:
    torch.manual_seed(0)
    model = Masked().double()
    return {f"a{i}": gf.adapt(model, gf.LoRA(rank=2, init="random")) for i in range(count)}


def test_a_call_that_reads_the_same_values_is_not_followed_again(followed: list[int]) -> None:
    adapters = masked(2)
    bank = gf.AdapterBank(adapters)
    full, padded = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, False], [True, True, True]])
    calls = [(full, 1), (full, 0), (padded, 1), (padded, 0), (full, 1), (padded, 1), (padded, 1), (full, 1), (full, 1)]
    for index, (mask, wanted) in enumerate(calls):
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        assert_same(bank(x, mask, adapters=["a1", "a0"]), one_by_one(adapters, bank.base, ["a1", "a0"], ((x, mask), {})))
        assert (index, len(followed)) == (index, wanted)
        followed.clear()


def test_a_mask_of_as_many_tokens_as_samples(followed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of the batch or not; where the order of its rows makes no difference, samples are ordered all the same."""
    stacks: list[bool] = []
    before = contiguous.lies_stacked

    def seen(tensors: Sequence[Tensor]) -> bool:
        stacks.append(before(tensors))
        return stacks[-1]

    monkeypatch.setattr(contiguous, "lies_stacked", seen)
    adapters = masked(3)
    bank, names = gf.AdapterBank(adapters), ["a1", "a2", "a0"]
    full, padded = torch.ones(3, 3, dtype=torch.bool), torch.tensor([[True, True, False], [True] * 3, [True] * 3])
    for mask, lies in ((full, True), (padded, False)):
        x = torch.randn(3, 3, 4, dtype=torch.float64)
        assert_same(bank(x, mask, adapters=names), one_by_one(adapters, bank.base, names, ((x, mask), {})))
        assert set(stacks) == {lies}
        stacks.clear()


@pytest.mark.parametrize(
    "strategy", [gf.LoRA(rank=2), {"*0.weight": gf.IA3(), "*2.weight": gf.LoRA()}, {"2": gf.Bottleneck(2)}], ids=str
)
def test_a_new_adapter_by_its_strategy_is_what_adapt_makes(strategy: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    bank = gf.AdapterBank(base=model).add("new", strategy, generator=torch.Generator().manual_seed(1))
    wanted = gf.adapt(model, strategy, generator=torch.Generator().manual_seed(1))
    state = wanted.adapter_state_dict()
    assert list(state) == list(bank["new"].adapter_state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in bank["new"].adapter_state_dict().items())
    assert bank["new"].strategy == wanted.strategy
    assert list(map(id, bank.trainable_parameters())) == list(map(id, bank["new"].trainable_parameters()))
    with pytest.raises(gf.AdaptError, match="matches nothing"):
        bank.add("other", {"nowhere": gf.LoRA()})
    with pytest.raises(TypeError, match="adapted models"):
        bank.add("other", model)  # a model that is not adapted
    with pytest.raises(TypeError, match="adapted models"):
        bank.add("other", "fr")


class OnSome(nn.Module):
    """A network that runs a layer on those samples that a condition selects, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        made: Tensor = x.new_zeros(len(x), 3).index_put((chosen,), self.layer(x[chosen]))
        return made


@pytest.mark.parametrize("method", [gf.LoRA(rank=1, init="random"), gf.DoRA(rank=1, init="random"), gf.IA3()], ids=str)
def test_a_layer_may_run_on_no_sample(method: gf.Method) -> None:
    model = OnSome()
    bank = gf.AdapterBank({name: shake(gf.adapt(model, {"layer": method})) for name in "abc"})
    x = x_of(6)
    for signs in ([1, -1, 1, 1, -1, 1], [-1] * 6):
        x[:, 0] = x[:, 0].abs() * torch.tensor(signs)
        assert_close(bank(x, adapters=list("abccab")), one_by_one(bank, bank.base, list("abccab"), ((x,), {})))


def test_a_move_that_moves_nothing_leaves_other_banks_stacks_in_place() -> None:
    bank = gf.AdapterBank(trio())
    bank = bank.remove("it")
    other = bank.rename("fr", "french").prepare()
    before = {name: tensor.data_ptr() for name, tensor in bank.named_trainable_parameters()}
    bank.to("cpu")
    assert {name: tensor.data_ptr() for name, tensor in bank.named_trainable_parameters()} == before
    with torch.no_grad():
        for tensor in bank.trainable_parameters():
            tensor.add_(1.0)
    assert other._compiled is not None
    index, x = torch.tensor([0, -1, 1]), x_of(3)
    assert_close(other._compiled(index, (x,), {}), bank(x, adapters=index))


def test_the_base_of_a_bank_is_made_once() -> None:
    bank = gf.AdapterBank(trio())
    assert bank.base is bank.base
    assert_close(bank.base(x_of(3)), bank(x_of(3), adapters=[None] * 3))
