"""BitFit, norm tuning, Diff, SHiRA and trainable tokens: by hand, and against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracles import shaken
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import gift_func as gf

peft = pytest.importorskip("peft")


class Text(nn.Module):
    """An embedding, a linear layer, a norm, a head that may be tied."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=3)
        self.lin = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(torch.tanh(self.lin(self.embed(ids)))))
        return found


IDS = torch.tensor([[0, 3, 5, 5], [19, 7, 2, 3]])
TOKENS = [7, 3, 19, 11]


def text(tie: bool = False, dtype: torch.dtype = torch.float64) -> Text:
    torch.manual_seed(0)
    return Text(tie).to(dtype)


def by_hand(model: nn.Module, dense: dict[str, Tensor], *args: Any) -> Any:
    return torch.func.functional_call(copy.deepcopy(model), dense, args)


def shira_dense(model: Text, state: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    found = {}
    for name in ("lin", "head"):
        rows, columns = state[f"{name}.shira_indices"].long()
        change = torch.zeros_like(getattr(model, name).weight)
        for row, column, value in zip(rows, columns, state[f"{name}.shira_weight"], strict=True):
            change = change + F.pad(value.reshape(1, 1), (column, change.shape[1] - 1 - column, row, change.shape[0] - 1 - row))
        found[f"{name}.weight"] = getattr(model, name).weight.detach() + scale * change
    return found


def tokens_dense(model: Text, state: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = list(model.embed.weight.detach())
    for token, row in zip(TOKENS, state["embed.trainable_tokens_delta"], strict=True):
        rows[token] = row
    return {"embed.weight": torch.stack(rows)}


def same_dense(model: Text, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(state)


def diff_dense(model: Text, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"lin.bias": model.lin.bias.detach() + 0.5 * state["lin.bias.diff"]}


ROWS: dict[str, tuple[Any, Any]] = {
    "bitfit": (gf.BitFit(), same_dense),
    "norm": (gf.NormTuning(), same_dense),
    "diff": ({"lin.bias": gf.Diff(scale=0.5)}, diff_dense),
    "shira": (gf.SHiRA(rank=2, random_seed=3), shira_dense),
    "shira_scaled": (gf.SHiRA(rank=1, scale=0.5), lambda model, state: shira_dense(model, state, 0.5)),
    "tokens": (gf.TrainableTokens(TOKENS), tokens_dense),
}
EVERY = pytest.mark.parametrize("name", ROWS)


@EVERY
def test_formula_by_hand_forward_and_gradients(name: str) -> None:
    strategy, dense = ROWS[name]
    model = text()
    adapted = shaken(gf.adapt(model, strategy, generator=torch.Generator().manual_seed(0)))
    leaves = {key: p.detach().clone() for key, p in adapted.adapter.items()}
    trained = [key for key, p in adapted.adapter.items() if p.requires_grad]
    for key in trained:
        leaves[key].requires_grad_()
    wanted = by_hand(model, dense(model, leaves), IDS)
    found = adapted(IDS)
    assert torch.allclose(found, wanted, atol=1e-10, rtol=0)
    assert not torch.allclose(found, model(IDS), atol=1e-3)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), [leaves[key] for key in trained])
    found_grads = torch.autograd.grad(found.square().sum(), [adapted.adapter[key] for key in trained])
    for key, a, b in zip(trained, found_grads, wanted_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-10, rtol=0), key
        assert a.abs().max() > 1e-4
    assert torch.allclose(adapted.merge()(IDS), found, atol=1e-10)


@EVERY
def test_identity_at_first(name: str) -> None:
    model = text()
    assert torch.equal(gf.adapt(model, ROWS[name][0])(IDS), model(IDS))


@EVERY
def test_vmap_equals_loop_and_one_graph_serves_two_adapters(name: str, tmp_path: Path) -> None:
    strategy, _ = ROWS[name]
    model = text()
    adapted = gf.adapt(model, strategy, generator=torch.Generator().manual_seed(0))
    members = [shaken(adapted, seed) for seed in (1, 2)]
    states = [member.adapter_state_dict() for member in members]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    found = torch.vmap(lambda state: gf.functional_call(adapted, state, (IDS,)))(stacked)
    assert torch.allclose(found, torch.stack([member(IDS) for member in members]), atol=1e-10)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda state, ids: gf.functional_call(adapted, state, (ids,)), fullgraph=True, backend=counter)
    for member, state in zip(members, states, strict=True):
        assert torch.allclose(compiled(state, IDS), member(IDS), atol=1e-10)
    assert counter.frame_count == 1

    gf.save_adapter(members[0], tmp_path / "a.safetensors")
    assert torch.equal(gf.load_adapter(model, tmp_path / "a.safetensors")(IDS), members[0](IDS))


def test_usual_sites_of_bitfit_and_norm_tuning() -> None:
    model = nn.Sequential(nn.LSTM(2, 2), nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.BatchNorm1d(4), nn.GroupNorm(2, 4))
    names = set(gf.adapt(model, gf.BitFit()).adapter)
    assert names == {"0.bias_ih_l0", "0.bias_hh_l0", "1.in_proj_bias", "1.out_proj.bias", "2.bias", "3.bias"}
    assert set(gf.adapt(model, gf.NormTuning()).adapter) == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_norm_tuning_knows_norms_by_name() -> None:
    class FancyRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class Own(FancyRMSNorm):
        pass

    assert list(gf.adapt(nn.Sequential(nn.Linear(4, 4), Own()), gf.NormTuning()).adapter) == ["1.weight"]


