"""OFT: by hand on both sides, against PEFT and LyCORIS, and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.multiplicative import SITES, TOKENS, check_by_hand, check_laws, check_peft, peft_net, shaken, zoo
from torch import Tensor, nn

import gift_func as gf

peft = pytest.importorskip("peft")


def rotation(method: gf.OFT, t: Mapping[str, Tensor], width: int, number: int | None = None) -> Tensor:
    """R, one block at a time, by the definition."""
    upper = next(iter(t.values())) if number is None else next(iter(t.values()))[number]
    if method.side == "output":
        skews = [b.mT - b for b in upper]
    else:
        skews = []
        for row in upper:
            size = round((1 + (1 + 8 * len(row)) ** 0.5) / 2)
            q = torch.zeros(size, size, dtype=row.dtype)
            i, j = torch.triu_indices(size, size, 1)
            q = q.index_put((i, j), row)
            skews.append(q - q.T)
    if method.coft and method.side == "output":
        norm = torch.stack(skews).norm()
        skews = [q * (method.eps * width / norm) if norm > method.eps * width else q for q in skews]
    elif method.coft:
        bound = method.eps / len(skews) ** 0.5
        skews = [q * (bound / q.norm()) if q.norm() > bound else q for q in skews]
    blocks = []
    for q in skews:
        eye = torch.eye(len(q), dtype=q.dtype)
        if method.neumann and method.side == "input":
            powers = [torch.linalg.matrix_power(q, k) for k in range(method.neumann)]
            blocks.append(eye + 2 * torch.stack(powers[1:-1]).sum(0) + powers[-1])
        else:
            blocks.append((eye - q) @ torch.linalg.inv(eye + q))
            torch.testing.assert_close(blocks[-1] @ blocks[-1].T, eye)
    if method.block_share:
        blocks = blocks * (width // len(blocks[0]))
    found: Tensor = torch.block_diag(*blocks)
    return found


def dense(method: gf.OFT, site: str, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    if site == "experts":
        parts = [dense(method, "", w[e], {n: v[e] for n, v in t.items()}) for e in range(3)]
        return torch.stack(parts)
    if site == "hf.weight":
        return dense(method, "", w.T, t).T
    matrix = w.flatten(1)
    if site == "embed.weight":
        looked: Tensor = matrix @ rotation(method, t, 8)
        return looked * t["rescale"].flatten() if method.rescale else looked
    if method.side == "input":
        return (matrix @ rotation(method, t, matrix.shape[1]).T).reshape(w.shape)
    turned = rotation(method, t, matrix.shape[0]).T @ matrix
    if method.rescale:
        turned = turned * t["rescale"].reshape(-1, 1)
    return turned.reshape(w.shape)


METHODS = [
    gf.OFT(4),
    gf.OFT(4, neumann=0),
    gf.OFT(block_num=2, neumann=7),
    gf.OFT(4, block_share=True),
    gf.OFT(4, coft=True, eps=0.05, neumann=0),
    gf.OFT(4, side="output"),
    gf.OFT(block_num=2, side="output", rescale=True, coft=True, eps=0.01),
    gf.OFT(4, side="output", block_share=True),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_formula(method: gf.OFT) -> None:
    model = zoo()
    adapted = gf.adapt(model, dict.fromkeys(SITES, method))
    torch.testing.assert_close(adapted(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    check_by_hand(shaken(adapted), model, SITES, partial(dense, method), TOKENS)
    assert gf.Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gf.OFT(4), {"oft_block_size": 4}),
        (gf.OFT(5), {"oft_block_size": 5}),
        (gf.OFT(block_num=2), {"r": 2, "oft_block_size": 0}),
        (gf.OFT(4, neumann=3), {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
        (gf.OFT(4, neumann=6), {"oft_block_size": 4, "num_cayley_neumann_terms": 6}),
        (gf.OFT(4, neumann=0), {"oft_block_size": 4, "use_cayley_neumann": False}),
        (gf.OFT(4, block_share=True), {"oft_block_size": 4, "block_share": True}),
        (gf.OFT(4, coft=True, eps=0.3), {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Invalid `(oft_block_size|r)`:UserWarning")
def test_peft(ours: gf.OFT, theirs: dict[str, Any]) -> None:
    # PEFT's convolution turns overlapping patches of the image and adds them up; what it merges is the formula. So the
    # convolution is compared after merging, below.
    names = ["embed", "lin"]
    check_peft(peft_net(), peft.OFTConfig(target_modules=names, **theirs), dict.fromkeys(names, ours), TOKENS)


def test_peft_convolution_merged() -> None:
    model = peft_net()
    config = peft.OFTConfig(target_modules=["conv"], oft_block_size=4)
    oracle = peft.get_peft_model(peft_net(), config)
    for p in oracle.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3)
    state = {"conv.oft_R": oracle.base_model.model.conv.oft_R["default"].weight.detach().clone()}
    adapted = gf.adapt(model, {"conv": gf.OFT(4)}).with_adapter(state)
    torch.testing.assert_close(adapted(TOKENS), oracle.merge_and_unload()(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 3, 3)])
@pytest.mark.parametrize("constraint", [None, 0.5])
def test_lycoris(shape: tuple[int, ...], constraint: float | None) -> None:
    functional = pytest.importorskip("lycoris.functional")
    torch.manual_seed(0)
    layer = nn.Linear(6, 8) if len(shape) == 2 else nn.Conv2d(3, 8, 3)
    blocks, rescale = 0.3 * torch.randn(2, 4, 4), torch.rand(8, *[1] * (len(shape) - 1)) + 0.5
    w = layer.weight.detach()
    wanted = w + functional.diag_oft.diff_weight(w, blocks, rescale, constraint=constraint)
    method = gf.OFT(4, side="output", rescale=True, coft=constraint is not None, eps=(constraint or 1) / 8)
    adapted = gf.adapt(layer, {"weight": method}).with_adapter({"oft_blocks": blocks, "rescale": rescale})
    torch.testing.assert_close(adapted.merge().weight, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method", [gf.OFT(2), gf.OFT(3, neumann=0, coft=True), gf.OFT(2, side="output", rescale=True)], ids=str
)
def test_laws(method: gf.OFT, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4, bias=False)).double()
    check_laws(gf.adapt(model, method), model, tmp_path, torch.randn(20, 6).double())


def test_dropout_leaves_blocks_out_in_training_only() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    adapted = shaken(gf.adapt(model, gf.OFT(2, dropout=0.5, neumann=0)))
    x = torch.randn(3, 8)
    adapted.train()
    outputs = torch.stack([adapted(x) for _ in range(40)])
    assert outputs.std(0).min() > 1e-3
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))
    whole = shaken(gf.adapt(model, gf.OFT(2, neumann=0)))
    torch.testing.assert_close(adapted(x), whole(x))


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match="OFT needs a whole block_size of at least 1, got block_size=0"):
        gf.OFT(0)
    with pytest.raises(gf.AdaptError, match="side is one of input, output"):
        gf.OFT(side="left")  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="needs side='output'"):
        gf.OFT(rescale=True)
    with pytest.raises(gf.AdaptError, match="neumann is at least 0"):
        gf.OFT(neumann=-1)
    with pytest.raises(gf.AdaptError, match="dropout is a probability"):
        gf.OFT(dropout=1.0)
    with pytest.raises(gf.AdaptError, match="a width that blocks of at least 2 features divide"):
        gf.adapt(nn.Linear(7, 2), gf.OFT(2))
    with pytest.raises(gf.AdaptError, match="at least 2 dimensions"):
        gf.adapt(nn.Linear(8, 2), {"bias": gf.OFT(2)})
