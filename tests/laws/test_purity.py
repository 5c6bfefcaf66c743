"""The user's model is the same, object by object and bit by bit, whatever is done with what was made of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.census import census, changes, mess_up, unchanged
from helpers.models import BY_NAME, CNN, METHODS, MLP, Row, flat, loss_of, pairs, rows, shake
from torch import Tensor, nn

import gift_func as gf

Action = Callable[[gf.AdaptedModel, Row], None]
ACTIONS: dict[str, Action] = {}


def action(function: Action) -> Action:
    ACTIONS[function.__name__] = function
    return function


def run(adapted: gf.AdaptedModel, row: Row, dtype: torch.dtype = torch.float64) -> Any:
    args, kwargs = row.call(dtype)
    return adapted(*args, **kwargs)


@action
def forward_in_both_modes(adapted: gf.AdaptedModel, row: Row) -> None:
    for mode in (True, False, True):
        adapted.train(mode)
        run(adapted, row)
        with torch.no_grad():
            run(adapted, row)
        with torch.inference_mode():
            run(adapted, row)


@action
def backward_and_optimizer_steps(adapted: gf.AdaptedModel, row: Row) -> None:
    adapted.train()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(run(adapted, row)).backward()
        optimizer.step()


@action
def flags_and_requires_grad(adapted: gf.AdaptedModel, row: Row) -> None:
    adapted.eval().train().requires_grad_(False).requires_grad_(True)
    adapted.zero_grad()
    for parameter in adapted.parameters():
        parameter.grad = torch.ones_like(parameter)


@action
def to_float32_and_back(adapted: gf.AdaptedModel, row: Row) -> None:
    adapted.to(torch.float32)
    run(adapted, row, torch.float32)
    adapted.double()
    run(adapted, row)


@action
def half(adapted: gf.AdaptedModel, row: Row) -> None:
    adapted.half()
    adapted.bfloat16()


@action
def to_meta(adapted: gf.AdaptedModel, row: Row) -> None:
    adapted.to("meta")


@action
def merge_and_train_the_merged(adapted: gf.AdaptedModel, row: Row) -> None:
    merged = adapted.merge().train()
    args, kwargs = row.call()
    loss_of(merged(*args, **kwargs)).backward()
    with torch.no_grad():
        for tensor in [*merged.parameters(), *merged.buffers()]:
            tensor.fill_(3)


@action
def states(adapted: gf.AdaptedModel, row: Row) -> None:
    state = {name: tensor + 1 for name, tensor in adapted.adapter_state_dict().items()}
    other = adapted.with_adapter(state)
    run(other, row)
    adapted.load_adapter_state_dict(state)
    adapted.load_state_dict(adapted.state_dict())
    file = io.BytesIO()
    torch.save(adapted.state_dict(), file)
    file.seek(0)
    adapted.load_state_dict(torch.load(file))


@action
def deepcopies(adapted: gf.AdaptedModel, row: Row) -> None:
    made = copy.deepcopy(adapted)
    loss_of(run(shake(made), row)).backward()
    copy.copy(adapted)


@action
def pickles(adapted: gf.AdaptedModel, row: Row) -> None:
    if row.pickles:
        made = pickle.loads(pickle.dumps(adapted))
        loss_of(run(shake(made), row)).backward()


@action
def an_exception_inside_forward(adapted: gf.AdaptedModel, row: Row) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    deepest = list(adapted.copy_pool.module.modules())[-1]
    handle = deepest.register_forward_pre_hook(fail)
    args, kwargs = row.call()
    named: dict[str, Tensor] = dict(adapted.named_parameters())
    calls: list[Callable[[], Any]] = [
        lambda: adapted(*args, **kwargs),
        lambda: gf.functional_call(adapted, dict(adapted.adapter.items()), args, kwargs),
        lambda: torch.func.functional_call(adapted, named, args, kwargs),
    ]
    for mode in (True, False):
        adapted.train(mode)
        for call in calls:
            with pytest.raises(RuntimeError, match="on purpose"):
                call()
    handle.remove()
    run(adapted, row)
    with pytest.raises(Exception, match=r".+"):
        adapted("no", "such", "inputs", 1, 2, 3, 4, 5, 6, 7, 8, 9, nothing=object())


@action
def pure_calls(adapted: gf.AdaptedModel, row: Row) -> None:
    args, kwargs = row.call()
    params = {name: p.detach().clone().requires_grad_() for name, p in adapted.adapter.items()}
    for mode in (True, False):
        adapted.train(mode)
        loss_of(gf.functional_call(adapted, params, args, kwargs)).backward()
        named: dict[str, Tensor] = dict(adapted.named_parameters())
        loss_of(torch.func.functional_call(adapted, named, args, kwargs)).backward()


@action
def transforms(adapted: gf.AdaptedModel, row: Row) -> None:
    if not row.vmaps:
        return
    adapted.eval()
    args, kwargs = row.call()
    stacked, buffers = torch.func.stack_module_state([adapted, copy.deepcopy(adapted)])

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(adapted, (params, buffers), args, kwargs))

    torch.func.vmap(torch.func.grad(loss))(stacked, buffers)
    torch.func.vmap(loss)(stacked, buffers).sum().backward()


@action
def adapt_on_top(adapted: gf.AdaptedModel, row: Row) -> None:
    top = shake(gf.adapt(adapted, row.strategy("lora")))
    loss_of(run(top.train(), row)).backward()
    top.merge()


@action
def the_base_called_in_training(adapted: gf.AdaptedModel, row: Row) -> None:
    args, kwargs = row.call()
    for mode in (True, False):
        adapted.train(mode)
        loss = loss_of(adapted.base(*args, **kwargs))
        assert not loss.requires_grad


@action
def reached_modules_written_to(adapted: gf.AdaptedModel, row: Row) -> None:
    for module in adapted.copy_pool.module.modules():
        module.training = not module.training
        module.note = "mine"  # type: ignore[assignment]
        module.register_forward_hook(lambda *_: None)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()


@action
def printing(adapted: gf.AdaptedModel, row: Row) -> None:
    repr(adapted), adapted.summary(), str(adapted.strategy), repr(adapted.adapter)


MODELS = (
    "mlp", "cnn", "encoder_padded", "encoder_second_layer", "lstm", "experts", "embedding_max_norm", "tied", "shared", "named",
    "entangled", "llama", "gpt2",
)  # fmt: skip


@pytest.mark.parametrize("name", list(ACTIONS))
@pairs(*MODELS)
def test_nothing_changes_the_users_model(row: Row, method: str, name: str) -> None:
    model = row.model()
    mess_up(model)
    with unchanged(model):
        adapted = row.adapt(model, method)
        ACTIONS[name](shake(adapted), row)


@pairs()
def test_adapt_itself_changes_nothing_and_draws_nothing(row: Row, method: str) -> None:
    model = row.model()
    mess_up(model)
    with unchanged(model, rng=True):
        row.adapt(model, method)
        adapted = gf.adapt(model, row.strategy(method), generator=torch.Generator().manual_seed(0))
        repr(adapted), adapted.summary(), row.strategy(method).explain(model)


@rows()
def test_a_whole_training_step_changes_nothing(row: Row) -> None:
    model = row.model()
    mess_up(model)
    with unchanged(model):
        backward_and_optimizer_steps(row.adapt(model, "lora"), row)
        backward_and_optimizer_steps(row.adapt(model, "full"), row)


def test_a_failed_adapt_changes_nothing() -> None:
    model = MLP()
    mess_up(model)
    with unchanged(model, rng=True):
        for strategy in ({"no.such": gf.LoRA()}, {"*.bias": gf.LoRA()}, [(lambda *_: False, lambda *_: None)]):
            with pytest.raises(gf.AdaptError, match=r"matches nothing|cannot adapt|no check"):
                gf.adapt(model, strategy)


def test_actions_that_mutate_the_parent_change_only_the_copy() -> None:
    model = MLP()

    def act(parent: nn.Module, name: str, global_name: str, kind: str, module: nn.Module) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        setattr(parent, name, nn.Linear(6, 8) if name == "0" else nn.Linear(8, 5))
        del parent._modules["1"]

    with unchanged(model):
        adapted = gf.adapt(model, [(lambda parent, name, path, kind, module: path == "layers.0", act)])
        adapted(torch.randn(2, 6))
        adapted.merge()


# What a census sees: without these the tests above could not fail.

HARMS: dict[str, tuple[Callable[[CNN], object], str]] = {
    "a value": (lambda m: m.head.weight.data.mul_(1.0001), "head.weight value"),
    "a write of the same value": (lambda m: torch.no_grad()(m.head.weight.add_)(0), "version"),
    "a parameter object": (lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach())), "parameter head.weight"),
    "requires_grad": (lambda m: m.head.weight.requires_grad_(False), "requires_grad"),
    "a gradient": (lambda m: setattr(m.head.bias, "grad", torch.zeros_like(m.head.bias)), "grad"),
    "a buffer": (lambda m: _buffer(m).add_(1e-9), "buffer norm.running_mean value"),
    "training": (lambda m: m.norm.eval(), "training norm"),
    "a hook": (lambda m: m.register_forward_hook(lambda *_: None), "_forward_hooks"),
    "a hook of a tensor": (lambda m: m.head.weight.register_hook(lambda g: g), "hooks"),
    "an attribute": (lambda m: setattr(m.stem, "stride", (2, 2)), "stride"),
    "a new attribute": (lambda m: setattr(m, "extra", 1), "extra"),
    "a method of the instance": (lambda m: setattr(m, "forward", lambda x: x), "forward"),
    "a child": (lambda m: setattr(m, "head", nn.Linear(4, 3)), "module head"),
    "a type": (lambda m: m.to(torch.float32), "value"),
}


def _buffer(model: CNN) -> Tensor:
    mean = model.norm.running_mean
    assert mean is not None
    return mean


@pytest.mark.parametrize("harm", list(HARMS))
def test_the_census_sees(harm: str) -> None:
    model = CNN().double()
    before = census(model)
    assert changes(before, census(model), rng=True) == []
    do, name = HARMS[harm]
    do(model)
    assert any(name in fact for fact in changes(before, census(model))), changes(before, census(model))


# BatchNorm: the statistics move in the adapted copy, and travel with the adapter.


def trained_cnn(model: nn.Module) -> tuple[gf.AdaptedModel, Tensor]:
    adapted = gf.adapt(model, gf.LoRA(rank=2, init="random")).train()
    (x,), _ = BY_NAME["cnn"].call()
    for _ in range(3):
        adapted(x)
    return adapted.eval(), x


STATISTICS = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def test_batchnorm_moves_only_the_adapted_statistics() -> None:
    model = BY_NAME["cnn"].model()
    reference = BY_NAME["cnn"].model().train()
    fresh = gf.adapt(model, gf.LoRA(rank=2)).train()
    assert not set(STATISTICS) & set(fresh.adapter_state_dict())
    with unchanged(model):
        (x,), _ = BY_NAME["cnn"].call()
        reference(x)
        fresh(x)
    state = fresh.adapter_state_dict()
    for name in STATISTICS:
        assert torch.allclose(state[name], reference.get_buffer(name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["with_adapter", "load", "pickle", "deepcopy", "state_dict", "merge"])
def test_batchnorm_statistics_travel_with_the_adapter(way: str) -> None:
    model = BY_NAME["cnn"].model()
    adapted, x = trained_cnn(model)
    state = adapted.adapter_state_dict()
    assert set(STATISTICS) <= set(state)
    fresh = gf.adapt(model, gf.LoRA(rank=2)).eval()
    made: Any = None
    if way == "with_adapter":
        made = fresh.with_adapter(state)
    elif way == "load":
        fresh.load_adapter_state_dict(state)
        made = fresh
    elif way == "pickle":
        made = pickle.loads(pickle.dumps(adapted))
    elif way == "deepcopy":
        made = copy.deepcopy(adapted)
    elif way == "state_dict":
        fresh.load_state_dict(adapted.state_dict())
        made = fresh
    else:
        made = adapted.merge()
    assert torch.allclose(made.eval()(x), adapted(x), rtol=0, atol=1e-12)
    kept = {name: tensor.clone() for name, tensor in adapted.adapter_state_dict().items()}
    made.train()(x)
    assert all(torch.equal(kept[name], tensor) for name, tensor in adapted.adapter_state_dict().items()), "shared statistics"


def test_a_state_without_statistics_restores_those_of_the_base() -> None:
    model = BY_NAME["cnn"].model().eval()
    adapted, x = trained_cnn(model)
    state = gf.adapt(model, gf.LoRA(rank=2)).adapter_state_dict()
    wanted = model(x)
    assert torch.allclose(adapted.with_adapter(state)(x), wanted, rtol=0, atol=1e-12)
    adapted.load_adapter_state_dict(state)
    assert torch.allclose(adapted(x), wanted, rtol=0, atol=1e-12)


def test_two_adapters_of_one_base_do_not_share_statistics() -> None:
    model = BY_NAME["cnn"].model()
    a, x = trained_cnn(model)
    b = gf.adapt(model, gf.LoRA(rank=2))
    c = a.with_adapter(a.adapter_state_dict())
    state = {name: tensor.clone() for name, tensor in a.adapter_state_dict().items()}
    b.train()(x)
    c.train()(x)
    assert all(torch.equal(state[name], tensor) for name, tensor in a.adapter_state_dict().items())


def test_the_users_model_moving_its_statistics_moves_nobody_elses() -> None:
    model = BY_NAME["cnn"].model()
    adapted = gf.adapt(model, gf.LoRA(rank=2)).eval()
    (x,), _ = BY_NAME["cnn"].call()
    wanted = adapted(x)
    model.train()(x)
    assert torch.equal(adapted(x), wanted)
    assert torch.equal(adapted.base(x), gf.adapt(BY_NAME["cnn"].model(), gf.LoRA(rank=2)).eval()(x))
    assert not set(STATISTICS) & set(adapted.adapter_state_dict())


def test_a_pure_call_in_training_leaves_even_the_adapted_statistics() -> None:
    adapted, x = trained_cnn(BY_NAME["cnn"].model())
    adapted.train()
    before = {name: tensor.clone() for name, tensor in adapted.adapter_state_dict().items()}
    gf.functional_call(adapted, dict(adapted.named_trainable_parameters()), (x,))
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.adapter_state_dict().items())
    buffers = {name: before[name].clone() for name in STATISTICS}
    gf.functional_call(adapted, [dict(adapted.named_trainable_parameters()), buffers], (x,))
    assert all(not torch.equal(before[name], buffers[name]) for name in STATISTICS)


class Counter(nn.Module):
    """Counts its calls in a buffer, in training or not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("count").add_(1)
        out: Tensor = self.linear(x)
        return out


@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_that_every_call_writes_to(training: bool) -> None:
    model = Counter().train(training)
    x = torch.ones(1, 3)
    with unchanged(model):
        adapted = gf.adapt(model, gf.LoRA(rank=1))
        adapted(x)
        adapted.base(x)
        gf.functional_call(adapted, dict(adapted.adapter.items()), (x,))
        assert adapted.adapter_state_dict()["count"] == 1
        assert adapted.merge().get_buffer("count") == 1
        assert adapted.with_adapter(adapted.adapter_state_dict()).adapter_state_dict()["count"] == 1
        adapted.base(x)
    fresh = gf.adapt(model, gf.LoRA(rank=1))
    assert "count" not in fresh.adapter_state_dict()


def test_the_base_view_keeps_the_statistics_it_came_with() -> None:
    row = BY_NAME["cnn"]
    model = row.model().eval()
    adapted, x = trained_cnn(model)
    wanted = flat(model(x))
    adapted.train()
    adapted.base(x)
    adapted.eval()
    assert torch.equal(flat(adapted.base(x)), wanted)


def test_methods_table_is_complete() -> None:
    assert set(METHODS) == {"lora", "svdiff", "full"}
