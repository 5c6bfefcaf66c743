"""Writing an adapted model as a kohya or LyCORIS file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import safetensors_io
from ...adapted_model import AdaptedModel
from ...adapter import AdaptedParameter
from ...errors import AdaptError
from ...methods import Diff, DoRA, Full, LoHa, LoKr, LoRA, WeightMethod
from ...methods.ia3 import ScaledBias
from ...methods.norm_tuning import is_norm
from ...select import Site
from .formats import WRITERS, change_of
from .methods import Decomposed, is_host
from .module_tensors import TensorDict
from .names import ModuleNames, Prefix

NATIVELY = "Save it natively (gf.save_adapter), or merge() it and save the model."


def save(
    adapted: AdaptedModel,
    path: str | os.PathLike[str],
    *,
    prefix: Prefix = "lycoris",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter as a safetensors file that LyCORIS, and programs that read kohya's files, can load.

    The tensors keep their dtypes. Parameters that were trained whole are written as their change, `θ − W`, rounded once.
    LyCORIS reads a bias only together with its weight, so for a bias that was trained alone a weight of zeros is written.
    What the format cannot express raises an error, so the file means what the adapted model computes.

    Args:
        adapted: the adapted model: LoRA, DoRA, LoHa, LoKr, OFT on the output side, and what `load` makes, of the weights
            of Linear, Conv1d, Conv2d and Conv3d; and parameters trained whole of these and of norm layers.
        path: the file, `*.safetensors` by convention.
        prefix: how names begin in the file: `"lora_unet"`, `"lora_te"`; LyCORIS's own wrapper reads `"lycoris"`. For a
            model made of several, one for each: `{"lora_unet": "unet", "lora_te": "text_encoder"}`.
        metadata: further metadata (`ss_base_model_version`, say), or other values for what is written by default:
            `ss_network_module`, `ss_network_dim`, `ss_network_alpha`, `ss_network_args`, `sshs_model_hash`.

    Raises:
        AdaptError: for what the format cannot express, naming it; nothing was written then.

    Example:
        >>> import os, tempfile, torch, gift_func as gf
        >>> from safetensors.torch import load_file
        >>> path = os.path.join(tempfile.mkdtemp(), "lora.safetensors")
        >>> gf.interop.kohya.save(gf.adapt(torch.nn.Sequential(torch.nn.Linear(4, 2)), gf.LoRA(rank=1)), path)
        >>> sorted(load_file(path))
        ['lycoris_0.alpha', 'lycoris_0.lora_down.weight', 'lycoris_0.lora_up.weight']
    """
    data = safetensors_io.to_bytes(tensors_of(adapted, prefix))
    # The hash by which kohya's scripts identify a network.
    model_hash = hashlib.sha256(safetensors_io.without_header(data)).hexdigest()
    about = {**network_metadata(adapted), "sshs_model_hash": model_hash, **(metadata or {})}
    safetensors_io.write(Path(path), safetensors_io.with_metadata(data, {key: str(value) for key, value in about.items()}))


def tensors_of(adapted: AdaptedModel, prefix: Prefix) -> TensorDict:
    """The file's tensors; what the format cannot express is an error."""
    base = adapted.frozen_base
    if base.slots:
        raise AdaptError(f"the model was adapted on top of another adapter, which the file would leave out. {NATIVELY}")
    names = ModuleNames(base.tree.modules, prefix)
    groups = {site.name: group for group in base.sites() for site in group}
    state = adapted.adapter_state_dict()
    buffer = next(iter(sorted(state.keys() - adapted.adapter.keys())), None)
    if buffer is not None:
        raise AdaptError(f"the buffer {buffer!r} differs from the base's, and the file has no place for it. {NATIVELY}")
    made: TensorDict = {}
    beside: list[tuple[str, Tensor, Site]] = []
    for part in adapted.adapted_parameters:
        site = _site_of(part, groups)
        flat_name = names.flat_name(site.module_name)
        own = {local: state[name] for local, name in part.names.items()}
        weight = base.weights[part.name].dense()
        if site.param_name == "bias" and isinstance(part.method, (Diff, Full)):
            beside.append((flat_name, change_of(part.method, own, weight), site))
            continue
        writer = _writer(part.method, site)
        made |= {f"{flat_name}.{name}": tensor for name, tensor in writer(part.method, own, site, weight).items()}
    for flat_name, change, site in beside:
        made |= _bias_change(flat_name, change, site, made)
    return made


