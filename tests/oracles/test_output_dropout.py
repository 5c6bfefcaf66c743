"""LoHa's and LoKr's dropouts: of outputs, and of a whole place's change; PEFT's files with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import gift_func as gf

KINDS = {"LoHa": gf.LoHa, "LoKr": gf.LoKr}
HOSTS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(8, 40, bias=False), torch.eye(8)),
    "conv": (nn.Conv2d(2, 40, 1, bias=False), torch.eye(2).reshape(2, 2, 1, 1)),
    "embedding": (nn.Embedding(40, 8), torch.arange(40)),
}


def rows_of(adapted: nn.Module, base: nn.Module, x: Tensor) -> Tensor:
    """The change of every output (row of the weight), `(40, ...)`."""
    change: Tensor = (adapted(x) - base(x)).detach().squeeze(-1).squeeze(-1)
    return change if x.ndim == 1 else change.mT


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_dropped_whole_and_the_others_scaled(kind: str, host: str) -> None:
    model, x = HOSTS[host]
    options: dict[str, Any] = {"rank_dropout": 0.4, **({"rank_dropout_scale": True} if kind == "LoKr" else {})}
    adapted = gf.adapt(model, {"weight": KINDS[kind](3, init="random", **options)})
    wanted = rows_of(adapted.eval(), model, x)
    torch.manual_seed(0)
    shares = []
    for _ in range(30):
        found = rows_of(adapted.train(), model, x)
        kept = found.abs().sum(-1) > 1e-5
        shares.append(kept.double().mean().item())
        assert torch.allclose(found, kept.unsqueeze(-1) * wanted / kept.float().mean(), atol=1e-4)
    assert 0.5 < sum(shares) / len(shares) < 0.7
    assert len(set(shares)) > 3, "drawn once and for all"
    again = gf.adapt(model, {"weight": gf.LoKr(3, init="random", rank_dropout=0.4)})
    wanted, found = (rows_of(again.train(mode), model, x) for mode in (False, True))
    assert torch.allclose(found, (found.abs().sum(-1) > 1e-5).unsqueeze(-1) * wanted, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_places_change_is_dropped_as_a_whole(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    adapted = gf.adapt(model, KINDS[kind](2, init="random", module_dropout=0.5))
    x = torch.randn(3, 8)
    merged = adapted.merge()
    torch.manual_seed(0)
    adapted.train()
    seen: set[tuple[bool, bool]] = set()
    for _ in range(40):
        with torch.no_grad():
            out = adapted(x)
        found = [
            (first, second)
            for first in (False, True)
            for second in (False, True)
            if torch.allclose(out, (merged if second else model)[1]((merged if first else model)[0](x)), atol=1e-5)  # type: ignore[index]
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 4
    adapted.eval()
    assert torch.allclose(adapted(x), merged(x), atol=1e-5)


@pytest.mark.parametrize(("kind", "option"), [(k, o) for k in KINDS for o in ("rank_dropout", "module_dropout")])
def test_a_dropout_is_a_probability(kind: str, option: str) -> None:
    with pytest.raises(gf.AdaptError, match=rf"{option} is a probability in \[0, 1\), got {option}=1.0"):
        KINDS[kind](2, **{option: 1.0})


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_peft_say_so(kind: str, tmp_path: Path) -> None:
    config: Any = {"LoHa": peft.LoHaConfig, "LoKr": peft.LoKrConfig}[kind]
    more = {"rank_dropout_scale": True} if kind == "LoKr" else {}
    model = nn.Sequential(nn.Linear(8, 6))
    theirs = peft.get_peft_model(
        copy.deepcopy(model), config(r=2, target_modules=["0"], rank_dropout=0.25, module_dropout=0.125, **more)
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded = gf.interop.peft.load(model, tmp_path / "theirs")
    (part,) = loaded.adapted_parameters
    assert isinstance(part.method, (gf.LoHa, gf.LoKr))
    assert (part.method.rank_dropout, part.method.module_dropout) == (0.25, 0.125)
    gf.interop.peft.save(loaded, tmp_path / "ours")
    again = config.from_pretrained(str(tmp_path / "ours"))
    assert (again.rank_dropout, again.module_dropout) == (0.25, 0.125)
    assert all(getattr(again, name) == value for name, value in more.items())
