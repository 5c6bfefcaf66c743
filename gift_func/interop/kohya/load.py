"""Reading a kohya or LyCORIS file onto a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ... import safetensors_io
from ...adapt import base_of, readapt
from ...adapted_model import AdaptedModel
from ...errors import AdaptError, FileError, StateError
from ...network.base_view import BaseView
from ...network.frozen_base import FrozenBase
from ..strategy_of import strategy_of
from .module_tensors import ModuleTensors, TensorDict
from .names import ModuleNames, Prefix, prefix_of
from .reader import KohyaReader


def load(
    model: nn.Module | FrozenBase | BaseView, path: str | os.PathLike[str], *, prefix: Prefix | None = None
) -> AdaptedModel:
    """Read an adapter of kohya's scripts or of LyCORIS, or one that `save` wrote, onto a model. Nothing is unpickled.

    It reads LoRA (LoCon, with Tucker cores, with alpha or without), LoHa, LoKr, each with DoRA's magnitudes on either side,
    diag-OFT, IA3, and full changes of weights, biases and norms. Every tensor must belong to a parameter of the model; a
    factor of a linear layer may be stored as that of a convolution of size 1, and vice versa.

    Where LyCORIS 4.1 contradicts itself, this follows what its layers compute and not what `merge_to` makes, which scales
    LoHa and LoKr by (alpha / rank)²; and IA3's factors apply to the weight alone, not to the bias.

    Args:
        model: the model the adapter was made for; it is not changed.
        path: the file, safetensors.
        prefix: how the file's names begin before the model's own: `"lora_unet"`, say, or `"lora_te_text_model"` for a
            CLIPTextModel of transformers 5, which has no `text_model` inside any more. For a file that is for several
            models, which module each beginning stands for, with None for those to skip:
            `{"lora_unet": "unet", "lora_te": "text_encoder"}` or `{"lora_unet": "", "lora_te": None}`. By default the
            file's own, if it is one of those in use.

    Returns:
        The adapted model, in the training mode of `model`; the file's tensors are trainable, in their dtype if the method has
        a field for it.

    Raises:
        FileError: if the file is missing, damaged or a pickle; if a name is that of no module or of several, with the
            nearest names; if it contains what is not supported, naming it; if shapes do not fit; if a module of `prefix` does
            not exist.

    Example:
        >>> import os, tempfile, torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> path = os.path.join(tempfile.mkdtemp(), "lora.safetensors")
        >>> gf.interop.kohya.save(gf.adapt(model, {"1": gf.LoRA(rank=2)}), path)
        >>> list(gf.interop.kohya.load(model, path).adapter)
        ['1.lora_B', '1.lora_A']
    """
    with _pickles_named(Path(path)):
        tensors, _ = safetensors_io.read(Path(path))
    base = base_of(model)
    try:
        groups, reader = grouped_by_module(tensors), KohyaReader(base)
        names = ModuleNames(base.tree.modules, prefix_of(groups) if prefix is None else prefix)
        for flat_name, own in groups.items():
            if not names.skips(flat_name):
                reader.read(ModuleTensors(flat_name, own), names.module(flat_name))
        if not reader.methods:
            raise FileError("the file adapts nothing" + (" but what is to be passed over" if groups else ""))
        return readapt(base, strategy_of(reader.methods), reader.state)
    except (AdaptError, StateError, FileError) as error:
        raise FileError(f"{os.fspath(path)} does not fit the model: {error}") from None


def grouped_by_module(tensors: TensorDict) -> dict[str, TensorDict]:
    """A file's tensors by module, and by the rest of their names."""
    groups: dict[str, TensorDict] = {}
    for key, tensor in tensors.items():
        flat_name, dot, name = key.partition(".")
        if not dot:
            raise FileError(
                f"the file holds {key!r}, and a kohya file's names are '<module>.<tensor>', the module's without dots"
            )
        groups.setdefault(flat_name, {})[name] = tensor
    return groups


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file: how it was trained (`ss_...`), and anything else that the program that wrote it added.

    `load` does not depend on it: it reads rank and alpha from the tensors.

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
    with _pickles_named(Path(path)):
        return safetensors_io.read_metadata(Path(path))


@contextmanager
def _pickles_named(path: Path) -> Iterator[None]:
    """Raise an error that says so if the file cannot be read because it is a pickle, as older files are."""
    try:
        yield
    except FileError:
        start = b""
        if path.is_file():
            with open(path, "rb") as file:
                start = file.read(2)
        if start in (b"PK", b"\x80\x02"):
            raise FileError(
                f"{path} is a pickle, which is not read: loading one can run any code. Convert it to safetensors where you "
                "trust it."
            ) from None
        raise
