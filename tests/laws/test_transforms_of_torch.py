"""An adapter is data: differentiated, batched, stacked and compiled like any other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.models import BY_NAME, Row, assert_close, flat, loss_of, pairs, rows, shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import gift_func as gf

Params = dict[str, Tensor]

# Their declared results have a third part, which only has_aux=True adds.
_jvp: Callable[..., Any] = jvp
_vjp: Callable[..., Any] = vjp

VMAPPED = tuple(row.name for row in BY_NAME.values() if row.vmaps)
FEW = ("mlp", "cnn", "mha", "llama")


def params_of(adapted: gf.AdaptedModel) -> Params:
    return {name: p.detach().clone() for name, p in adapted.adapter.items()}


def several(row: Row, method: str, count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[gf.AdaptedModel, list[Params]]:
    """An adapted model in eval, and the tensors of several adapters for it."""
    adapted = row.adapt(row.model(dtype), method).eval()
    return adapted, [params_of(shake(copy.deepcopy(adapted), seed)) for seed in range(count)]


def stacked(many: list[Params]) -> Params:
    return {name: torch.stack([params[name] for params in many]) for name in many[0]}


def loss_function(adapted: gf.AdaptedModel, row: Row) -> Callable[[Params], Tensor]:
    args, kwargs = row.call(next(adapted.parameters()).dtype)
    return lambda params: loss_of(gf.functional_call(adapted, params, args, kwargs))


def compare(found: Params, wanted: Params, what: str = "") -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, what=f"{what} {name}")


@pairs()
def test_grad_equals_backward(row: Row, method: str) -> None:
    adapted, (params,) = several(row, method, 1)
    found, value = grad_and_value(loss_function(adapted, row))(params)
    adapted.load_adapter_state_dict(params)
    args, kwargs = row.call()
    loss = loss_of(adapted(*args, **kwargs))
    loss.backward()
    assert_close(value.detach(), loss.detach())
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in adapted.adapter.items()}
    compare(found, wanted)


@pairs(*VMAPPED)
def test_vmap_over_adapters_equals_the_loop(row: Row, method: str) -> None:
    adapted, many = several(row, method)
    loss = loss_function(adapted, row)
    found = vmap(loss)(stacked(many))
    assert_close(found, torch.stack([loss(params) for params in many]))
    compare(vmap(grad(loss))(stacked(many)), stacked([grad(loss)(params) for params in many]))


PER_SAMPLE = ("mlp", "cnn", "conv1d", "conv_transpose1d", "mha", "encoder", "tied", "vit", "bert", "llama", "gpt2")


@pairs(*PER_SAMPLE)
def test_gradients_per_sample_equal_the_loop(row: Row, method: str) -> None:
    adapted, (params,) = several(row, method, 1)
    args, kwargs = row.call()
    kwargs.pop("attention_mask", None)  # transformers looks whether it masks anything at all
    batched = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}

    def loss(params: Params, args: Any, batched: Any) -> Tensor:
        alone = {name: value[None] for name, value in batched.items()}
        return loss_of(gf.functional_call(adapted, params, tuple(a[None] for a in args), {**alone, **rest}))

    found = vmap(grad(loss), (None, 0, 0))(params, args, batched)
    count = next(iter([*args, *batched.values()])).shape[0]
    each = [grad(loss)(params, tuple(a[i] for a in args), {n: v[i] for n, v in batched.items()}) for i in range(count)]
    compare(found, stacked(each))


@pairs("mlp", "cnn", "mha", "llama")
def test_vmap_over_some_tensors_and_over_the_input(row: Row, method: str) -> None:
    adapted, many = several(row, method, 2)
    args, kwargs = row.call()
    first = next(iter(many[0]))
    mixed = {**many[0], first: torch.stack([params[first] for params in many])}
    dims = {name: 0 if name == first else None for name in mixed}
    found = vmap(lambda params: flat(gf.functional_call(adapted, params, args, kwargs)), (dims,))(mixed)
    each = [flat(gf.functional_call(adapted, {**many[0], first: params[first]}, args, kwargs)) for params in many]
    assert_close(found, torch.stack(each))
    partial = vmap(lambda tensor: flat(gf.functional_call(adapted, {first: tensor}, args, kwargs)))(mixed[first])
    own = [flat(gf.functional_call(adapted, {first: params[first]}, args, kwargs)) for params in many]
    assert_close(partial, torch.stack(own))


@pairs("mlp", "cnn", "mha", "experts", "named", "bert")
def test_forward_mode_equals_reverse_mode_and_differences(row: Row, method: str) -> None:
    adapted, many = several(row, method, 2)
    params, direction = many
    loss = loss_function(adapted, row)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels have no forward mode
        value, tangent = _jvp(loss, (params,), (direction,))
        gradient = grad(loss)(params)
    assert_close(value, loss(params))
    assert_close(tangent, torch.stack([(gradient[n] * direction[n]).sum() for n in params]).sum())
    step = {n: params[n] + 1e-6 * direction[n] for n in params}, {n: params[n] - 1e-6 * direction[n] for n in params}
    assert_close((loss(step[0]) - loss(step[1])) / 2e-6, tangent, tolerance=1e-6)


@pairs("linear", "mlp", "mha")
def test_jacobians_agree(row: Row, method: str) -> None:
    adapted, (params,) = several(row, method, 1)
    args, kwargs = row.call()

    def output(params: Params) -> Tensor:
        return flat(gf.functional_call(adapted, params, args, kwargs))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        reverse, forward = jacrev(output)(params), jacfwd(output)(params)
    compare(reverse, forward)
    out, pull = _vjp(output, params)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype)
    compare(pull(seed)[0], {name: torch.tensordot(seed, j, 1) for name, j in reverse.items()})


@pytest.mark.parametrize("method", ["lora", "svdiff", "full"])
def test_hessian_is_symmetric_and_the_jacobian_of_the_gradient(method: str) -> None:
    row = BY_NAME["linear"]
    adapted, (params,) = several(row, method, 1)
    inner = loss_function(adapted, row)

    def loss(params: Params) -> Tensor:
        return torch.tanh(inner(params))

    found = hessian(loss)(params)
    wanted = jacrev(grad(loss))(params)
    for a in params:
        for b in params:
            assert_close(found[a][b], wanted[a][b])
            rank = params[a].ndim
            turned = found[b][a].permute(*range(params[b].ndim, params[b].ndim + rank), *range(params[b].ndim))
            assert_close(found[a][b], turned)
    assert max(tensor.abs().max().item() for row_ in found.values() for tensor in row_.values()) > 1e-3


@pairs("mlp", "cnn", "mha", "encoder", "tied", "named", "shared", "llama")
def test_stack_module_state_and_functional_call(row: Row, method: str) -> None:
    adapted, many = several(row, method)
    models = [adapted.with_adapter(params).eval() for params in many]
    args, kwargs = row.call()
    params, buffers = torch.func.stack_module_state(models)
    assert all(parameter.requires_grad for parameter in params.values())

    def call(params: Params, buffers: Params) -> Tensor:
        return flat(torch.func.functional_call(adapted, (params, buffers), args, kwargs))

    found = vmap(call)(params, buffers)
    wanted = torch.stack([flat(model(*args, **kwargs)) for model in models])
    assert_close(found.detach(), wanted.detach())
    found.square().sum().backward()
    wanted.square().sum().backward()
    named = [dict(model.named_parameters()) for model in models]
    for name, parameter in params.items():
        assert parameter.grad is not None
        grads = [model[name].grad for model in named]
        expected = torch.stack([torch.zeros_like(parameter[0]) if g is None else g for g in grads])
        assert_close(parameter.grad, expected, what=name)
    assert all(parameter.grad is None for parameter in adapted.parameters())


@rows("mlp", "llama", "cnn", "tied", "named", "experts")
def test_names_of_named_parameters_are_understood(row: Row) -> None:
    adapted, (params,) = several(row, "lora", 1)
    args, kwargs = row.call()
    tree = {f"adapter.{name}": None for name, _ in adapted.adapter.named_parameters()}
    assert list(dict(adapted.named_parameters())) == list(tree)
    adapted.load_adapter_state_dict(params)
    named = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    wanted = flat(adapted(*args, **kwargs))
    shake(adapted)
    assert_close(flat(gf.functional_call(adapted, named, args, kwargs)), wanted)
    assert_close(flat(torch.func.functional_call(adapted, named, args, kwargs)), wanted)


def test_args_may_be_a_single_one_as_in_torch() -> None:
    row = BY_NAME["mlp"]
    adapted, (params,) = several(row, "lora", 1)
    (x,), _ = row.call()
    wanted = gf.functional_call(adapted, params, (x,))
    assert torch.equal(gf.functional_call(adapted, params, x), wanted)
    assert torch.equal(gf.functional_call(adapted, params, None, {"x": x}), wanted)
    assert torch.equal(gf.functional_call(adapted, [params], x), wanted)
    halves = [dict(list(params.items())[:2]), dict(list(params.items())[2:])]
    assert torch.equal(gf.functional_call(adapted, halves, x), wanted)
    assert torch.equal(gf.functional_call(adapted, params, x, strict=True), wanted)


def test_ensembles_of_seeds_differ_and_nested_transforms_work() -> None:
    row = BY_NAME["mlp"]
    adapted, many = several(row, "lora", 4)
    loss = loss_function(adapted, row)
    deep = vmap(vmap(loss))({name: t.reshape(2, 2, *t.shape[1:]) for name, t in stacked(many).items()})
    assert_close(deep.reshape(-1), vmap(loss)(stacked(many)))
    assert deep.unique().numel() == 4
    inner = grad(lambda params: sum(g.square().sum() for g in grad(loss)(params).values()))(many[0])
    assert all(tensor.isfinite().all() for tensor in inner.values())


def test_input_gradients_pass_through() -> None:
    row = BY_NAME["mlp"]
    adapted, (params,) = several(row, "lora", 1)
    (x,), _ = row.call()
    found = grad(lambda x: loss_of(gf.functional_call(adapted, params, (x,))))(x)
    merged = adapted.with_adapter(params).merge()
    assert_close(found, grad(lambda x: loss_of(merged(x)))(x))


# torch.compile. One graph for several adapters; aot_eager traces all that inductor would and does not wait for a C++ compiler.


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = ("mlp", "cnn", "mha", "encoder", "experts", "tied", "embedding", "llama", "gpt2", "bert")


@pairs(*COMPILED, brief=True)
def test_compiled_forward_is_one_graph_for_several_adapters(row: Row, method: str) -> None:
    adapted, many = several(row, method, dtype=torch.float32)
    args, kwargs = row.call(torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(
        lambda params: flat(gf.functional_call(adapted, params, args, kwargs)), fullgraph=True, backend=counter, dynamic=False
    )
    for params in many:
        assert_close(compiled(params), flat(gf.functional_call(adapted, params, args, kwargs)))
    assert counter.frame_count == 1


@pairs("mlp", "cnn", "mha", "encoder", "tied", "llama", brief=True)
def test_the_compiled_module_is_one_graph_and_trains(row: Row, method: str) -> None:
    adapted, many = several(row, method, dtype=torch.float32)
    args, kwargs = row.call(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adapted, fullgraph=True, backend=counter, dynamic=False)
    for params in many:
        adapted.load_adapter_state_dict(params)
        found, wanted = flat(compiled(*args, **kwargs)), flat(adapted(*args, **kwargs))
        assert_close(found.detach(), wanted.detach())
        parameters = list(adapted.parameters())
        found_grads = torch.autograd.grad(loss_of(found), parameters, allow_unused=True, materialize_grads=True)
        wanted_grads = torch.autograd.grad(loss_of(wanted), parameters, allow_unused=True, materialize_grads=True)
        for found_grad, wanted_grad in zip(found_grads, wanted_grads, strict=True):
            assert_close(found_grad, wanted_grad)
    assert counter.frame_count == 1
    with torch.no_grad():
        assert_close(flat(compiled(*args, **kwargs)), flat(adapted(*args, **kwargs)))


@pairs("mlp", "cnn", "mha", "llama", brief=True)
def test_a_compiled_functional_training_step(row: Row, method: str) -> None:
    adapted, many = several(row, method, dtype=torch.float32)
    loss = loss_function(adapted, row)
    counter = CompileCounterWithBackend("aot_eager")

    def step(params: Params) -> tuple[Params, Tensor]:
        grads, value = grad_and_value(loss)(params)
        return {name: p - 0.01 * grads[name] for name, p in params.items()}, value

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=False)
    for params in many:
        found, value = compiled(params)
        wanted, wanted_value = step(params)
        assert_close(value, wanted_value)
        compare(found, wanted)
    assert counter.frame_count == 1


@pairs("mlp", "cnn", "mha", "llama", brief=True)
def test_a_compiled_vmap_of_gradients(row: Row, method: str) -> None:
    adapted, many = several(row, method, dtype=torch.float32)
    each = vmap(grad(loss_function(adapted, row)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(each, fullgraph=True, backend=counter, dynamic=False)
    compare(compiled(stacked(many)), each(stacked(many)))
    compare(compiled(stacked(many[::-1])), each(stacked(many[::-1])))
    assert counter.frame_count == 1


def test_compiled_batchnorm_training_writes_the_same_statistics() -> None:
    row = BY_NAME["cnn"]
    args, kwargs = row.call(torch.float32)
    eager, traced = (row.adapt(row.model(torch.float32), "lora").train() for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        eager(*args, **kwargs)
        compiled(*args, **kwargs)
    wanted = eager.adapter_state_dict()
    found = traced.adapter_state_dict()
    assert "norm.running_mean" in wanted
    compare({n: t.float() for n, t in found.items()}, {n: t.float() for n, t in wanted.items()})


@pytest.mark.slow
@rows("mlp", "cnn", "mha", "llama")
def test_inductor_agrees(row: Row) -> None:
    adapted, many = several(row, "lora", dtype=torch.float32)
    loss = loss_function(adapted, row)
    args, kwargs = row.call(torch.float32)
    adapted.load_adapter_state_dict(many[0])
    compiled = torch.compile(adapted, fullgraph=True)
    found, wanted = flat(compiled(*args, **kwargs)), flat(adapted(*args, **kwargs))
    assert_close(found.detach(), wanted.detach())
    grads = torch.autograd.grad(loss_of(found), list(adapted.parameters()))
    for a, b in zip(grads, torch.autograd.grad(loss_of(wanted), list(adapted.parameters())), strict=True):
        assert_close(a, b)
    step = torch.compile(grad_and_value(loss), fullgraph=True)
    compare(step(many[1])[0], grad(loss)(many[1]))
    each = torch.compile(vmap(grad(loss)), fullgraph=True)
    compare(each(stacked(many)), vmap(grad(loss))(stacked(many)))


def test_inductor_agrees_on_the_smallest_model() -> None:
    row = BY_NAME["mlp"]
    adapted, many = several(row, "lora", dtype=torch.float32)
    (x,), _ = row.call(torch.float32)
    compiled = torch.compile(lambda params, x: gf.functional_call(adapted, params, (x,)), fullgraph=True)
    for params in many:
        assert_close(compiled(params, x), gf.functional_call(adapted, params, (x,)))


def test_adapters_of_one_shape_and_another_scale_share_a_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).double()
    adapted = gf.adapt(model, gf.LoRA(rank=2, alpha=1, init="random"))
    doubled = gf.adapt(model, gf.LoRA(rank=2, alpha=2, init="random")).with_adapter(adapted.adapter_state_dict())
    x = torch.ones(1, 4, dtype=torch.float64)
    assert_close(doubled(x) - model(x), 2 * (adapted(x) - model(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize(
    "method",
    [
        gf.DoRA(rank=2), gf.HiRA(rank=2), gf.LoHa(rank=2), gf.LoKr(rank=2), gf.IA3(), gf.OFT(block_size=4), gf.BOFT(),
        gf.HRA(rank=2), gf.SVDiff(), gf.FourierFT(n_frequency=7), gf.C3A(block_size=4), gf.MiSS(rank=2),
    ],
    ids=str,
)  # fmt: skip
def test_inductor_agrees_on_every_kind_of_weight(method: gf.Method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    adapted = gf.adapt(model, method)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, 8)
    compiled = torch.compile(lambda params, x: gf.functional_call(adapted, params, (x,)), fullgraph=True)
    params = dict(adapted.named_trainable_parameters())
    found, wanted = compiled(params, x), adapted(x)
    assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), list(params.values())) for y in (found, wanted)), strict=True):
        assert_close(a, b, tolerance=1e-4)
