"""Reading a PEFT directory onto a model."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from einops import EinopsError
from torch import Tensor, nn

from ... import safetensors_io
from ...adapt import base_of, readapt
from ...adapted_model import AdaptedModel
from ...errors import AdaptError, FileError, StateError
from ...network.base_view import BaseView
from ...network.frozen_base import FrozenBase
from ..strategy_of import strategy_of
from . import config as configs
from .formats import PEFT_FORMATS
from .lora import read_lora_file
from .reader import PeftReader

WEIGHTS = "adapter_model.safetensors"


def load(
    model: nn.Module | FrozenBase | BaseView,
    directory: str | os.PathLike[str],
    *,
    ignore: Collection[str] = (),
) -> AdaptedModel:
    """Read an adapter that PEFT saved, or `save` did, onto a model. PEFT is not needed, and nothing is unpickled.

    Every tensor of the file must belong to the model, and every module that the config targets must have its tensors, so an
    adapter of another model is refused as a whole.

    Args:
        model: the model the adapter was made for; it is not changed.
        directory: the folder with `adapter_config.json` and `adapter_model.safetensors`.
        ignore: keys of the config to leave out: those that are not known here and change nothing.

    Returns:
        The adapted model, in the training mode of `model`; the file's tensors are trainable.

    Raises:
        FileError: if a file is missing, damaged or a pickle; if a key of the config is not supported, naming it; if the
            tensors do not fit the config or the model.

    Example:
        >>> import torch, gift_func as gf, tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> directory = tempfile.mkdtemp()
        >>> gf.interop.peft.save(gf.adapt(model, {"1": gf.LoRA(rank=2)}), directory)
        >>> list(gf.interop.peft.load(model, directory).adapter)
        ['1.lora_B', '1.lora_A']
    """
    folder = Path(directory)
    config = configs.read_config(folder)
    peft_type = config["peft_type"].upper()
    if peft_type != "LORA" and peft_type not in PEFT_FORMATS:
        raise FileError(
            f"{folder / configs.FILE} is of peft_type {peft_type!r}; supported are {', '.join(['LORA', *sorted(PEFT_FORMATS)])}"
        )
    tensors = read_tensors(folder)
    base = base_of(model)
    try:
        reader = PeftReader(base, tensors)
        if peft_type == "LORA":
            read_lora_file(reader, config, ignore)
        else:
            PEFT_FORMATS[peft_type].read_file(reader, config, ignore)
        reader.check()
        return readapt(base, strategy_of(reader.methods), reader.state)
    except (AdaptError, StateError, EinopsError, re.error) as error:
        raise FileError(f"{folder} does not fit the model: {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a directory's weight file, which must not be a pickle."""
    path = folder / WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise FileError(
            f"{folder} holds its weights as a pickle, adapter_model.bin, which is not read: loading one can run any code. "
            "Convert it where you trust it: load it with PEFT and call save_pretrained."
        )
    return safetensors_io.read(path)[0]
