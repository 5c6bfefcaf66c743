"""The file format of PEFT's LoRA: how a file is read and written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import nn

from ...adapter import AdaptedParameter
from ...errors import AdaptError, FileError
from ...methods import Diff, DoRA, LoRA, MixingLoRA, TrainableTokens
from ...methods.lora_init import RESIDUAL
from ...methods.matrix import CONVOLUTIONS, HF_CONV1D
from ...methods.method import is_a
from ...methods.options import first_match
from ...select import Site
from . import config as configs
from .config import Config
from .keys import PREFIX, FileTensor, Paths, by_module, is_target, lora_module, lora_parameter, ties_embeddings
from .reader import PeftReader
from .writer import PeftWriter, plain_number, shared_value

MAGNITUDE = "lora_magnitude_vector"
RESIDUES = ("lora_A0", "lora_B0")


def read_lora_file(reader: PeftReader, given: Config, ignore: Collection[str]) -> None:
    """Read a LoRA file; what is not supported or does not fit is an error."""
    config = configs.complete(given, configs.LORA_KEYS | dict.fromkeys(configs.TIED), ignore, configs.UNSUPPORTED)
    configs.check_lora(config)
    config = configs.resolved(config, reader.base.tree.module)
    if not config["target_modules"] and not config["target_parameters"]:
        raise FileError(f"{configs.FILE} has neither target_modules nor target_parameters")
    modules = [name for name in reader.modules if name and configs.targets(config, name)]
    if config["ensure_weight_tying"]:  # PEFT also adapts the other modules with a tied weight, targeted or not
        places = [site.module_name for name in modules for site in reader.groups.get(f"{name}.weight", [])]
        modules = list(dict.fromkeys([*modules, *places]))
    parameters = _targeted_parameters(reader, config)
    paths = Paths(_wrappers(reader, modules, parameters))
    for name in modules:
        _read_module(reader, config, paths, name)
    for name, params in parameters.items():
        for depth, param_name in enumerate(reversed(params)):
            # The parameter that was registered first is wrapped first, so its wrapper is the innermost.
            path = paths.outside(name) + ".base_layer" * depth
            site = reader.site(name, param_name)
            if site.parameter.ndim not in (2, 3) or isinstance(site.module, CONVOLUTIONS):
                raise FileError(f"target_parameters names {site.name!r}, which is neither a matrix nor a stack of them")
            if config["use_dora"]:
                raise FileError(f"use_dora on {site.name!r}, a parameter targeted by name, for which PEFT has no format")
            reader.place(site, _method_of(config, site.name), lora_parameter(path, site))
    _read_tokens(reader, config, paths)
    reader.save_modules(config["modules_to_save"] or (), paths, bool(config["ensure_weight_tying"]))
    if config["bias"] != "none":
        reader.biases(paths)
    reader.base_weights(paths)


def _method_of(config: Config, key: str, module: nn.Module | None = None) -> LoRA:
    init: Any = config["init_lora_weights"]
    residual = isinstance(init, str) and init.startswith(RESIDUAL)
    if residual and (module is None or not (isinstance(module, nn.Linear) or is_a(module, HF_CONV1D))):
        raise FileError(f"init_lora_weights={init!r} on {key!r}, which PEFT has for linear layers only")
    kind: type[LoRA] = DoRA if config["use_dora"] else LoRA
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        if config["use_dora"]:
            raise FileError(f"use_dora on {key!r}, a convolution of {module.groups} groups, which PEFT's tensors do not fit")
        kind = MixingLoRA
    return kind(
        first_match(config["rank_pattern"] or {}, key, config["r"]),
        alpha=first_match(config["alpha_pattern"], key, config["lora_alpha"]),
        rslora=bool(config["use_rslora"]),
        dropout=config["lora_dropout"],
        init=init if residual else "kaiming",
    )


def _targeted_parameters(reader: PeftReader, config: Config) -> dict[str, list[str]]:
    """The parameters that are targeted by name, by module, in the order of their registration."""
    wanted = config["target_parameters"] or ()
    found = {}
    for name, module in reader.modules.items():
        params = [
            param
            for param, value in module._parameters.items()
            if name and value is not None and configs.matches(wanted, f"{name}.{param}")
        ]
        if params:
            found[name] = params
    return found


def _wrappers(reader: PeftReader, modules: Collection[str], parameters: dict[str, list[str]]) -> dict[str, int]:
    wrappers = {name: len(params) for name, params in parameters.items()}
    for name in modules:
        if name in wrappers:
            raise FileError(f"{name!r} is targeted as a module and by {parameters[name][0]!r}, a parameter of it")
        wrappers[name] = 1
        if isinstance(reader.modules[name], nn.MultiheadAttention):
            wrappers[f"{name}.out_proj"] = 1
    return wrappers


def _read_module(reader: PeftReader, config: Config, paths: Paths, name: str) -> None:
    module = reader.modules[name]
    method = _method_of(config, name, module)
    if not is_target(module):
        raise FileError(f"the config targets {name!r}, a {type(module).__name__}, which LoRA cannot adapt as a module")
    if not isinstance(module, nn.MultiheadAttention):
        sites = [reader.site(name, "weight")]
    elif module.in_proj_weight is None:
        raise FileError(f"the config targets {name!r}, whose query, key and value differ in size: PEFT has no such format")
    elif isinstance(method, DoRA):
        raise FileError(f"use_dora on {name!r}, a MultiheadAttention, for which PEFT has no format")
    else:
        sites = [reader.site(name, "in_proj_weight"), reader.site(f"{name}.out_proj", "weight")]
    for site in sites:
        path = paths.outside(site.module_name)
        file_tensors = lora_module(path, site, twice=site.module_name != name)
        file_tensors += [FileTensor(f"{path}.{MAGNITUDE}", MAGNITUDE)] if isinstance(method, DoRA) else []
        if config["ensure_weight_tying"] and reader.groups[site.name][0].name in reader.methods:
            reader.check_tied(site, file_tensors)
            continue
        reader.place(site, method, file_tensors, tied=bool(config["ensure_weight_tying"]))
        reader.draw(site, method, RESIDUES if method.init.startswith(RESIDUAL) else ())
        if config["lora_bias"]:
            _lora_bias(reader, path, site.module_name, method)


def _lora_bias(reader: PeftReader, path: str, name: str, method: LoRA) -> None:
    module = reader.modules[name]
    if module._parameters.get("bias") is None:
        raise FileError(f"lora_bias adds a bias to {name!r}, a {type(module).__name__}, which has none to add it to")
    reader.place(reader.site(name, "bias"), Diff(scale=method.scale), [FileTensor(f"{path}.lora_B.bias", "diff")])


def _read_tokens(reader: PeftReader, config: Config, paths: Paths) -> None:
    """Read the rows of embeddings that were trained too (`trainable_token_indices`)."""
    wanted = config["trainable_token_indices"]
    if not wanted:
        return
    root = reader.base.tree.module
    if not isinstance(wanted, dict):
        embedding = getattr(root, "get_input_embeddings", lambda: None)()
        name = next((name for name, module in reader.modules.items() if module is embedding), "embed_tokens")
        wanted = {name: wanted}
    for end, tokens in wanted.items():
        for name in [name for name in reader.modules if name and name.endswith(end)]:
            module = reader.modules[name]
            if not isinstance(module, nn.Embedding) or not isinstance(tokens, list):
                raise FileError(f"trainable_token_indices wants {tokens!r} of {name!r}, a {type(module).__name__}")
            file_tensors = [FileTensor(f"{paths.outside(name)}.token_adapter.trainable_tokens_delta", "trainable_tokens_delta")]
            reader.place(reader.site(name, "weight"), TrainableTokens(tokens), file_tensors, tied=ties_embeddings(root))


def write_lora_file(writer: PeftWriter) -> None:
    """Write a LoRA file; what the format cannot express is an error."""
    for part in list(writer.parts.values()):
        _without_residue(writer, part)
    methods = {name: part.method for name, part in writer.parts.items() if isinstance(part.method, LoRA)}
    sites = {name: writer.site(name, tied=writer.can_stay_tied(name)) for name in methods}
    owners = {name: _owner(writer, sites[name].module_name) for name in methods if _is_by_module(writer, sites[name])}
    parameters: dict[str, list[str]] = {}
    for name, site in sites.items():
        if name not in owners:
            if site.parameter.ndim not in (2, 3) or isinstance(site.module, (*CONVOLUTIONS, nn.MultiheadAttention)):
                raise AdaptError(f"PEFT's LoRA has no place for {name!r} of a {type(site.module).__name__}. Save it natively.")
            parameters.setdefault(site.module_name, []).append(site.param_name)
    wrappers = {name: len(params) for name, params in parameters.items()}
    for name, site in sites.items():
        if name in owners:
            wrappers |= {site.module_name: 1, owners[name]: 1}
            if isinstance(writer.modules[owners[name]], nn.MultiheadAttention):
                wrappers[f"{owners[name]}.out_proj"] = 1
    paths = Paths(wrappers)
    dora = shared_value("use_dora", [isinstance(method, DoRA) for method in methods.values()])
    if dora and (parameters or any(isinstance(writer.modules[owner], nn.MultiheadAttention) for owner in owners.values())):
        raise AdaptError("PEFT has no DoRA for nn.MultiheadAttention nor for parameters that it targets by name")
    writer.config |= {**configs.LORA_KEYS, "use_dora": dora}
    _write_numbers(writer, owners, methods, bool(parameters))
    for name, site in sites.items():
        if methods[name].layout == "balanced":
            raise AdaptError(f"PEFT factors the kernel {name!r} as conv='kernel' does, and not as conv='balanced'")
        if getattr(site.module, "groups", 1) > 1 and not isinstance(methods[name], MixingLoRA):
            raise AdaptError(f"PEFT's change of the grouped {name!r} mixes its groups, as gf.MixingLoRA's does")
        path = paths.outside(site.module_name)
        if name in owners:
            file_tensors = lora_module(path, site, twice=owners[name] != site.module_name)
            file_tensors += [FileTensor(f"{path}.{MAGNITUDE}", MAGNITUDE)] if dora else []
            writer.write_tensors(writer.parts[name], file_tensors)
            continue
        params = [param for param in site.module._parameters if param in parameters[site.module_name]]
        path += ".base_layer" * (len(params) - 1 - params.index(site.param_name))
        writer.write_tensors(writer.parts[name], lora_parameter(path, site))
    _write_attention(writer, paths, owners, methods)
    _write_tied(writer, owners, methods)
    writer.set_targets(list(dict.fromkeys(owners.values())))
    writer.config["target_parameters"] = [name for name in sites if name not in owners] or None
    writer.config["fan_in_fan_out"] = any(method.layout == "transposed" for method in methods.values())
    _write_biases(writer, paths, methods)
    for name, part in writer.tokens.items():
        site, method = writer.site(name, ties_embeddings(writer.root)), part.method
        assert isinstance(method, TrainableTokens)
        key = f"{paths.outside(site.module_name)}.token_adapter.trainable_tokens_delta"
        writer.write_tensors(part, [FileTensor(key, "trainable_tokens_delta")])
        indices = writer.config["trainable_token_indices"] or {}
        writer.config["trainable_token_indices"] = {**indices, site.module_name: list(method.token_indices)}
    writer.save_whole(paths, takes_biases=True)


def _without_residue(writer: PeftWriter, part: AdaptedParameter) -> None:
    """Replace `s·(B·A − B₀·A₀)` by one product of twice the rank, which needs no change of the base's weight."""
    method = part.method
    if not isinstance(method, LoRA) or RESIDUES[0] not in part.names:
        return
    a, b, a0, b0 = (writer.state[part.names[name]] for name in ("lora_A", "lora_B", *RESIDUES))
    rank = -1 if method.layout in ("matrix", "transposed", "stacked") else 1
    writer.state[part.names["lora_A"]] = torch.cat([a, a0], dim=-2 if rank == -1 else 0)
    writer.state[part.names["lora_B"]] = torch.cat([b, -b0], dim=rank)
    alpha = method.scale * (sqrt(2 * method.rank) if method.rslora else 2 * method.rank)
    names = {local: name for local, name in part.names.items() if local not in RESIDUES}
    plain = method.replace(rank=2 * method.rank, alpha=alpha, init="kaiming")
    writer.parts[part.name] = replace(part, method=plain, names=names)


