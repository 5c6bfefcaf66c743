"""What lies in a kohya or LyCORIS file, before it is known what it means."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import FileError


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file says of itself: how it was trained (`ss_...`), and whatever else its maker wrote there.

    Nothing here depends on it: dimension and alpha are read from the tensors.

    Args:
        path: the file.

    Raises:
        FileError: if the file is missing, damaged or a pickle.

    Example:
        >>> import os, tempfile, torch, gift_func as gf
        >>> path = os.path.join(tempfile.mkdtemp(), "lora.safetensors")
        >>> gf.interop.kohya.save(gf.adapt(torch.nn.Linear(4, 2), gf.LoRA(rank=2)), path)
        >>> gf.interop.kohya.metadata(path)["ss_network_dim"]
        '2'
    """
    return contents(path)[1]


def contents(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file.

    Raises:
        FileError: if the file is missing, damaged or a pickle.
    """
    place = Path(path)
    if not place.is_file():
        raise FileError(f"there is no file {place}")
    try:
        with safe_open(place, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        with open(place, "rb") as raw:
            start = raw.read(2)
        if start in (b"PK", b"\x80\x02"):
            raise FileError(
                f"{place} is a pickle, which is not read: loading one can run any code. Convert it to safetensors where you "
                "trust it."
            ) from None
        raise FileError(f"{place} is damaged or is no safetensors file: {error}") from None
