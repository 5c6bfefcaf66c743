"""The one file that reads and writes safetensors."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import gift_func as gf
from gift_func import safetensors_io

ROOT = Path(gf.__file__).parent


def test_no_other_file_opens_safetensors() -> None:
    users = [path.name for path in ROOT.rglob("*.py") if re.search(r"^\s*(import|from) safetensors\b", path.read_text(), re.M)]
    assert users == ["safetensors_io.py"]


def test_metadata_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.ones(3)}, path, {"note": "ü", "more": "1"})
    assert safetensors_io.read_metadata(path) == {"note": "ü", "more": "1"}
    save_file({"a": torch.ones(3)}, path)
    assert safetensors_io.read_metadata(path) == {}


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "cut", "garbage"])
@pytest.mark.parametrize("copy", [False, True, None])
def test_what_cannot_be_read_is_a_file_error(damage: str, copy: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.ones(3)}, path)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-5], "garbage": b"\xff" * 64}[damage])
    message = "there is no file" if damage in ("missing", "folder") else "damaged or is no safetensors file"
    with pytest.raises(gf.FileError, match=message):
        safetensors_io.read_metadata(path) if copy is None else safetensors_io.read(path, copy=copy)


def test_copies_may_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.float8_e4m3fn)}, path)
    before = path.read_bytes()
    tensors, _ = safetensors_io.read(path, copy=True)
    for tensor in tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_bytes_of_aliases_views_and_parameters(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    tensors: dict[str, Tensor] = {"whole": whole, "alias": whole, "view": whole.mT, "parameter": torch.nn.Parameter(whole)}
    path = tmp_path / "file"
    safetensors_io.write(path, safetensors_io.to_bytes(tensors, {"key": "value"}))
    found, metadata = safetensors_io.read(path)
    assert metadata == {"key": "value"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(gf.AdaptError, match="'b' is on the meta device and has no values to save"):
        safetensors_io.to_bytes({"a": torch.ones(1), "b": torch.ones(1, device="meta")})


def test_several_entries_of_metadata_keep_their_order(tmp_path: Path) -> None:
    path, about = tmp_path / "file", {f"key{i}": "ü" * i for i in range(9, 0, -1)}
    plain = safetensors_io.to_bytes({"a": torch.arange(5), "b": torch.ones(3)})
    data = safetensors_io.with_metadata(plain, about)
    assert safetensors_io.without_header(data) == safetensors_io.without_header(plain)
    path.write_bytes(data)
    assert list(safetensors_io._read_directly(path)[1].items()) == list(about.items())  # type: ignore[index]  # it is no damaged file
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == about
    assert load_file(path)["b"].tolist() == [1, 1, 1]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        safetensors_io.write(path, b"new")
    assert [(other.name, other.read_bytes()) for other in tmp_path.iterdir()] == [("file", b"old")]