def _owner(writer: PeftWriter, module_name: str) -> str:
    """The module that PEFT wraps to adapt this one's weight."""
    above = module_name.rpartition(".")[0]
    inside = isinstance(writer.modules.get(above), nn.MultiheadAttention) and module_name.endswith(".out_proj")
    return above if inside and above else module_name


def _is_by_module(writer: PeftWriter, site: Site) -> bool:
    owner = writer.modules[_owner(writer, site.module_name)]
    if isinstance(owner, nn.MultiheadAttention) and owner.in_proj_weight is None:
        raise AdaptError(f"PEFT has no place for {site.name!r}: query, key and value of its attention differ in size")
    return by_module(site)


def _write_numbers(writer: PeftWriter, owners: dict[str, str], methods: dict[str, LoRA], parameters: bool) -> None:
    """Write ranks, alphas, dropout and `use_rslora`; a module that PEFT adapts as one has one rank."""
    places: dict[str, list[LoRA]] = {}
    for name, method in methods.items():
        places.setdefault(owners.get(name, name), []).append(method)
    rslora = all(method.rslora for method in methods.values())
    ranks = {place: shared_value(f"rank for {place!r}", [m.rank for m in found]) for place, found in places.items()}
    scales = {place: shared_value(f"scale for {place!r}", [m.scale for m in found]) for place, found in places.items()}
    alphas = {}
    for place, found in places.items():
        exact = found[0].rslora == rslora
        alpha = found[0].rank if found[0].alpha is None else found[0].alpha
        alphas[place] = plain_number(alpha if exact else scales[place] * ranks[place])
    dropout = shared_value("dropout", [method.dropout for method in methods.values()])
    if dropout and parameters:
        raise AdaptError("PEFT has no dropout where parameters are targeted by name (target_parameters). Save it natively.")
    writer.config |= {"use_rslora": rslora, "lora_dropout": dropout}
    writer.config["r"] = writer.set_pattern("rank_pattern", ranks)
    writer.config["lora_alpha"] = writer.set_pattern("alpha_pattern", alphas)


