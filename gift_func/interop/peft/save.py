"""Writing an adapted model as a PEFT directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ... import safetensors_io
from ...adapted_model import AdaptedModel
from . import config as configs
from .file_format import peft_type_of
from .formats import PEFT_FORMATS
from .load import WEIGHTS
from .lora import write_lora_file
from .writer import PeftWriter


def save(
    adapted: AdaptedModel,
    directory: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter as a directory that PEFT, and programs that read its format, can load. PEFT is not needed.

    The weight file of an adapter that `load` read is the same to the byte as PEFT's own of these tensors. What PEFT's format
    cannot express raises an error, so the directory means what the adapted model computes.

    Args:
        adapted: the adapted model. Its parts are of one method that PEFT has, besides fully trained biases and modules,
            and rows of embeddings.
        directory: the folder; it is made if it is not there.
        task_type: PEFT's name for what the model does, e.g. `"CAUSAL_LM"`.
        base_model: the base's name or path; by default a transformers model's own `name_or_path`.

    Raises:
        AdaptError: for what the format cannot express, naming it; nothing was written then.

    Example:
        >>> import os, torch, gift_func as gf, tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> directory = tempfile.mkdtemp()
        >>> gf.interop.peft.save(gf.adapt(model, gf.LoRA(rank=2)), directory)
        >>> sorted(os.listdir(directory))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    writer = PeftWriter(adapted)
    peft_type = peft_type_of([part.method for part in adapted.adapted_parameters], PEFT_FORMATS)
    if peft_type == "LORA":
        write_lora_file(writer)
    else:
        PEFT_FORMATS[peft_type].write_file(writer)
    writer.check()
    data = safetensors_io.to_bytes(writer.tensors, {"format": "pt"})
    root = writer.root
    source = base_model or getattr(root, "name_or_path", None) or None
    about = {"base_model_name_or_path": source, "peft_type": peft_type, "task_type": task_type}
    if task_type is None:
        about["auto_mapping"] = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    config = {**configs.COMMON_KEYS, **writer.config, **about}
    text = json.dumps(config, indent=2, sort_keys=True)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_io.write(folder / WEIGHTS, data)
    safetensors_io.write(folder / configs.FILE, text.encode())
