"""Writing an adapted model as a PEFT directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ... import safetensors_io
from ...adapted_model import AdaptedModel
from . import config as configs
from .formats import kind_of
from .load import WEIGHTS
from .lora import draft_lora
from .table import KINDS
from .writer import PeftWriter


def save(
    adapted: AdaptedModel,
    directory: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter as a directory that PEFT and what reads its format can load. PEFT is not needed.

    The weight file of an adapter that `load` read is the same to the byte as PEFT's own of these tensors. What PEFT's format
    cannot say is refused, so the directory means what the adapted model computes.

    Args:
        adapted: the adapted model. Its parts are of one method that PEFT has, besides fully trained biases and modules,
            and rows of embeddings.
        directory: the folder; it is made if it is not there.
        task_type: PEFT's name for what the model does, e.g. `"CAUSAL_LM"`.
        base_model: where the base comes from; by default what a transformers model says of itself.

    Raises:
        AdaptError: for what the format cannot say, naming it; nothing was written then.

    Example:
        >>> import os, torch, gift_func as gf, tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> directory = tempfile.mkdtemp()
        >>> gf.interop.peft.save(gf.adapt(model, gf.LoRA(rank=2)), directory)
        >>> sorted(os.listdir(directory))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    draft = PeftWriter(adapted)
    kind = kind_of([part.method for part in adapted.parts], KINDS)
    if kind == "LORA":
        draft_lora(draft)
    else:
        KINDS[kind].draft(draft)
    draft.finish()
    data = safetensors_io.to_bytes(draft.tensors, {"format": "pt"})
    root = draft.root
    source = base_model or getattr(root, "name_or_path", None) or None
    about = {"base_model_name_or_path": source, "peft_type": kind, "task_type": task_type}
    if task_type is None:
        about["auto_mapping"] = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    config = {**configs.COMMON, **draft.config, **about}
    text = json.dumps(config, indent=2, sort_keys=True)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_io.write(folder / WEIGHTS, data)
    safetensors_io.write(folder / configs.FILE, text.encode())
