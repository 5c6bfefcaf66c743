"""What the tests of multiplicative and spectral methods share: models, and every law against a dense weight made by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

import gift_func as gf
from helpers.oracles import shaken as shaken

Dense = Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]


class Zoo(nn.Module):
    """One layer of each kind, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=3)
        self.lin = nn.Linear(8, 12)
        self.hf = Conv1D(8, 12)  # type: ignore[no-untyped-call]
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 12, 8))
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.hf(torch.tanh(self.lin(self.embed(ids)))))
        h = h + self.mha(h, h, h, need_weights=False)[0]
        h = torch.tanh(h.unsqueeze(1) @ self.experts.mT).mean(1)  # (batch, tokens, 12)
        h = self.conv(h.unflatten(-1, (4, 3)).transpose(1, 2))  # (batch, 6, tokens, 3)
        found: Tensor = self.head(h.mean(-1).mT.flatten(1)[:, :8])
        return found


SITES = ["embed.weight", "lin.weight", "hf.weight", "conv.weight", "mha.in_proj_weight", "experts", "head.weight"]
TOKENS = torch.tensor([[0, 3, 5, 5], [19, 7, 2, 3]])


def zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    torch.manual_seed(0)
    return Zoo().to(dtype)


def own(adapter: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
    """The tensors of one site, by the method's own names; a bias has those of its weight."""
    site = site.replace("bias", "weight")
    prefix = site.removesuffix("weight") if site.endswith(".weight") or site == "weight" else f"{site}."
    return {name.removeprefix(prefix): t for name, t in adapter.items() if name.rpartition(".")[0] == prefix.rstrip(".")}


def check_by_hand(adapted: gf.AdaptedModel, model: nn.Module, sites: list[str], dense: Dense, *args: Any) -> None:
    """Forward and gradients of the adapted model are those of the model with the weights that `dense` makes."""
    leaves = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in adapted.adapter.items()}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    made = {site: dense(site, weights[site], own(leaves, site)) for site in sites}
    wanted = torch.func.functional_call(copy.deepcopy(model), {**weights, **made}, args)
    trained = {n: p for n, p in leaves.items() if p.requires_grad}
    gradients = torch.autograd.grad(wanted.square().sum(), list(trained.values()), allow_unused=True, materialize_grads=True)
    found = adapted(*args)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    parameters = [adapted.adapter[n] for n in trained]
    mine = torch.autograd.grad(found.square().sum(), parameters, allow_unused=True, materialize_grads=True)
    assert max(g.abs().max() for g in gradients) > 1e-4
    for name, a, b in zip(trained, mine, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    with torch.no_grad():  # rules may choose otherwise where no gradient is asked for
        torch.testing.assert_close(adapted(*args), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapted.merge()(*args), wanted, rtol=1e-10, atol=1e-10)


def trains(adapted: gf.AdaptedModel, x: Tensor) -> None:
    """Steps of an optimizer, written to the adapter in place, are seen by the next call."""
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(adapted(x), adapted.with_adapter(adapted.adapter_state_dict())(x))


def check_laws(adapted: gf.AdaptedModel, model: nn.Module, tmp_path: Path, x: Tensor, by: float = 0.3) -> None:
    """vmap over two adapters is the loop, grad and jvp are defined, one graph serves both, files keep all."""
    a, b = shaken(adapted, 1, by), shaken(adapted, 2, by)
    torch.testing.assert_close(a.merge()(x), a(x))
    tokens = x.reshape(-1, x.shape[-1])[:1] if x.ndim == 2 and x.is_floating_point() else x[:1]
    torch.testing.assert_close(a.merge()(tokens), a(tokens))
    states = [{n: p.detach() for n, p in m.adapter.items()} for m in (a, b)]
    stacked = {n: torch.stack([s[n] for s in states]) for n in states[0]}
    wanted = torch.stack([a(x), b(x)])

    def call(state: dict[str, Tensor]) -> Tensor:
        found: Tensor = gf.functional_call(adapted, state, (x,))
        return found

    torch.testing.assert_close(torch.vmap(call)(stacked), wanted)
    trained = {n for n, _ in adapted.named_trainable_parameters()}

    def loss(some: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
        return call({**some, **rest}).square().sum()

    split = [({n: t for n, t in s.items() if n in trained}, {n: t for n, t in s.items() if n not in trained}) for s in states]
    batch = ({n: stacked[n] for n in trained}, {n: stacked[n] for n in stacked.keys() - trained})
    found = torch.vmap(torch.func.grad(loss))(*batch)
    for i, pair in enumerate(split):
        for n, g in torch.func.grad(loss)(*pair).items():
            torch.testing.assert_close(found[n][i], g)
    some, rest = split[0][0], split[0][1]
    tangent = {n: torch.ones_like(t) for n, t in some.items()}
    slope = torch.func.jvp(lambda s: loss(s, rest), (some,), (tangent,))[1]
    gradient = torch.func.grad(loss)(some, rest)
    torch.testing.assert_close(slope, torch.stack([g.sum() for g in gradient.values()]).sum())

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    torch.testing.assert_close(torch.stack([compiled(s) for s in states]), wanted)
    assert counter.frame_count == 1
    trains(b, x)
    gf.save_adapter(a, tmp_path / "a.safetensors")
    assert torch.equal(gf.load_adapter(model, tmp_path / "a.safetensors")(x), a(x))


class Layers(nn.Module):
    """The layers that PEFT knows, with widths that blocks divide."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lin = nn.Linear(16, 8)
        self.hf = Conv1D(24, 8)  # type: ignore[no-untyped-call]
        self.conv = nn.Conv2d(4, 6, 3, groups=groups)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.hf(torch.tanh(self.lin(self.embed(ids)))))
        found: Tensor = self.conv(h.unflatten(-1, (4, 6)).transpose(1, 2)).flatten(1)
        return found


def peft_net(groups: int = 1) -> Layers:
    torch.manual_seed(0)
    return Layers(groups)


def peft_oracle(model: nn.Module, config: Any, by: float = 0.3) -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's model with random weights, and its tensors under our names."""
    import peft

    torch.manual_seed(3)
    made: Any = peft.get_peft_model(copy.deepcopy(model), config)
    for p in made.parameters():
        if p.requires_grad:
            p.data += by * torch.randn_like(p)
    state = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): t.detach().clone()
        for name, t in peft.get_peft_model_state_dict(made).items()
    }
    return made.eval(), state


def check_peft(model: nn.Module, config: Any, strategy: Any, *args: Any, by: float = 0.3) -> None:
    """With PEFT's tensors in it, the adapted model computes what PEFT's does."""
    oracle, state = peft_oracle(model, config, by)
    adapted = gf.adapt(model, strategy).eval()
    kept = {n: t for n, t in adapted.adapter_state_dict().items() if n not in state}
    names = {n for n, _ in adapted.named_trainable_parameters()}
    assert names == state.keys(), names ^ state.keys()
    adapted = adapted.with_adapter({**kept, **state})
    wanted = oracle(*args)
    assert (wanted - model(*args)).abs().max() > 1e-3, "the oracle adapts nothing"
    torch.testing.assert_close(adapted(*args), wanted, rtol=1e-5, atol=1e-5)
