"""Attention under `vmap` as one batch: the formula, for every shape of query and mask, batched or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gift_func.kernels.stacked_attention import attention

MEMBERS = 4
LEADS: dict[int, tuple[int, ...]] = {2: (), 3: (3,), 4: (2, 3)}
MASKS = ["none", "plain", "full", "one sample", "members", "members full"]


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    out: Tensor = (scores if mask is None else scores + mask).softmax(-1) @ value
    return out


def mask_of(kind: str, lead: tuple[int, ...]) -> tuple[Tensor | None, int | None]:
    shapes = {
        "plain": (), "full": lead, "one sample": (*(1 for _ in lead[:1]), *lead[1:]), "members": (MEMBERS,),
        "members full": (MEMBERS, *lead),
    }  # fmt: skip
    if kind == "none":
        return None, None
    return torch.randn(*shapes[kind], 5, 6, dtype=torch.float64), 0 if kind.startswith("members") else None


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, None)])
@pytest.mark.parametrize("ndim", LEADS)
def test_it_is_the_formula(ndim: int, dims: tuple[int | None, ...], kind: str) -> None:
    torch.manual_seed(0)
    given = []
    for length, dim in zip((5, 6, 6), dims, strict=True):
        tensor = torch.randn(MEMBERS, *LEADS[ndim], length, 8, dtype=torch.float64)
        given.append(tensor[0] if dim is None else tensor.movedim(0, dim))
    mask, mask_dim = mask_of(kind, LEADS[ndim])
    leaves = [t.requires_grad_() for t in (*given, mask) if t is not None]
    where = (*dims, mask_dim)[: len(leaves)]
    folded: Callable[..., Tensor] = attention
    found, wanted = torch.vmap(folded, where)(*leaves), torch.vmap(formula, where)(*leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, wanted)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_the_members_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = F.scaled_dot_product_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x = torch.randn(MEMBERS, 2, 3, 5, 8)
    torch.vmap(lambda x: attention(x, x, x))(x)
    assert calls == [(MEMBERS * 2, 3, 5, 8)]