def test_tied_head_follows_the_tokens_and_only_their_rows_get_gradients() -> None:
    model = text(tie=True)
    adapted = shaken(gf.adapt(model, gf.TrainableTokens(TOKENS)))
    dense = tokens_dense(model, adapted.adapter_state_dict())["embed.weight"]
    wanted = torch.func.functional_call(copy.deepcopy(model), {"embed.weight": dense}, (IDS,), tie_weights=True)
    assert torch.allclose(adapted(IDS), wanted, atol=1e-10)
    assert model.embed.weight.grad is None
    untied = shaken(gf.adapt(text(), gf.TrainableTokens(TOKENS)))
    untied(IDS).square().sum().backward()
    gradient = untied.adapter["embed.trainable_tokens_delta"].grad
    assert gradient.abs().amax(1).gt(0).tolist() == [True, False, True, False]  # 3 is padding, 11 does not occur


def test_tokens_in_bags_and_scaled_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(20, 8, mode="mean", padding_idx=3).double()
    adapted = shaken(gf.adapt(model, {"weight": gf.TrainableTokens(TOKENS)}))
    dense = model.weight.detach().index_copy(0, torch.tensor(TOKENS), adapted.adapter_state_dict()["trainable_tokens_delta"])
    assert torch.allclose(adapted(IDS), by_hand(model, {"weight": dense}, IDS), atol=1e-10)


def test_tokens_wider_than_a_half_precision_base() -> None:
    model = text(tie=True, dtype=torch.bfloat16)
    adapted = gf.adapt(model, gf.TrainableTokens(TOKENS))
    wide = {name: t.float() + 0.25 for name, t in adapted.adapter_state_dict().items()}
    found = gf.functional_call(adapted, wide, (IDS,))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found, adapted.with_adapter(wide)(IDS), atol=1e-1)


def test_shira_draws_its_entries_once_and_from_the_seed() -> None:
    model = text()
    a, b, c = (gf.adapt(model, gf.SHiRA(rank=2, random_seed=seed)).adapter["lin.shira_indices"] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    flat = a[0].long() * 8 + a[1]
    assert len(flat.unique()) == len(flat) == 2 * (8 + 8)
    assert not a.requires_grad
    conv = gf.adapt(nn.Conv2d(4, 6, 3), gf.SHiRA(rank=1))
    assert conv.adapter["shira_weight"].shape == (6 + 36,)
    assert torch.allclose(shaken(conv).merge()(torch.ones(1, 4, 5, 5)), shaken(conv)(torch.ones(1, 4, 5, 5)), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("seed", [0, 5])
def test_shira_equals_peft(seed: int) -> None:
    model = text(dtype=torch.float32)
    config = peft.ShiraConfig(r=2, random_seed=seed, target_modules=["lin", "head"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapted = gf.adapt(model, gf.SHiRA(rank=2, random_seed=seed))
    state = adapted.adapter_state_dict()
    for name in ("lin", "head"):
        layer = getattr(theirs.base_model.model, name)
        assert torch.equal(layer.shira_indices["default"], state[f"{name}.shira_indices"])
        state[f"{name}.shira_weight"] = layer.shira_weight["default"].detach()
    assert torch.allclose(adapted.with_adapter(state)(IDS), theirs(IDS), atol=1e-5)


def test_trainable_tokens_equal_peft() -> None:
    model = text(dtype=torch.float32)
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    delta = theirs.base_model.model.embed.trainable_tokens_delta["default"].detach()
    adapted = gf.adapt(model, gf.TrainableTokens(TOKENS)).with_adapter({"embed.trainable_tokens_delta": delta})
    assert torch.allclose(adapted(IDS), theirs(IDS), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_norm_tuning_equals_peft() -> None:
    model = text(dtype=torch.float32)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LNTuningConfig(target_modules=["norm"])).eval()
    layer = theirs.base_model.model.norm.ln_tuning_layers["default"]
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    state = {f"norm.{name}": p.detach() for name, p in layer.named_parameters()}
    assert torch.allclose(gf.adapt(model, gf.NormTuning()).with_adapter(state)(IDS), theirs(IDS), atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match=r"whole rank of at least 1, got rank=0"):
        gf.SHiRA(rank=0)
    with pytest.raises(gf.AdaptError, match=r"at least rank·\(rows \+ columns\) = 1024 entries"):
        gf.adapt(text(), {"lin": gf.SHiRA(rank=64)})
    with pytest.raises(gf.AdaptError, match=r"at least one token, and each once, got \[1, 1\]"):
        gf.TrainableTokens([1, 1])
    with pytest.raises(gf.AdaptError, match=r"from 0 up, got -1"):
        gf.TrainableTokens([-1])
    with pytest.raises(gf.AdaptError, match=r"matrix of more than 20 rows"):
        gf.adapt(text(), {"embed": gf.TrainableTokens([20])})
    with pytest.raises(gf.AdaptError, match=r"matches nothing"):
        gf.adapt(nn.Sequential(nn.Linear(2, 2, bias=False)), gf.BitFit())
