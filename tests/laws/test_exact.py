"""Every model, by every method: the adapted network is the network with dense W + ΔW, to the last digits, gradients too."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.models import (
    BY_NAME,
    METHODS,
    ROWS,
    Inputs,
    Row,
    assert_close,
    dense_of,
    flat,
    loss_of,
    mixtral,
    pairs,
    rows,
    run_dense,
    shake,
)
from torch import Tensor, nn

import gift_func as gf

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def leaves_of(adapted: gf.AdaptedModel) -> dict[str, Tensor]:
    """Copies of the adapter's tensors to differentiate by."""
    return {name: p.detach().clone().requires_grad_() for name, p in adapted.adapter.items()}


def with_gradient(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """The inputs with those that can requiring grad, and the list of them."""
    made = [t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs[0]]
    return (tuple(made), inputs[1]), [t for t in made if isinstance(t, Tensor) and t.requires_grad]


def gradients(output: Any, leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of a loss of the output, zeros where there is none."""
    return list(torch.autograd.grad(loss_of(output), leaves, allow_unused=True, materialize_grads=True))


@DTYPES
@pairs()
def test_forward_and_gradients_equal_the_dense_reference(row: Row, method: str, dtype: torch.dtype) -> None:
    adapted = shake(row.adapt(row.model(dtype), method, rank=4 if row.name in ("mlp", "llama", "cnn") else 2)).train()
    leaves = leaves_of(adapted)
    inputs, wanted_inputs = with_gradient(row.call(dtype))
    params = dense_of(row.model(dtype), METHODS[method](len_rank(adapted)), leaves)
    wanted, reference = run_dense(row, params, inputs, training=True)
    wanted_grads = gradients(wanted, [*leaves.values(), *wanted_inputs])
    assert any(gradient.abs().max() > 1e-3 for gradient in wanted_grads), "the reference itself has no gradient"

    inputs, found_inputs = with_gradient(row.call(dtype))
    found = adapted(*inputs[0], **inputs[1])
    assert type(found) is type(wanted)
    found_grads = gradients(found, [*adapted.adapter.values(), *found_inputs])

    assert_close(flat(found), flat(wanted), what="forward")
    for name, gradient, reference_gradient in zip([*leaves, "x", "y", "z"], found_grads, wanted_grads, strict=False):
        assert_close(gradient, reference_gradient, what=f"gradient of {name}")
    assert len(found_grads) == len(wanted_grads)
    own = dict(adapted.copy_pool.module.named_buffers())
    for name, buffer in reference.named_buffers():
        if buffer.is_floating_point():
            assert_close(own[name], buffer, what=f"buffer {name}")
        else:
            assert torch.equal(own[name], buffer), name


def len_rank(adapted: gf.AdaptedModel) -> int:
    """The rank that the adapter's LoRA parts have, or 1."""
    method = adapted.adapted_parameters[0].method
    return method.rank if isinstance(method, gf.LoRA) else 1


@DTYPES
@pairs()
def test_eval_without_gradients_equals_the_dense_reference(row: Row, method: str, dtype: torch.dtype) -> None:
    adapted = shake(row.adapt(row.model(dtype), method)).eval()
    inputs = row.call(dtype)
    with torch.no_grad():
        params = dense_of(row.model(dtype), METHODS[method](len_rank(adapted)), dict(adapted.adapter.items()))
        wanted, _ = run_dense(row, params, inputs)
        found = adapted(*inputs[0], **inputs[1])
        state = adapted.adapter_state_dict()
        pure = gf.functional_call(adapted, state, *inputs)
        plain = torch.func.functional_call(adapted, dict(adapted.named_parameters()), *inputs)
    assert_close(flat(found), flat(wanted), what="adapted")
    assert_close(flat(pure), flat(wanted), what="gf.functional_call")
    assert_close(flat(plain), flat(wanted), what="torch.func.functional_call")


@pairs()
def test_pure_call_in_training_equals_the_dense_reference(row: Row, method: str) -> None:
    adapted = row.adapt(row.model(), method).train()
    other = shake(row.adapt(row.model(), method), seed=5)
    leaves = leaves_of(other)
    inputs = row.call()
    wanted, _ = run_dense(row, dense_of(row.model(), METHODS[method](len_rank(adapted)), leaves), inputs, training=True)
    wanted_grads = gradients(wanted, list(leaves.values()))
    leaves = leaves_of(other)
    found = gf.functional_call(adapted, leaves, *inputs)
    found_grads = gradients(found, list(leaves.values()))
    assert_close(flat(found), flat(wanted), what="forward")
    for name, gradient, reference in zip(leaves, found_grads, wanted_grads, strict=True):
        assert_close(gradient, reference, what=f"gradient of {name}")


ENCODERS = (*(row.name for row in ROWS if "encoder" in row.name), "transformer", "bert", "cnn")


@pairs(*ENCODERS)
def test_eval_with_gradients_equals_the_dense_reference(row: Row, method: str) -> None:
    # Whether torch takes its fused kernels depends on who requires grad, and on the first layer alone.
    adapted = shake(row.adapt(row.model(), method)).eval()
    leaves = leaves_of(adapted)
    inputs = row.call()
    wanted, _ = run_dense(row, dense_of(row.model(), METHODS[method](len_rank(adapted)), leaves), inputs)
    wanted_grads = gradients(wanted, list(leaves.values()))
    found = adapted(*inputs[0], **inputs[1])
    assert_close(flat(found), flat(wanted), what="forward")
    for name, gradient, reference in zip(leaves, gradients(found, list(adapted.adapter.values())), wanted_grads, strict=True):
        assert_close(gradient, reference, what=f"gradient of {name}")


@pairs()
def test_merge_equals_the_adapted_model(row: Row, method: str) -> None:
    adapted = shake(row.adapt(row.model(), method)).eval()
    args, kwargs = row.call()
    with torch.no_grad():
        adapted(*args, **kwargs)  # an Embedding with max_norm scales what it reads, once
    before = {name: tensor.clone() for name, tensor in adapted.adapter_state_dict().items()}
    merged = adapted.merge()
    assert not any(type(module).__module__.startswith("gift_func") for module in merged.modules())
    assert all(type(tensor) in (nn.Parameter, Tensor) for tensor in [*merged.parameters(), *merged.buffers()])
    assert merged.state_dict().keys() == row.model().state_dict().keys()
    with torch.no_grad():
        assert_close(flat(merged(*args, **kwargs)), flat(adapted(*args, **kwargs)), what="merged")
    for name, tensor in adapted.adapter_state_dict().items():
        assert torch.equal(tensor, before[name]), f"merge changed {name}"
    adapted_names = {part.name for part in adapted.adapted_parameters}
    originals = dict(row.model().named_parameters())
    for name, parameter in merged.named_parameters():
        assert parameter.requires_grad == originals[name].requires_grad
        same = torch.equal(parameter, originals[name])
        assert same == (name not in adapted_names), f"{name} {'unchanged' if same else 'changed'} by merge"


@rows()
def test_a_fresh_adapter_is_the_identity(row: Row) -> None:
    inputs = row.call()
    with torch.no_grad():
        wanted = flat(row.model().train()(*inputs[0], **inputs[1]))
        for method in (gf.LoRA(rank=2), gf.Full()):
            where = row.where if isinstance(method, gf.Full) else row.strategy("lora").rules[0][0]
            adapted = gf.adapt(row.model().train(), gf.Strategy([(where, method)]))
            found = flat(adapted(*inputs[0], **inputs[1]))
            assert_close(found, wanted, tolerance=1e-14, what=str(method))
            # Of a packed in_proj_weight each part is multiplied on its own, which rounds otherwise.
            packed = any(isinstance(module, nn.MultiheadAttention) for module in row.model().modules())
            assert packed or torch.equal(found, wanted), method
            assert_close(flat(adapted.base(*inputs[0], **inputs[1])), wanted, what="base")
        adapted = row.adapt(row.model().train(), "svdiff")
        assert_close(flat(adapted(*inputs[0], **inputs[1])), wanted, what="svdiff")


@pytest.mark.parametrize("method", list(METHODS))
def test_experts_as_transformers_runs_them_by_default(method: str) -> None:
    # The grouped kernel takes no float64, so the dense reference is the merged model.
    row = dataclasses.replace(BY_NAME["mixtral"], build=lambda: mixtral("grouped_mm"))
    adapted = shake(row.adapt(row.model(torch.float32), method))
    merged = adapted.merge()
    args, kwargs = row.call(torch.float32)
    found, wanted = adapted(*args, **kwargs).logits, merged(*args, **kwargs).logits
    assert_close(found, wanted)
    loss_of(found).backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters())


def test_the_table_names_each_model_once() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


LAYOUTS: list[tuple[str, str, gf.Method]] = [
    ("cnn", "balanced", gf.LoRA(rank=2, alpha=3, init="random", conv="balanced")),
    ("conv1d", "balanced", gf.LoRA(rank=2, init="random", conv="balanced")),
    ("conv3d", "balanced", gf.LoRA(rank=2, init="random", conv="balanced")),
    ("conv_transpose2d", "balanced", gf.LoRA(rank=2, init="random", conv="balanced")),
    ("cnn", "rows", gf.SVDiff(conv="rows")),
    ("conv3d", "rows", gf.SVDiff(conv="rows")),
    ("mlp", "rslora", gf.LoRA(rank=4, alpha=3, rslora=True, init="random")),
    ("mlp", "rank_above_size", gf.LoRA(rank=16, init="random")),
    ("mlp", "rank_one", gf.LoRA(rank=1, alpha=0.5, init="random")),
    ("llama", "gaussian", gf.LoRA(rank=2, init="gaussian")),
    ("cnn", "orthogonal", gf.LoRA(rank=2, init="orthogonal")),
]


@pytest.mark.parametrize(("name", "method"), [(n, m) for n, _, m in LAYOUTS], ids=[f"{n}-{i}" for n, i, _ in LAYOUTS])
def test_options_of_the_methods(name: str, method: gf.Method) -> None:
    row = next(row for row in ROWS if row.name == name)
    strategy = gf.Strategy([(row.strategy("lora").rules[0][0], method)])
    adapted = shake(gf.adapt(row.model(), strategy)).train()
    leaves = leaves_of(adapted)
    inputs = row.call()
    wanted, _ = run_dense(row, dense_of(row.model(), method, leaves), inputs, training=True)
    wanted_grads = gradients(wanted, list(leaves.values()))
    found = adapted(*inputs[0], **inputs[1])
    assert_close(flat(found), flat(wanted), what="forward")
    for name, gradient, reference in zip(leaves, gradients(found, list(adapted.adapter.values())), wanted_grads, strict=True):
        assert_close(gradient, reference, what=f"gradient of {name}")


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_inits_that_promise_to_start_at_the_base_do(init: Any) -> None:
    row = next(row for row in ROWS if row.name == "cnn")
    args, kwargs = row.call()
    model = row.model().eval()
    adapted = gf.adapt(model, gf.LoRA(rank=4, init=init))
    assert_close(flat(adapted(*args, **kwargs)), flat(model(*args, **kwargs)), what=init)
    assert any(bool(p.abs().max() > 0) for name, p in adapted.adapter.items() if name.endswith("lora_A"))
    nonzero = [bool(p.abs().max() > 0) for name, p in adapted.adapter.items() if name.endswith("lora_B")]
    assert all(nonzero) if init == "orthogonal" else not any(nonzero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "cnn", "llama", "mha", "encoder_padded"])
def test_half_precision_stays_half_and_near_the_dense_reference(name: str, dtype: torch.dtype) -> None:
    row = next(row for row in ROWS if row.name == name)
    adapted = row.adapt(row.model(dtype), "lora").eval()
    args, kwargs = row.call(dtype)
    with torch.no_grad():
        found = flat(adapted(*args, **kwargs))
        wide = {name: p.detach().double() for name, p in adapted.adapter.items()}
        base = row.model(dtype).double()
        params = dense_of(base, METHODS["lora"](2), wide)
        wanted, _ = run_dense(row, params, row.call(torch.float64))
    assert found.dtype == dtype
    assert_close(found.double(), flat(wanted), tolerance=0.05, what="half")
    assert {p.dtype for p in adapted.adapter.values()} == {dtype}
