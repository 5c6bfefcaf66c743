"""BOFT: by hand, against PEFT (one factor, and its permutations) and LyCORIS (several factors), and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.multiplicative import SITES, TOKENS, check_by_hand, check_laws, check_peft, peft_net, shaken, zoo
from torch import Tensor, nn

import gift_func as gf

peft = pytest.importorskip("peft")


def rotation(r: Tensor) -> Tensor:
    """R = R_m ⋯ R_1, with permutations as matrices, index by index."""
    m, n, b, _ = r.shape
    width = n * b
    found = torch.eye(width, dtype=r.dtype)
    for i in range(m):
        blocks = []
        for data in r[i]:
            q = (data - data.T) / 2
            eye = torch.eye(b, dtype=r.dtype)
            blocks.append((eye - q) @ torch.linalg.inv(eye + q))
        order = list(range(width))
        if i:
            chunks = [order[k : k + b // 2] for k in range(0, width, b // 2)]
            per = 2 ** (i + 1)
            segments = [chunks[k : k + per] for k in range(0, len(chunks), per)]
            order = [k for segment in segments for chunk in segment[0::2] + segment[1::2] for k in chunk]
        p = torch.eye(width, dtype=r.dtype)[order]
        found = p @ torch.block_diag(*blocks) @ p.T @ found
    return found


def dense(site: str, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    if site == "experts":
        return torch.stack([dense("", w[e], {n: v[e] for n, v in t.items()}) for e in range(3)])
    if site == "hf.weight":
        return dense("", w.T, t).T
    if site == "embed.weight":
        return w @ rotation(t["boft_R"]) * t["boft_s"].flatten()
    return (t["boft_s"].reshape(-1, 1) * (w.flatten(1) @ rotation(t["boft_R"]).T)).reshape(w.shape)


@pytest.mark.parametrize(
    ("method", "sites"),
    [
        (gf.BOFT(2), SITES),
        (gf.BOFT(2, n_butterfly_factor=2), [s for s in SITES if s != "conv.weight"]),
        (gf.BOFT(block_num=4, n_butterfly_factor=3), ["embed.weight", "lin.weight", "experts", "mha.in_proj_weight"]),
    ],
    ids=str,
)
def test_formula(method: gf.BOFT, sites: list[str]) -> None:
    model = zoo()
    adapted = gf.adapt(model, dict.fromkeys(sites, method))
    torch.testing.assert_close(adapted(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    check_by_hand(shaken(adapted), model, sites, dense, TOKENS)
    assert gf.Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize("theirs", [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 2}])
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning")
def test_peft(theirs: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)  # it would try to compile
    ours = gf.BOFT(4) if theirs["boft_block_size"] else gf.BOFT(block_num=2)
    config = peft.BOFTConfig(target_modules=["lin", "conv"], **theirs)
    check_peft(peft_net(), config, {"lin": ours, "conv": ours}, TOKENS)


def test_permutations_are_those_of_peft() -> None:
    from peft.tuners.boft.layer import BOFTLayer

    for width, size, factors in ((16, 4, 3), (24, 6, 3), (8, 2, 3)):
        for i in range(factors):
            permutation: Any = BOFTLayer.block_butterfly_perm
            order = permutation(None, width, width // size // 2**i, size // 2, factors - 1)
            rows = torch.arange(width).reshape(-1, 2**i, 2, size // 2).transpose(1, 2).flatten()
            assert torch.equal(order, rows)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_lycoris(factors: int) -> None:
    functional = pytest.importorskip("lycoris.functional")
    torch.manual_seed(0)
    layer = nn.Linear(16, 6)
    theirs = 0.3 * torch.randn(factors, 4, 4, 4)
    # LyCORIS turns outputs, so it is given the transpose. Its blocks have odd and even interleaved, and Q = B - Bᵀ of the
    # other sign.
    wanted = layer.weight.T + functional.boft.diff_weight(layer.weight.T, theirs, None)
    ours = -2 * theirs.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).transpose(-1, -2).transpose(-3, -4).flatten(-2).flatten(
        -3, -2
    )
    adapted = gf.adapt(layer, {"weight": gf.BOFT(4, n_butterfly_factor=factors)})
    adapted = adapted.with_adapter({"boft_R": ours, "boft_s": torch.ones(6, 1)})
    torch.testing.assert_close(adapted.merge().weight.T, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [gf.BOFT(2), gf.BOFT(2, n_butterfly_factor=3)], ids=str)
def test_laws(method: gf.BOFT, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    check_laws(gf.adapt(model, method), model, tmp_path, torch.randn(20, 8).double())


def test_refusals() -> None:
    with pytest.raises(gf.AdaptError, match="whole n_butterfly_factor of at least 1, got n_butterfly_factor=0"):
        gf.BOFT(n_butterfly_factor=0)
    with pytest.raises(gf.AdaptError, match="need an even size, got 3"):
        gf.BOFT(3, n_butterfly_factor=2)
    with pytest.raises(gf.AdaptError, match="dropout is a probability"):
        gf.BOFT(dropout=-0.1)
    with pytest.raises(gf.AdaptError, match=r"a block_size=4 whose blocks, .* divide its width 6"):
        gf.adapt(nn.Linear(6, 2), gf.BOFT(4))
    with pytest.raises(gf.AdaptError, match=r"a block_num=4 .* divide its width 6"):
        gf.adapt(nn.Linear(6, 2), gf.BOFT(block_num=4))
    with pytest.raises(gf.AdaptError, match="block_size=4 and n_butterfly_factor=3 whose blocks"):
        gf.adapt(nn.Linear(8, 2), gf.BOFT(4, n_butterfly_factor=3))
    with pytest.raises(gf.AdaptError, match="at least 2 dimensions"):
        gf.adapt(nn.Linear(8, 2), {"bias": gf.BOFT(2)})
