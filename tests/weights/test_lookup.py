"""Rows looked up, alone and in bags, of weights that know theirs without the whole table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift_func as gf
from gift_func.weights import Hadamard, Kronecker, Modulated

METHODS: dict[str, tuple[gf.Method, type[Any]]] = {
    "HiRA": (gf.HiRA(3), Modulated),
    "LoHa": (gf.LoHa(3, alpha=2.0), Hadamard),
    "LoKr": (gf.LoKr(2, alpha=3.0), Kronecker),
    "LoKr both": (gf.LoKr(1, alpha=3.0, decompose_both=True), Kronecker),
}
TABLES: dict[str, nn.Module] = {
    "embedding": nn.Embedding(60, 8),
    "padded": nn.Embedding(60, 8, padding_idx=2),
    "sum": nn.EmbeddingBag(60, 8, mode="sum"),
    "mean": nn.EmbeddingBag(60, 8, mode="mean"),
    "padded bag": nn.EmbeddingBag(60, 8, mode="mean", padding_idx=2),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("label", METHODS)
def test_rows_are_those_of_the_dense_table(label: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, kind = METHODS[label]
    model = TABLES[name].double()
    adapted = gf.adapt(model, {"weight": method}, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    state = {n: p + torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in adapted.adapter.items()}
    index = torch.randint(60, (4, 5), generator=generator)
    index[0, 0] = 2
    inputs: tuple[Tensor, ...] = (index,)
    if name == "sum":
        inputs = (index.flatten(), torch.tensor([0, 3, 3, 11]), torch.randn(20, dtype=torch.float64, generator=generator))

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        out = gf.functional_call(adapted, leaves, inputs)
        return out, torch.autograd.grad(out.sin().sum(), list(leaves.values()))

    with torch.no_grad():
        dense = adapted.with_adapter(state).merge()
    leaves = {n: t.detach().clone().requires_grad_() for n, t in state.items()}
    table = adapted.structured_weights(leaves)["weight"].dense()
    wanted = torch.func.functional_call(dense, {"weight": table}, inputs)
    gradients = torch.autograd.grad(wanted.sin().sum(), list(leaves.values()))
    if name != "padded bag":  # torch leaves padding out of a bag by its number in the table

        def refuse(self: object) -> Tensor:
            raise AssertionError("the whole table was formed")

        monkeypatch.setattr(kind, "dense", refuse)
    found, got = run(state)
    assert torch.allclose(found, wanted, atol=1e-12)
    for n, a, b in zip(state, got, gradients, strict=True):
        assert b.abs().max() > 0, n
        assert torch.allclose(a, b, atol=1e-12), n