def network_metadata(adapted: AdaptedModel) -> dict[str, str]:
    """The metadata that programs look for: the kind of network, its dimension and its alpha."""
    methods = [part.method.of if isinstance(part.method, Decomposed) else part.method for part in adapted.adapted_parameters]
    algos = [WRITERS[type(method)][0] for method in methods if type(method) in WRITERS]
    main = next((algo for algo in algos if algo != "full"), "full")
    ranked = [method for method in methods if isinstance(method, (LoRA, LoHa, LoKr))]
    ranks, alphas = {method.rank for method in ranked}, {method.scale * method.rank for method in ranked}
    args: dict[str, Any] = {"algo": main}
    if any(isinstance(part.method, (Decomposed, DoRA)) for part in adapted.adapted_parameters):
        args["dora_wd"] = "True"
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic" if ranks else "None",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic" if alphas else "None",
        "ss_network_args": json.dumps(args),
    }


def _site_of(part: AdaptedParameter, groups: Mapping[str, list[Site]]) -> Site:
    if part.name not in groups:
        raise AdaptError(f"{part.name!r} belongs to a module that an action put in, which no such file can hold. {NATIVELY}")
    group = groups[part.name]
    others = [site.name for site in group[1:] if site.module is not group[0].module]
    if others:
        raise AdaptError(
            f"{part.name!r} is one with {', '.join(others)}, and LyCORIS would adapt one of them alone. {NATIVELY}"
        )
    return group[0]


def _writer(method: WeightMethod, site: Site) -> Any:
    if type(method) not in WRITERS:
        if isinstance(method, ScaledBias):
            raise AdaptError(
                f"{site.name!r} is scaled along with its weight, as in IA3's paper, and LyCORIS scales the weight alone. Use "
                "gf.interop.kohya.WeightIA3."
            )
        raise AdaptError(f"LyCORIS's files have no place for {type(method).__name__}, which adapts {site.name!r}. {NATIVELY}")
    direct = isinstance(method, (Diff, Full)) and is_norm(site.module)
    if site.param_name != "weight" or not (is_host(site.module) or direct):
        raise AdaptError(
            f"{site.name!r} of a {type(site.module).__name__} has no place in LyCORIS's files, which adapt weights of Linear, "
            f"Conv1d, Conv2d, Conv3d, and norm layers in full. {NATIVELY}"
        )
    return WRITERS[type(method)][1]


def _bias_change(flat_name: str, change: Tensor, site: Site, made: TensorDict) -> TensorDict:
    """The change of a bias, which LyCORIS reads only together with a full change of its weight."""
    norm = is_norm(site.module)
    if not norm and not is_host(site.module):
        raise AdaptError(f"{site.name!r} of a {type(site.module).__name__} has no place in LyCORIS's files. {NATIVELY}")
    name, partner = ("b_norm", "w_norm") if norm else ("diff_b", "diff")
    whole = f"{flat_name}.{partner}"
    if whole in made:
        return {f"{flat_name}.{name}": change}
    if any(key.startswith(f"{flat_name}.") for key in made):
        raise AdaptError(
            f"{site.name!r} is trained beside another change of its layer's weight, and LyCORIS reads a bias only beside a "
            f"weight that is trained whole. {NATIVELY}"
        )
    weight = site.module._parameters["weight"]
    assert weight is not None
    return {whole: torch.zeros_like(weight, dtype=change.dtype), f"{flat_name}.{name}": change}
