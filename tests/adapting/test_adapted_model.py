"""The adapted model, member by member of the contract's table."""

from __future__ import annotations

import copy
import pickle
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.census import unchanged
from helpers.models import BY_NAME, CNN, MLP, Row, assert_close, flat, gpt2, llama, loss_of, pairs, rows, shake, t5, tokens
from torch import Tensor, nn

import gift_func as gf


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    return BY_NAME["mlp"].model(dtype)


def x_of(row: Row) -> Tensor:
    found = row.call()[0][0]
    assert isinstance(found, Tensor)
    return found


X = x_of(BY_NAME["mlp"])


def random_lora(rank: int = 2, **options: Any) -> gf.LoRA:
    return gf.LoRA(rank=rank, init="random", **options)


def values(adapted: gf.AdaptedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapted.adapter_state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The adapter.


def test_the_adapter_is_a_parameter_dict_with_dotted_keys() -> None:
    adapted = gf.adapt(mlp(), {"layers.*": gf.LoRA(rank=3)} | {"*.bias": gf.Full()})
    keys = ["layers.0.lora_B", "layers.0.lora_A", "layers.0.bias", "layers.2.lora_B", "layers.2.lora_A", "layers.2.bias"]
    assert isinstance(adapted.adapter, nn.ParameterDict)
    assert sorted(adapted.adapter) == sorted(keys) == sorted(adapted.adapter.keys())
    assert adapted.adapter["layers.0.lora_A"].shape == (3, 6)
    assert adapted.adapter["layers.2.lora_B"].shape == (5, 3)
    assert all(isinstance(parameter, nn.Parameter) for parameter in adapted.adapter.values())
    assert "layers.0.lora_A" in adapted.adapter
    assert "layers.0.weight" not in adapted.adapter
    assert len(adapted.adapter) == 6
    assert dict(adapted.adapter.items()).keys() == dict(adapted.adapter).keys()
    assert list(reversed(adapted.adapter)) == list(adapted.adapter)[::-1]
    assert adapted.adapter.get("nothing") is None
    assert "(3, 6)" in repr(adapted.adapter)
    copied = adapted.adapter.copy()
    assert copied.keys() == dict(adapted.adapter.items()).keys()


def test_the_parameters_are_exactly_those_of_the_adapter() -> None:
    adapted = gf.adapt(BY_NAME["llama"].model(), gf.LoRA(rank=2))
    adapter = {id(parameter) for parameter in adapted.adapter.values()}
    assert {id(parameter) for parameter in adapted.parameters()} == adapter
    assert [id(p) for p in adapted.trainable_parameters()] == [id(p) for p in adapted.adapter.values() if p.requires_grad]
    assert dict(adapted.named_trainable_parameters()).keys() == set(adapted.adapter)
    assert isinstance(adapted.trainable_parameters(), Iterator)
    assert isinstance(adapted.named_trainable_parameters(), Iterator)
    name = next(iter(adapted.adapter))
    adapted.adapter[name].requires_grad_(False)
    assert name not in dict(adapted.named_trainable_parameters())
    assert len(list(adapted.parameters())) == len(adapted.adapter)


@rows("mlp", "cnn", "named", "tied", "shared", "experts", "llama", "linear")
def test_every_name_is_its_parameters_own_name_with_the_tensor_behind(row: Row) -> None:
    adapted = row.adapt(row.model(), "lora")
    names = set()
    for name, parameter in row.model().named_parameters():
        if parameter.ndim >= 2:
            module, _, own = name.rpartition(".")
            prefix = module if own == "weight" else name
            names |= {f"{prefix}.{tensor}" if prefix else tensor for tensor in ("lora_A", "lora_B")}
    assert set(adapted.adapter) == names
    assert set(row.adapt(row.model(), "full").adapter) == {name for name, _ in row.model().named_parameters()}


def test_a_tensor_of_the_adapter_may_be_replaced_by_another() -> None:
    adapted = gf.adapt(mlp(), random_lora())
    other = torch.zeros(8, 2, dtype=torch.float64)
    adapted.adapter["layers.0.lora_B"] = other
    adapted.adapter["layers.2.lora_B"] = nn.Parameter(torch.zeros(5, 2, dtype=torch.float64))
    assert isinstance(adapted.adapter["layers.0.lora_B"], nn.Parameter)
    assert torch.equal(adapted(X), mlp()(X))
    assert torch.equal(adapted.merge()(X), mlp()(X))


def test_values_changed_in_place_are_seen_by_the_next_call() -> None:
    adapted = gf.adapt(mlp(), random_lora())
    before = adapted(X)
    with torch.no_grad():
        adapted.adapter["layers.0.lora_B"].zero_()
        adapted.adapter["layers.2.lora_B"].data = torch.zeros(5, 2, dtype=torch.float64)
    assert torch.equal(adapted(X), mlp()(X))
    assert not torch.equal(before, adapted(X))


# States.


@pairs("mlp", "cnn", "tied", "llama", "experts", "linear")
def test_states_go_around(row: Row, method: str) -> None:
    model = row.model().eval()
    a, b = (shake(row.adapt(model, method), seed).eval() for seed in (1, 2))
    args, kwargs = row.call()
    wanted = flat(a(*args, **kwargs))
    assert not torch.equal(flat(b(*args, **kwargs)), wanted)
    state = a.adapter_state_dict()
    assert type(state) is dict
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in state.values())
    made = b.with_adapter(state)
    assert torch.equal(flat(made(*args, **kwargs)), wanted)
    shake(made, 3)
    assert torch.equal(flat(a(*args, **kwargs)), wanted), "with_adapter copies"
    kept = [id(parameter) for parameter in b.parameters()]
    found = b.load_adapter_state_dict(state)
    assert found == ([], [])
    assert [id(parameter) for parameter in b.parameters()] == kept
    assert torch.equal(flat(b(*args, **kwargs)), wanted)
    c = row.adapt(model, method)
    c.load_state_dict(a.state_dict())
    assert torch.equal(flat(c.eval()(*args, **kwargs)), wanted)


