"""Reading a kohya or LyCORIS file onto a model."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from ...adapt import base_of, readapt
from ...adapted_model import AdaptedModel
from ...errors import AdaptError, FileError, StateError
from ...initialise import Shapes
from ...methods import Diff, LoHa, LoKr, LoRA, Method
from ...network.base_view import BaseView
from ...network.frozen_base import FrozenBase
from ...select import Regex, Site
from ...strategy import Placement, Strategy
from .methods import Decomposed, is_host
from .module_tensors import ModuleTensors, Tensors
from .names import Names, Prefix, prefix_of
from .read import contents
from .table import BIASES, kind_of


def load(
    model: nn.Module | FrozenBase | BaseView, path: str | os.PathLike[str], *, prefix: Prefix | None = None
) -> AdaptedModel:
    """Read an adapter of kohya's scripts or of LyCORIS, or one that `save` wrote, onto a model. Nothing is unpickled.

    Read are LoRA (LoCon, with Tucker cores, with alpha or without), LoHa, LoKr, each with DoRA's magnitudes on either side,
    diag-OFT, IA3, and changes in full of weights, biases and norms. Every tensor must have its place in the model; a
    factor of a linear layer may be stored as that of a convolution of size 1, and the other way round.

    Where LyCORIS 4.1 contradicts itself, this follows what its layers compute and not what `merge_to` makes, which scales
    LoHa and LoKr by (alpha / rank)²; and IA3's factors apply to the weight alone, not to the bias.

    Args:
        model: the model the adapter was made for; it is not touched.
        path: the file, safetensors.
        prefix: how the file's names begin before the model's own: `"lora_unet"`, say, or `"lora_te_text_model"` for a
            CLIPTextModel of transformers 5, which has no `text_model` inside any more. For a file that is for several
            models, which module each beginning stands for, with None for what is to be passed over:
            `{"lora_unet": "unet", "lora_te": "text_encoder"}` or `{"lora_unet": "", "lora_te": None}`. By default the
            file's own, if it is one of those in use.

    Returns:
        The adapted model, in the training mode of `model`; what the file holds is trainable, in its element type where the
        method has one of its own.

    Raises:
        FileError: if the file is missing, damaged or a pickle; if a name is that of no module or of several, with the
            nearest; if it holds what is not supported, by its name; if shapes do not fit; if `prefix` leads to no module.
            Nothing was changed then.

    Example:
        >>> import os, tempfile, torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> path = os.path.join(tempfile.mkdtemp(), "lora.safetensors")
        >>> gf.interop.kohya.save(gf.adapt(model, {"1": gf.LoRA(rank=2)}), path)
        >>> list(gf.interop.kohya.load(model, path).adapter)
        ['1.lora_B', '1.lora_A']
    """
    tensors, _ = contents(path)
    base = base_of(model)
    try:
        groups, plan = grouped(tensors), KohyaReader(base)
        names = Names(base.tree.modules, prefix_of(groups) if prefix is None else prefix)
        for called, own in groups.items():
            if not names.passes_over(called):
                plan.read(ModuleTensors(called, own), names.module(called))
        if not plan.methods:
            raise FileError("the file adapts nothing" + (" but what is to be passed over" if groups else ""))
        return readapt(base, plan.strategy(), plan.state)
    except (AdaptError, StateError, FileError) as error:
        raise FileError(f"{os.fspath(path)} does not fit the model: {error}") from None


def grouped(tensors: Tensors) -> dict[str, Tensors]:
    """A file's tensors by module, and by what comes after its name.

    Raises:
        FileError: for a name without a dot.
    """
    groups: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        called, dot, name = key.partition(".")
        if not dot:
            raise FileError(
                f"the file holds {key!r}, and a kohya file's names are '<module>.<tensor>', the module's without dots"
            )
        groups.setdefault(called, {})[name] = tensor
    return groups


class KohyaReader:
    """What a file's tensors become: methods by parameter, and the adapter's state.

    Args:
        base: the base they are for.
    """

    def __init__(self, base: FrozenBase) -> None:
        self.groups = {site.name: group for group in base.sites() for site in group}
        self.state: Tensors = {}
        self.methods: dict[str, Method] = {}

    def read(self, found: ModuleTensors, module_name: str) -> None:
        """Find a place for all that a file holds for one module.

        Raises:
            FileError: if something has none.
        """
        for name in BIASES:
            if name in found.left:
                self.place(self.site(found, module_name, "bias"), Diff(), {"diff": found.take(name)}, found)
        if not found.left:
            return
        site, kind = self.site(found, module_name, "weight"), kind_of(found)
        if not is_host(site.module) and not kind.marks <= {"diff", "w_norm"}:
            raise FileError(
                f"{found.called} holds {kind.label} for {module_name!r}, a {type(site.module).__name__}, and such files adapt "
                "Linear, Conv1d, Conv2d and Conv3d"
            )
        method, tensors = kind.read(found, site)
        self.place(site, method, tensors, found)

    def site(self, found: ModuleTensors, module_name: str, param_name: str) -> Site:
        """The site of a module's weight or bias.

        Raises:
            FileError: if the module has none, or it is tied to another module's.
        """
        name = f"{module_name}.{param_name}" if module_name else param_name
        if name not in self.groups:
            raise FileError(f"{found.called} changes the {param_name} of {module_name!r}, which has none")
        group = self.groups[name]
        site = next(site for site in group if site.name == name)
        others = [other.name for other in group if other.module is not site.module]
        if others:
            raise FileError(
                f"{found.called} adapts {name!r} alone, and in this model it is one with {', '.join(others)}: a tied parameter "
                "stays tied here. Untie them in the model (a copy of the parameter in one place)."
            )
        return site

    def place(self, site: Site, method: Method, tensors: Tensors, found: ModuleTensors) -> None:
        """Adapt a parameter by tensors of the file.

        Raises:
            FileError: if the method cannot adapt it, or a tensor has another size than it asks for.
        """
        if found.left and site.param_name == "weight":
            raise FileError(f"{found.called} also holds {next(iter(found.left))!r}, for which there is no use")
        name = self.groups[site.name][0].name
        if name in self.methods:
            raise FileError(f"the file adapts {name!r} twice, the second time as {found.called}")
        lack = method.why_not(site)
        if lack is not None:
            raise FileError(f"{found.called} would adapt {site.name!r} by {method}, which needs {lack}")
        method = held(method, site.parameter.dtype, tensors)
        bare = replace(site, parameter=torch.empty(site.parameter.shape, dtype=site.parameter.dtype, device="meta"))
        placement = Placement(name, bare, method.for_site(bare), method)
        wanted = Shapes(torch.Generator()).own(placement)
        if wanted.keys() != tensors.keys():
            odd = sorted(wanted.keys() ^ tensors.keys())[0]
            raise FileError(f"{found.called} would adapt {site.name!r} by {method}, which fits the file but for {odd!r}")
        for local, like in wanted.items():
            self.state[placement.full_name(local)] = fitted(tensors[local], like.shape, local, found)
        self.methods[name] = method

    def strategy(self) -> Strategy:
        """The rules that lead to these places."""
        names: dict[Method, list[str]] = {}
        for name, method in self.methods.items():
            names.setdefault(method, []).append(re.escape(name))
        return Strategy([(Regex("|".join(found)), method) for method, found in names.items()])


def held(method: Method, dtype: torch.dtype, tensors: Tensors) -> Method:
    """The method, holding its tensors in the widest of the file's element types if it can and the parameter's is another."""
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    if isinstance(method, Decomposed):
        return method.replace(of=held(method.of, dtype, tensors))
    return method.replace(dtype=widest) if isinstance(method, (LoRA, LoHa, LoKr)) and widest != dtype else method


def fitted(tensor: Tensor, shape: torch.Size, local: str, found: ModuleTensors) -> Tensor:
    """A file's tensor in our shape, from which it may differ by dimensions of size 1 and by a flattened kernel.

    Raises:
        FileError: if it differs otherwise.
    """
    same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    flat = tensor.ndim > len(shape) == 2 and tensor.flatten(1).shape == shape
    if not same and not flat:
        raise FileError(f"{found.called} is to have {local} of shape {tuple(shape)}, and has {tuple(tensor.shape)}")
    return tensor.reshape(shape)
