"""Gradient checkpointing runs parts of the network after the call: the weights of that call must be there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gift_func as gf

Run = Callable[[gf.AdaptedModel, dict[str, Tensor], Tensor], Tensor]


class Checkpointed(nn.Module):
    """Two blocks under a checkpoint of either kind, or none."""

    def __init__(self, kind: bool | None) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)) for _ in range(2))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.kind is None else checkpoint(block, x, use_reentrant=self.kind)
        out: Tensor = self.last(x)
        return out


RULES = {"first": gf.LoRA(rank=2, init="random"), "blocks.*": gf.LoRA(rank=2, init="random"), "*.bias": gf.Full()}
RUNS: dict[str, Run] = {
    "call": lambda adapted, params, x: adapted(x),
    "functional_call": lambda adapted, params, x: gf.functional_call(adapted, params, (x,)),
    "torch.func": lambda adapted, params, x: torch.func.functional_call(
        adapted, {f"adapter.{name}": tensor for name, tensor in params.items()}, (x,)
    ),
}


def models(kind: bool | None) -> tuple[gf.AdaptedModel, gf.AdaptedModel]:
    """The same adapted network with and without checkpoints."""
    torch.manual_seed(0)
    plain = Checkpointed(None).double()
    other = Checkpointed(kind).double()
    other.load_state_dict(plain.state_dict())
    reference = gf.adapt(plain, RULES)
    adapted = gf.adapt(other, RULES).with_adapter(reference.adapter_state_dict())
    return reference, adapted


def gradients(run: Run, adapted: gf.AdaptedModel, x: Tensor, scale: float = 1.0) -> list[Tensor]:
    params = {name: (p * scale).detach().requires_grad_() for name, p in adapted.adapter.items()}
    if run is RUNS["call"]:
        params = dict(adapted.adapter.items())
    loss = run(adapted, params, x).square().sum()
    loss.backward()
    found = [p.grad for p in params.values()]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_gradients_are_those_without_checkpoints(run: Run, kind: bool) -> None:
    reference, adapted = models(kind)
    x = torch.randn(5, 4, dtype=torch.float64)
    for expected, found in zip(gradients(run, reference, x), gradients(run, adapted, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
def test_calls_in_flight_do_not_disturb_each_other(kind: bool) -> None:
    reference, adapted = models(kind)
    x = torch.randn(5, 4, dtype=torch.float64)
    scales = [1.0, 2.0, -0.5]
    sets = [{n: (p * s).detach().requires_grad_() for n, p in adapted.adapter.items()} for s in scales]
    losses = [gf.functional_call(adapted, params, (x,)).square().sum() for params in sets]
    own = adapted(x).square().sum()
    for loss in reversed(losses):
        loss.backward()
    own.backward()
    for scale, params in zip(scales, sets, strict=True):
        expected = gradients(RUNS["functional_call"], reference, x, scale)
        for tensor, want in zip(params.values(), expected, strict=True):
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, want, rtol=0, atol=1e-12)
    for parameter, want in zip(adapted.parameters(), gradients(RUNS["call"], reference, x), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=1e-12)


def test_a_copy_that_met_no_checkpoint_is_used_again() -> None:
    reference, adapted = models(False)
    x = torch.randn(5, 4, dtype=torch.float64)
    gf.functional_call(reference, {}, (x,))
    gf.functional_call(reference, {}, (x,))
    assert len(reference.copy_pool._spare) == 1
    gf.functional_call(adapted, {}, (x,))
    assert not adapted.copy_pool._spare


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_reentrant_checkpoint_that_would_drop_gradients_is_an_error(run: Run) -> None:
    model = nn.Sequential(nn.Linear(4, 4))

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=True)
            return out

    adapted = gf.adapt(Reentrant(), gf.LoRA(rank=1))
    params = {name: p.detach().clone().requires_grad_() for name, p in adapted.adapter.items()}
    with pytest.raises(gf.CheckpointError, match=r"use_reentrant=False"):
        run(adapted, params, torch.randn(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    run(adapted, params, x).sum().backward()
    with torch.no_grad():
        run(adapted, params, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("method", [gf.Full(), gf.LoRA(rank=1)], ids=["Full", "LoRA"])
@pytest.mark.parametrize("kind", ["linear", "lstm", "norm", "keyword"])
def test_it_is_noticed_in_every_kind_of_layer(kind: str, method: gf.Method) -> None:
    class Keyword(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, weight=self.weight, bias=self.bias)

    layers = {"linear": nn.Linear(4, 4), "lstm": nn.LSTM(4, 4), "norm": nn.LayerNorm(4), "keyword": Keyword(4, 4)}
    if kind == "norm" and isinstance(method, gf.LoRA):
        method = gf.NormTuning()

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layers[kind]

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(checkpoint(lambda t: nn.Module.__call__(self.inner, t), x, use_reentrant=True)[0])

    adapted = gf.adapt(Reentrant(), {"inner": method})
    with pytest.raises(gf.CheckpointError, match="use_reentrant=False"):
        adapted(torch.randn(2, 4))
    assert all(p.grad is not None for p in trained(adapted, torch.randn(2, 4, requires_grad=True)))


def trained(adapted: gf.AdaptedModel, x: Tensor) -> list[nn.Parameter]:
    adapted(x).sum().backward()
    return list(adapted.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.gradient_checkpointing_enable. is dep")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_transformers_gradient_checkpointing(family: str, reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
            )
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
            )
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        ),
    }  # fmt: skip
    model = small[family]().double().train()
    if family == "llama":
        model.config.use_cache = False
    ids = torch.randint(0, 31, (2, 7))
    adapted = gf.adapt(model, gf.LoRA(rank=2, init="random"))

    def grads() -> list[Tensor]:
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        found = [p.grad.clone() for p in adapted.parameters() if p.grad is not None]
        assert len(found) == len(list(adapted.parameters()))
        return found

    expected = grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for want, got in zip(expected, grads(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert any(getattr(module, "gradient_checkpointing", False) for module in adapted.copy_pool.tree.modules.values())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