def test_with_adapter_shares_the_base_and_keeps_modes_and_flags() -> None:
    adapted = gf.adapt(mlp(), random_lora()).eval()
    adapted.adapter["layers.0.lora_A"].requires_grad_(False)
    made = adapted.with_adapter({name: tensor.float() for name, tensor in adapted.adapter_state_dict().items()})
    assert not made.training
    assert not made.adapter["layers.0.lora_A"].requires_grad
    assert made.adapter["layers.0.lora_A"].dtype == torch.float64
    assert made.strategy == adapted.strategy
    assert [part.name for part in made.adapted_parameters] == [part.name for part in adapted.adapted_parameters]


def test_loading_without_strict_takes_what_fits() -> None:
    adapted, other = gf.adapt(mlp(), random_lora()), gf.adapt(mlp(), random_lora())
    state = values(other)
    del state["layers.0.lora_A"]
    kept = adapted.adapter["layers.0.lora_A"].detach().clone()
    found = adapted.load_adapter_state_dict({**state, "extra": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["layers.0.lora_A"]
    assert found.unexpected_keys == ["extra"]
    assert torch.equal(adapted.adapter["layers.0.lora_A"], kept)
    assert torch.equal(adapted.adapter["layers.2.lora_A"], state["layers.2.lora_A"])


# Reaching through.


class Talkative(MLP):
    """A model with methods, a property and attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"size": 8}
        self.register_buffer("offset", torch.ones(5))
        self.calls = 0

    def encode(self, x: Tensor, *, twice: bool = False) -> Tensor:
        """Encode."""
        out: Tensor = self.layers(x) * (2 if twice else 1) + self.get_buffer("offset")
        return out

    def nested(self, x: Tensor) -> Tensor:
        out: Tensor = self.encode(x) + self(x)
        return out

    @property
    def width(self) -> Tensor:
        layer = self.layers[2]
        assert isinstance(layer, nn.Linear)
        return layer.weight.sum()

    @property
    def broken(self) -> int:
        raise AttributeError("the inner error")

    def asked(self) -> bool:
        weight = self.get_parameter("layers.2.weight")
        return weight is self.layers[2].weight and isinstance(weight, nn.Parameter)

    @staticmethod
    def helper(x: int) -> int:
        return x + 1

    def count(self) -> None:
        self.calls += 1


def test_attributes_and_methods_are_reached_with_the_adapter_bound() -> None:
    torch.manual_seed(0)
    model = Talkative().double()
    adapted = gf.adapt(model, random_lora())
    merged = adapted.merge()
    assert isinstance(merged, Talkative)
    assert adapted.config == {"size": 8}
    assert adapted.helper(1) == 2
    for name in ("encode", "nested"):
        assert_close(getattr(adapted, name)(X), getattr(merged, name)(X))
        assert not torch.equal(getattr(adapted, name)(X), getattr(model, name)(X))
    assert_close(adapted.encode(X, twice=True), merged.encode(X, twice=True))
    assert adapted.encode.__doc__ == "Encode."
    assert_close(adapted.width.detach(), merged.width.detach())
    assert isinstance(adapted.layers, nn.Sequential)
    assert_close(adapted.layers(X), merged.layers(X))
    assert torch.equal(adapted.offset, model.get_buffer("offset"))
    adapted.encode(X).sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    with unchanged(model):
        adapted.count()
        adapted.config["size"] = 9
    assert adapted.calls == 1
    assert hasattr(adapted, "encode")
    assert not hasattr(adapted, "nothing")


def test_model_code_may_ask_for_its_parameters() -> None:
    adapted = gf.adapt(Talkative(), random_lora())
    assert adapted.asked()
    assert gf.adapt(Talkative(), gf.Full()).asked()
    assert {name for name, _ in adapted.copy_pool.module.named_parameters()} == {name for name, _ in mlp().named_parameters()}


def test_an_error_inside_a_property_is_not_hidden() -> None:
    adapted = gf.adapt(Talkative(), random_lora())
    with pytest.raises(AttributeError, match="the inner error"):
        adapted.broken  # noqa: B018


def test_reached_modules_do_not_lead_to_the_users_model() -> None:
    model = mlp()
    adapted = gf.adapt(model, random_lora())
    mine = set(map(id, model.modules())) | set(map(id, model.parameters()))
    assert not mine & set(map(id, adapted.layers.modules()))
    assert not mine & set(map(id, adapted.layers.parameters()))
    with unchanged(model):
        adapted.layers.train()
        adapted.layers[0].register_forward_hook(lambda *_: None)
        adapted.base(X)


GENERATORS = {"llama": llama, "gpt2": gpt2, "t5": t5}


@pytest.mark.parametrize("name", list(GENERATORS))
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}, {"do_sample": True}], ids=str)
def test_generate_with_a_cache_equals_the_merged_models(name: str, options: dict[str, Any]) -> None:
    row = BY_NAME[name]
    model = row.model(torch.float32).eval()
    adapted = shake(row.adapt(model, "lora"), size=0.5).eval()
    merged: Any = adapted.merge()
    torch.manual_seed(0)
    ids = tokens(2, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "pad_token_id": 0, **options}
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    with unchanged(model):
        for made, out in ((adapted, found), (merged, wanted)):
            torch.manual_seed(1)
            out.append(made.generate(**inputs))
        without_cache: Tensor = adapted.generate(**{**inputs, "use_cache": False})
    assert torch.equal(found[0], wanted[0])
    assert found[0].shape[1] >= 8
    if options == {"do_sample": False}:
        assert torch.equal(found[0], without_cache)
        assert not torch.equal(found[0], model.generate(**inputs)), "the adapter should change what is said"  # type: ignore[operator]


def test_the_base_is_reached_unadapted() -> None:
    model = BY_NAME["cnn"].model().eval()
    adapted = gf.adapt(model, random_lora()).eval()
    x = x_of(BY_NAME["cnn"])
    assert torch.equal(adapted.base(x), model(x))
    assert not adapted.base(x).requires_grad
    assert not torch.equal(adapted(x), model(x))
    assert isinstance(adapted.base.head, nn.Linear)
    assert "CNN" in repr(adapted.base)
    x.requires_grad_()
    (found,) = torch.autograd.grad(loss_of(adapted.base(x)), x)
    (wanted,) = torch.autograd.grad(loss_of(model(x)), x)
    assert_close(found, wanted)


# An ordinary module.


def test_train_and_eval_reach_the_private_copy() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)).double().eval()
    adapted = gf.adapt(model, random_lora())
    assert not adapted.training
    assert torch.equal(adapted(X), adapted(X))
    assert adapted.train() is adapted
    assert adapted.training
    assert not torch.equal(adapted(X), adapted(X))
    assert adapted.eval() is adapted
    assert torch.equal(adapted(X), adapted(X))
    assert not model.training


@pairs("mlp", "cnn", "tied", "llama", "lstm", "experts")
def test_to_moves_base_and_adapter_and_nobody_else(row: Row, method: str) -> None:
    model = row.model()
    with unchanged(model):
        adapted = shake(row.adapt(model, method)).eval()
        other = adapted.with_adapter(adapted.adapter_state_dict()).eval()
        wanted = flat(adapted(*row.call()[0], **row.call()[1]))
        assert adapted.to(torch.float32) is adapted
        args, kwargs = row.call(torch.float32)
        found = flat(adapted(*args, **kwargs))
        assert {p.dtype for p in adapted.parameters()} == {torch.float32}
        assert_close(found, wanted.float(), tolerance=1e-4)
        assert_close(flat(adapted.merge()(*args, **kwargs)), found)
        base = flat(adapted.base(*args, **kwargs))
        assert base.dtype == torch.float32
        assert_close(flat(other(*row.call()[0], **row.call()[1])), wanted)
        loss_of(adapted(*args, **kwargs)).backward()
        assert {p.grad.dtype for p in adapted.parameters() if p.grad is not None} == {torch.float32}
        adapted.double().eval()
        assert_close(flat(adapted(*row.call()[0], **row.call()[1])), wanted, tolerance=1e-4)


def test_to_a_place_without_memory() -> None:
    adapted = gf.adapt(mlp(), random_lora()).to("meta")
    assert adapted(X.to("meta")).is_meta
    assert all(parameter.is_meta for parameter in adapted.parameters())
    model = mlp().to("meta")
    made = gf.adapt(model, gf.LoRA(rank=2))
    assert made(X.to("meta")).shape == (3, 5)


@pairs("mlp", "cnn", "tied", "shared", "named", "llama", "lstm", "experts", "encoder_second_layer")
def test_deepcopy_and_pickle_are_the_same_model_and_independent(row: Row, method: str) -> None:
    adapted = shake(row.adapt(row.model(), method)).eval()
    args, kwargs = row.call()
    loss_of(adapted(*args, **kwargs)).backward()
    next(iter(adapted.parameters())).requires_grad_(False)
    wanted, state = flat(adapted(*args, **kwargs)), values(adapted)
    for made in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert isinstance(made, gf.AdaptedModel)
        assert torch.equal(flat(made(*args, **kwargs)), wanted)
        assert same(values(made), state)
        assert made.training == adapted.training
        assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in adapted.parameters()]
        assert made.strategy == adapted.strategy or row.strategy(method).rules
        assert repr(made) == repr(adapted)
        assert made.summary() == adapted.summary()
        shake(made.train())
        assert not torch.equal(flat(made.eval()(*args, **kwargs)), wanted)
    assert same(values(adapted), state)
    assert torch.equal(flat(adapted(*args, **kwargs)), wanted)


def test_deepcopy_keeps_gradients_and_serves_inside_other_modules() -> None:
    adapted = gf.adapt(mlp(), random_lora())
    whole = nn.Sequential(adapted, nn.Linear(5, 2).double())
    whole(X).sum().backward()
    made = copy.deepcopy(whole)
    for a, b in zip(whole[0].parameters(), made[0].parameters(), strict=True):
        assert a is not b
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad is not b.grad
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(whole(X), made(X))
    assert len(list(whole.parameters())) == len(adapted.adapter) + 2
    whole.load_state_dict(made.state_dict())


def test_repr_shows_the_tree_and_the_methods_and_no_numbers() -> None:
    text = repr(gf.adapt(mlp(), {"layers.0.weight": gf.LoRA(rank=3), "*.bias": gf.Full()}))
    assert text.splitlines()[0] == "MLP("
    assert "(0): Linear(in_features=6, out_features=8, bias=True)" in text
    assert "weight: LoRA(rank=3)" in text
    assert text.count("bias: Full()") == 2
    assert "tensor(" not in text
    assert "Slot" not in text
    root = repr(gf.adapt(nn.Linear(2, 2), gf.LoRA(rank=1)))
    assert "Linear(in_features=2, out_features=2, bias=True)" in root
    assert "LoRA(rank=1)" in root


def test_summary_counts() -> None:
    text = gf.adapt(mlp(), {"layers.0.weight": gf.LoRA(rank=3), "*.bias": gf.Full()}).summary()
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "shape", "method", "trained"]
    assert any("layers.0.weight" in line and "8x6" in line and "LoRA(rank=3)" in line and line.endswith("42") for line in lines)
    total = 6 * 8 + 8 + 8 * 5 + 5
    assert f"trained: {42 + 13} parameters of {total + 55}" in text.replace(",", "").replace("  ", " ") or "trained: 55" in text


# Training.


def regression() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)


@pytest.mark.parametrize("method", ["lora", "svdiff", "full"])
def test_a_torch_loop_and_a_pure_loop_reach_the_same_parameters(method: str) -> None:
    row = BY_NAME["mlp"]
    adapted = row.adapt(row.model(), method)
    x, y = regression()
    pure = gf.adapt(row.model(), row.strategy(method)).with_adapter(adapted.adapter_state_dict())
    params = {name: p.detach() for name, p in pure.named_trainable_parameters()}
    untouched = values(pure)

    def loss(params: dict[str, Tensor]) -> Tensor:
        error: Tensor = gf.functional_call(pure, params, (x,)) - y
        return error.square().mean()

    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = (adapted(x) - y).square().mean()
        value.backward()
        optimizer.step()
        grads, pure_value = torch.func.grad_and_value(loss)(params)
        params = {name: tensor - 0.1 * grads[name] for name, tensor in params.items()}
        losses.append(value.item())
        assert abs(pure_value.item() - value.item()) < 1e-10
    for name, tensor in params.items():
        assert_close(adapted.adapter[name].detach(), tensor, what=name)
    assert losses[-1] < losses[0] * (0.999 if method == "svdiff" else 0.95)
    assert same(values(pure), untouched)


def test_training_recovers_a_change_of_low_rank() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 8).double()
    target = copy.deepcopy(base)
    with torch.no_grad():
        target.weight += torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64) / 4
    x = torch.randn(64, 8, dtype=torch.float64)
    adapted = gf.adapt(base, gf.LoRA(rank=2), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (adapted(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6
    with torch.no_grad():
        assert_close(adapted.merge().get_parameter("weight"), target.weight, tolerance=1e-2)


def test_an_adapter_on_top_of_a_frozen_one() -> None:
    model = mlp()
    first = gf.adapt(model, random_lora())
    kept, middle = values(first), first(X).detach()
    second = gf.adapt(first, {"layers.0.weight": gf.LoRA(rank=3), "*.bias": gf.Full()})
    assert torch.equal(second(X), middle)
    assert torch.equal(second.base(X), middle)
    assert set(second.adapter) == {"layers.0.lora_A", "layers.0.lora_B", "layers.0.bias", "layers.2.bias"}
    shake(second)
    loss_of(second(X)).backward()
    assert all(p.grad is not None for p in second.parameters())
    assert all(p.grad is None for p in first.parameters())
    assert same(values(first), kept)
    change = 1.0 * second.adapter["layers.0.lora_B"] @ second.adapter["layers.0.lora_A"]
    merged = dict(first.merge().named_parameters())
    wanted = {name: p.detach() for name, p in merged.items()} | {
        n: second.adapter[n] for n in ("layers.0.bias", "layers.2.bias")
    }
    wanted["layers.0.weight"] = wanted["layers.0.weight"] + change
    assert_close(second(X), torch.func.functional_call(mlp(), wanted, (X,)))
    assert_close(second.merge()(X), second(X))
    shake(first)
    assert_close(second.base(X), middle)
    third = gf.adapt(second, gf.SVDiff())
    assert_close(third(X), second(X))
    made = pickle.loads(pickle.dumps(copy.deepcopy(third)))
    assert torch.equal(made(X), third(X))
    assert "LoRA(rank=3)" in repr(second)


@pairs("cnn", "tied", "llama", "encoder_padded", "mha", "lstm", "experts")
def test_adapting_on_top_of_many_models(row: Row, method: str) -> None:
    first = shake(row.adapt(row.model(), method)).eval()
    second = shake(row.adapt(first, "lora")).eval()
    args, kwargs = row.call()
    reference = row.adapt(first.merge(), "lora").with_adapter(second.adapter_state_dict()).eval()
    with torch.no_grad():
        found, wanted = flat(second(*args, **kwargs)), flat(reference(*args, **kwargs))
        assert_close(found, wanted)
        assert_close(flat(second.base(*args, **kwargs)), flat(first(*args, **kwargs)))


def test_the_base_may_be_frozen_once_for_many_adapters() -> None:
    model = mlp()
    base = gf.FrozenBase.of(model)
    a, b = gf.adapt(base, random_lora()), gf.adapt(base, gf.SVDiff())
    wanted = [a(X), b(X)]
    shake(a)
    assert torch.equal(b(X), wanted[1])
    assert not torch.equal(a(X), wanted[0])
    assert base.fingerprint() == gf.FrozenBase.of(mlp()).fingerprint()


# Dropout and generators.


def test_dropout_acts_in_training_only_and_repeats_with_the_seed() -> None:
    adapted = gf.adapt(mlp(), random_lora(dropout=0.5))
    adapted.eval()
    assert torch.equal(adapted(X), adapted(X))
    assert_close(adapted(X), adapted.merge()(X))
    clean = adapted(X)
    adapted.train()
    torch.manual_seed(0)
    first, second = adapted(X), adapted(X)
    torch.manual_seed(0)
    assert torch.equal(adapted(X), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, clean)
    assert_close(adapted.merge()(X), clean)
    adapted.eval()
    assert torch.equal(adapted(X), clean)


def test_dropout_has_the_expectation_of_no_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    adapted = gf.adapt(model, random_lora(dropout=0.3)).train()
    x = torch.randn(1, 4, dtype=torch.float64)
    with torch.no_grad():
        mean = adapted(x.expand(40000, 4)).mean(0)
        assert_close(mean, adapted.merge()(x)[0], tolerance=0.02)


@pytest.mark.parametrize("name", ["mlp", "cnn", "mha", "gpt2", "encoder"])
def test_dropout_where_there_is_an_input_to_drop(name: str) -> None:
    row = BY_NAME[name]
    adapted = gf.adapt(row.model(), random_lora(dropout=0.5))
    args, kwargs = row.call()
    adapted.train()
    found = flat(adapted(*args, **kwargs))
    assert not torch.equal(found, flat(adapted(*args, **kwargs)))
    loss_of(found).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters())
    adapted.eval()
    with torch.no_grad():
        assert_close(flat(adapted(*args, **kwargs)), flat(adapted.merge()(*args, **kwargs)))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "random"])
def test_a_generator_decides_and_leaves_the_global_state_alone(init: Any) -> None:
    before = torch.get_rng_state()
    made = [gf.adapt(mlp(), gf.LoRA(rank=2, init=init), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(values(made[0]), values(made[1]))
    assert not same(values(made[0]), values(made[2]))
    torch.manual_seed(5)
    one = gf.adapt(mlp(), gf.LoRA(rank=2, init=init))
    torch.manual_seed(5)
    assert same(values(one), values(gf.adapt(mlp(), gf.LoRA(rank=2, init=init))))


# The base's own tensors.


def test_a_base_changed_in_place_is_noticed_once() -> None:
    model = mlp()
    adapted = gf.adapt(model, {"layers.0.weight": random_lora(), "layers.2.weight": gf.SVDiff()})
    adapted(X)
    with torch.no_grad():
        model.get_parameter("layers.0.weight").mul_(2)
        model.get_parameter("layers.2.weight").mul_(3)
    with pytest.warns(gf.BaseChangedWarning, match=r"written to in place after adapt: layers\.0\.weight, layers\.2\.weight"):
        found = adapted(X)
    assert torch.equal(adapted(X), found)
    assert_close(found, adapted.merge()(X))
    assert_close(adapted.base(X), model(X))
    fresh = gf.adapt(model, {"layers.0.weight": gf.LoRA(rank=2), "layers.2.weight": gf.SVDiff()})
    assert_close(fresh.with_adapter(adapted.adapter_state_dict())(X), found)


@pytest.mark.parametrize("way", ["functional_call", "method", "base"])
def test_every_way_to_call_notices(way: str) -> None:
    torch.manual_seed(0)
    model = Talkative().double()
    adapted = gf.adapt(model, random_lora())
    with torch.no_grad():
        model.layers[0].bias.add_(1)  # type: ignore[operator]
    calls: dict[str, Callable[[], Any]] = {
        "functional_call": lambda: gf.functional_call(adapted, dict(adapted.adapter.items()), (X,)),
        "method": lambda: adapted.encode(X),
        "base": lambda: adapted.base(X),
    }
    with pytest.warns(gf.BaseChangedWarning, match=r"layers\.0\.bias"):
        calls[way]()


def test_a_model_trained_after_adapt_warns_and_an_untouched_one_does_not() -> None:
    model = mlp()
    adapted = gf.adapt(model, random_lora())
    for _ in range(2):
        adapted(X)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    adapted(X)
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.warns(gf.BaseChangedWarning, match="and 1 more"):
        adapted(X)


# Threads, hooks, contexts.


def test_threads_on_one_base_do_not_disturb_each_other() -> None:
    model = mlp()
    base = gf.FrozenBase.of(model)
    many = [shake(gf.adapt(base, random_lora()), seed) for seed in range(4)]
    states = [dict(adapted.adapter.items()) for adapted in many]
    wanted = [adapted(X).detach() for adapted in many]
    wrong: list[int] = []

    def work(index: int) -> None:
        for turn in range(100):
            found = many[index](X) if turn % 2 else gf.functional_call(many[0], states[index], (X,))
            if not torch.equal(found.detach(), wanted[index]):
                wrong.append(index)

    with unchanged(model):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_hooks_of_the_model_run_on_the_copy_and_hooks_of_the_adapted_model_run() -> None:
    seen: list[str] = []
    model = mlp()
    model.register_forward_hook(lambda module, args, output: seen.append("model"))
    adapted = gf.adapt(model, random_lora())
    adapted.register_forward_hook(lambda module, args, output: seen.append("adapted"))
    adapted(X)
    assert seen == ["model", "adapted"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients(mode: Any) -> None:
    for name in ("mlp", "cnn", "encoder_padded", "llama"):
        row = BY_NAME[name]
        adapted = row.adapt(row.model(), "lora").eval()
        args, kwargs = row.call()
        wanted = flat(adapted.merge()(*args, **kwargs)).detach()
        with mode():
            found = flat(adapted(*args, **kwargs))
        assert not found.requires_grad
        if name != "encoder_padded":  # there torch answers zeros at padded places where no gradient is asked for
            assert_close(found.clone(), wanted)


def test_adapt_under_no_grad_and_inference_mode_still_trains() -> None:
    with torch.no_grad():
        adapted = gf.adapt(mlp(), random_lora())
    adapted(X).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())


def test_merge_of_a_wider_adapter_rounds_once() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(torch.bfloat16)
    adapted = gf.adapt(model, random_lora(dtype=torch.float32))
    change = adapted.adapter["lora_B"].double() @ adapted.adapter["lora_A"].double()
    wanted = (model.weight.double() + change).to(torch.bfloat16)
    found = adapted.merge().weight
    assert isinstance(found, Tensor)
    assert (found != wanted).float().mean() < 0.01


def test_merge_gives_memory_of_its_own() -> None:
    model = CNN().double()
    adapted = gf.adapt(model, random_lora())
    merged = adapted.merge()
    mine = {
        t.untyped_storage().data_ptr()
        for t in [*model.parameters(), *model.buffers(), *adapted.parameters(), *adapted.buffers()]
    }
    assert not mine & {t.untyped_storage().data_ptr() for t in [*merged.parameters(), *merged.buffers()]}
    assert type(merged) is CNN


def test_merged_models_of_tied_weights_stay_tied_and_pickle() -> None:
    for name in ("tied", "shared", "llama", "named"):
        row = BY_NAME[name]
        merged = row.adapt(row.model(), "lora").merge()
        ids = {key: id(parameter) for key, parameter in merged.named_parameters(remove_duplicate=False)}
        wanted = {key: id(parameter) for key, parameter in row.model().named_parameters(remove_duplicate=False)}
        assert len(set(ids.values())) == len(dict(row.model().named_parameters()))
        assert ids.keys() == wanted.keys()
        again = pickle.loads(pickle.dumps(merged))
        args, kwargs = row.call()
        assert torch.equal(flat(again(*args, **kwargs)), flat(merged(*args, **kwargs)))


def test_the_entangled_model_follows_its_adapter() -> None:
    row = BY_NAME["entangled"]
    model = row.model()
    adapted = row.adapt(model, "lora")
    body: Any = adapted.copy_pool.module
    assert body.weak() is body.third
    assert body.run.__self__ is body
    assert body.listed[0] is body.second
    assert body.reader.__dict__["sibling"] is body.first
    assert isinstance(body.run, types.MethodType)
    merged: Any = adapted.merge()
    assert merged.weak() is merged.third
    args, kwargs = row.call()
    assert_close(merged(*args, **kwargs).detach(), adapted(*args, **kwargs).detach())


@dataclass(frozen=True)
class Computed(gf.WeightMethod):
    """`W' = W + a·bᵀ`, by a method that forms the product ahead of use."""

    def why_not(self, site: gf.Site) -> str | None:
        return None if site.parameter.ndim == 2 else "a matrix"

    def init_tensors(self, site: gf.Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rows, columns = site.parameter.shape
        return {"a": site.parameter.new_ones(rows), "b": site.parameter.new_ones(columns)}

    def weight(self, base: gf.weights.Weight, tensors: Mapping[str, Tensor]) -> gf.weights.Weight:
        return gf.weights.Delta(base, torch.outer(tensors["a"], tensors["b"]))


def test_a_method_that_computes_ahead_is_never_stale() -> None:
    layers = {"0": nn.Linear(3, 3), "1": nn.Linear(3, 2)}
    adapted = gf.adapt(nn.Sequential(*layers.values()), {"*": Computed()})
    x = torch.randn(4, 3)
    for _ in range(3):
        optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-3)
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
        assert_close(adapted(x).detach(), adapted.merge()(x).detach())
        by_hand = x
        for name, layer in layers.items():
            change = torch.outer(adapted.adapter[f"{name}.a"], adapted.adapter[f"{name}.b"])
            by_hand = nn.functional.linear(by_hand, layer.weight + change, layer.bias)
        assert_close(adapted(x).detach(), by_hand.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_mode_in_which_it_is_switched_costs_no_gradient(mode: Any) -> None:
    """Weights of convolutions and of GPT-2's Conv1D hold views, which must carry gradients."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten())
    x = torch.randn(2, 2, 3, 3)
    adapted = gf.adapt(model, gf.LoRA(rank=1, init="random"))
    with mode():
        adapted.eval()
        adapted(x)
        adapted.train()
    adapted(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters())


def test_names_of_ours_hide_few_of_the_models() -> None:
    """What an adapted model has besides a module is the contract's, or unlikely to be anybody else's name."""
    own = {name for name in {*dir(gf.AdaptedModel), *vars(gf.adapt(nn.Linear(2, 2), gf.LoRA(rank=1)))} if name[0] != "_"}
    contract = {"adapter_state_dict", "base", "load_adapter_state_dict", "merge", "named_trainable_parameters", "strategy",
                "summary", "trainable_parameters", "with_adapter"}  # fmt: skip
    helpers = {"adapted_parameters", "copy_pool", "frozen_base", "frozen_with_adapter", "functional_call", "structured_weights",
               "to_adapter"}  # fmt: skip
    assert own - set(dir(nn.Module)) - set(vars(nn.Module())) == contract | helpers


def test_attributes_of_the_model_that_helpers_once_hid() -> None:
    class Named(nn.Linear):
        parts, pure, buffer_names, module, body, layout = "parts", "pure", "names", "module", "body", "layout"

    adapted = gf.adapt(Named(2, 2), gf.LoRA(rank=1))
    for name in ("parts", "pure", "buffer_names", "module", "body", "layout"):
        assert getattr(adapted, name) == getattr(Named, name)