def _write_attention(writer: PeftWriter, paths: Paths, owners: dict[str, str], methods: dict[str, LoRA]) -> None:
    """Write a change of zero for a projection that is not adapted, as PEFT adapts both projections of an attention."""
    for name, owner in owners.items():
        module = writer.modules[owner]
        if not isinstance(module, nn.MultiheadAttention):
            continue
        for missing in (f"{owner}.in_proj_weight", f"{owner}.out_proj.weight"):
            if missing not in owners:
                site = writer.groups[missing][0]
                a, b = lora_module(paths.outside(site.module_name), site)
                rows, columns = site.parameter.shape
                writer.tensors[a.key] = site.parameter.new_zeros(methods[name].rank, columns)
                writer.tensors[b.key] = site.parameter.new_zeros(rows, methods[name].rank)


def _write_tied(writer: PeftWriter, owners: dict[str, str], methods: dict[str, LoRA]) -> None:
    """Write a tied weight's factors for each module that has it, as PEFT does."""
    for name in [name for name in owners if len(writer.groups[name]) > 1]:
        if isinstance(methods[name], DoRA):
            raise AdaptError(f"PEFT does not keep a DoRA of the tied {name!r} tied. Save it natively.")
        for site in writer.groups[name][1:]:
            writer.write_tensors(writer.parts[name], lora_module(PREFIX + site.module_name, site))
            owners[site.name] = site.module_name
        writer.config["ensure_weight_tying"] = True


def _write_biases(writer: PeftWriter, paths: Paths, methods: dict[str, LoRA]) -> None:
    """Write the changes of biases; every adapted module must have one, with the scale of its LoRA."""
    if not writer.biases:
        return
    for name, method in methods.items():
        module_name = writer.site(name).module_name
        part = writer.biases.get(f"{module_name}.bias")
        if part is None or not isinstance(part.method, Diff) or part.method.scale != method.scale:
            raise AdaptError(f"PEFT's lora_bias wants a gf.Diff of the LoRA's own scale for the bias of {module_name!r}")
        writer.write_tensors(part, [FileTensor(f"{paths.outside(module_name)}.lora_B.bias", "diff")])
    strange = writer.biases.keys() - {f"{writer.site(name).module_name}.bias" for name in methods}
    if strange:
        raise AdaptError(f"PEFT has no place for the change of {sorted(strange)[0]!r}. Save it natively.")
    writer.config["lora_bias"] = True
