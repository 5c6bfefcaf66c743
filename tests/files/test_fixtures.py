"""Files that an earlier version wrote load, hold the same bits, and compute the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.networks import GRID, HOST, batches, lora, small
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import gift_func as gf
from gift_func.testing import HOSTS, Case

FILES = Path(__file__).parents[1] / "fixtures" / "files"
OUTPUTS = load_file(FILES / "outputs.safetensors")
ROWS = sorted({name.partition("/")[0] for name in OUTPUTS if "/" in name})


def same(found: Tensor, name: str) -> None:
    """Equal but for the order in which another processor adds up."""
    torch.testing.assert_close(found, OUTPUTS[name], rtol=1e-12, atol=1e-12)


def host_of(row: str) -> tuple[Any, Tensor]:
    """The module that a method was tried on, and its input, by the numbers in the file."""
    host = {"TrainableTokens": "embedding", "BitFit": "bias"}.get(row, HOST)
    model = Case(gf.Full(), HOSTS[host]).model
    model.load_state_dict({key.split("/")[2]: tensor for key, tensor in OUTPUTS.items() if key.startswith(f"{row}/model/")})
    return model, OUTPUTS[f"{row}/x"]


@pytest.mark.parametrize("row", ROWS)
def test_native_files(row: str, tmp_path: Path) -> None:
    """The tensors are those of the file to the bit, and what is saved again is that file."""
    model, x = host_of(row)
    path = FILES / f"{row}.safetensors"
    adapted = gf.load_adapter(model, path)
    same(adapted(x), row)
    held = load_file(path)
    state = adapted.adapter_state_dict()
    assert state.keys() == held.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in held.items())
    gf.save_adapter(adapted, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", sorted(FILES.glob("peft *")), ids=lambda path: path.name)
def test_peft_folders(path: Path) -> None:
    row = path.name.removeprefix("peft ")
    model, x = host_of(row)
    same(gf.interop.peft.load(model, path)(x), row)


@pytest.mark.parametrize("path", sorted(FILES.glob("kohya *")), ids=lambda path: path.stem)
def test_kohya_files(path: Path) -> None:
    row = path.stem.removeprefix("kohya ")
    model, x = host_of(row)
    same(gf.interop.kohya.load(model, path)(x), row)


def test_networks_with_statistics_and_modules_of_their_own() -> None:
    net, (x, _) = small(), batches()[0]
    same(gf.load_adapter(net, FILES / "network.safetensors").eval()(x), "network")
    same(gf.load_adapter(net, FILES / "bottleneck.safetensors").eval()(x), "bottleneck")


def test_ensembles() -> None:
    net, (x, _) = small(), batches()[0]
    same(gf.load_adapter(net, FILES / "member.safetensors").eval()(x), "member")
    ens = gf.stack([gf.adapt(net, {"*.weight": gf.LoRA(rank=rank, init="random")}) for rank in (1, 3)])
    ens.load_state_dict(load_file(FILES / "ensemble state.safetensors"))
    same(ens.eval()(x), "ensemble")


def test_a_sweep_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(output, target)

    def swept(path: Path) -> gf.SweepResult:
        return gf.sweep(small(), GRID, lora, data=batches(), loss=loss, steps=8, every=2, progress=False, checkpoint=path)

    path = tmp_path / "sweep.safetensors"
    shutil.copy(FILES / "sweep.safetensors", path)
    resumed = swept(path)
    assert len(calls) == 4, "it began anew"
    whole = swept(tmp_path / "none.safetensors")
    for index in range(len(whole.trials)):
        found, wanted = resumed.model(index).adapter_state_dict(), whole.model(index).adapter_state_dict()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10)
