"""The file formats of methods that need more than a row of the table."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...errors import AdaptError, FileError
from ...initialise import shared_name
from ...methods import AdaLoRA, NormTuning, TrainableTokens, VeRA, WeightMethod
from ...methods.matrix import matrix_shape
from ...select import Site
from . import config as configs
from .config import Config
from .file_format import FileFormat
from .keys import FileTensor, Paths, ties_embeddings, transposed
from .reader import PeftReader
from .writer import PeftWriter, plain_number, shared_value

PROJECTIONS = ("vera_A", "vera_B")


class IA3Format(FileFormat):
    """IA3's config names the modules whose input is scaled; of the others the bias is scaled too, as by `gf.IA3`."""

    def config_at(self, config: Config, name: str) -> Config:
        wanted = config["feedforward_modules"] or ()
        inside = re.fullmatch(wanted, name) if isinstance(wanted, str) else any(name.endswith(end) for end in wanted)
        return {**config, "side": "input" if inside else "output"}

    def write_extras(self, writer: PeftWriter, paths: Paths, sites: Mapping[str, Site]) -> None:
        sides = {site.module_name: writer.parts[name].method.side for name, site in sites.items()}  # type: ignore[attr-defined]
        inputs = sorted(name for name, side in sides.items() if side == "input")
        # In PEFT they must be among the target_modules, in the same words, and match any end of a name.
        clear = not any(name.endswith(end) for end in inputs for name, side in sides.items() if side == "output")
        others = [name for name in writer.modules if name not in sides]
        clear = clear and not any(configs.matches(sides, name) for name in others)
        writer.config["target_modules"] = sorted(sides) if clear else "|".join(map(re.escape, sorted(sides)))
        writer.config["feedforward_modules"] = inputs if clear else "|".join(map(re.escape, inputs)) or "(?!)"
        for name, site in sites.items():
            bias = name.removesuffix("weight") + "bias"
            scaled = writer.biases.pop(bias, None)
            if sides[site.module_name] == "output" and bias in writer.groups and scaled is None:
                raise AdaptError(f"PEFT's IA3 scales {bias!r} along with the weight, and here it is adapted otherwise")


class NormFormat(FileFormat):
    """LN_TUNING's files have whole modules."""

    def place(self, reader: PeftReader, config: Config, path: str, name: str) -> None:
        module = reader.modules[name]
        for param_name, _ in module.named_parameters():
            owner, _, short = param_name.rpartition(".")
            site = reader.site(f"{name}.{owner}" if owner else name, short)
            reader.place(site, NormTuning(), [FileTensor(f"{path}.ln_tuning_layers.{param_name}", "")])
        for key in module.state_dict():
            if f"{path}.ln_tuning_layers.{key}" in reader.remaining:
                reader.state[f"{name}.{key}"] = reader.take(f"{path}.ln_tuning_layers.{key}")

    def write_file(self, writer: PeftWriter) -> None:
        names = {writer.site(name).module_name: None for name in writer.whole}
        paths = Paths(dict.fromkeys(names, 1))
        for name in names:
            writer.save_module(name, f"{paths.outside(name)}.ln_tuning_layers")
        writer.config |= self.known
        writer.set_targets(list(names))
        writer.check_buffers(tuple(f"{name}." for name in names))


class TokensFormat(FileFormat):
    """TRAINABLE_TOKENS finds the embedding itself, and changes a tied head with it."""

    @property
    def known(self) -> Config:
        return {"target_modules": None, **self.keys}

    def full_config(self, given: Config, ignore: Collection[str]) -> Config:
        config = super().full_config(given, ignore)
        return {**config, "modules_to_save": None, "target_modules": config["target_modules"] or ["embed_tokens"]}

    def place(self, reader: PeftReader, config: Config, path: str, name: str) -> None:
        site, method = reader.site(name, "weight"), TrainableTokens(config["token_indices"])
        tied = ties_embeddings(reader.base.tree.module)
        reader.place(site, method, self.file_tensors(path, site, method), tied=tied)

    def write_file(self, writer: PeftWriter) -> None:
        writer.parts, writer.tokens = writer.tokens, {}
        writer.tied = ties_embeddings(writer.root)
        if writer.whole:
            raise AdaptError(f"PEFT's TRAINABLE_TOKENS has no place for {next(iter(writer.whole))!r}, trained whole beside it")
        super().write_file(writer)
        del writer.config["modules_to_save"]


class VeRAFormat(FileFormat):
    """VERA shares its projections among all modules; they need not be in a file, and are then drawn again."""

    def read_file(self, reader: PeftReader, given: Config, ignore: Collection[str]) -> None:
        super().read_file(reader, given, ignore)
        config = self.full_config(given, ignore)
        ranks = {tensor.shape[-1] for name, tensor in reader.state.items() if name.endswith("vera_lambda_d")}
        if not ranks <= {config["r"]}:
            raise FileError(f"{configs.FILE} has r={config['r']}, and the file's tensors are of rank {max(ranks)}")
        # One rule for each dtype of the adapted weights, and so projections for each.
        rules: dict[VeRA, list[Site]] = {}
        for name in reader.base.tree.places:
            method = reader.methods.get(name)
            if isinstance(method, VeRA):
                rules.setdefault(method, []).append(reader.groups[name][0])
        every = [site for sites in rules.values() for site in sites]
        if config["save_projection"]:
            shared = {name: reader.take(f"base_model.{name}") for name in PROJECTIONS}
        else:
            shared = next(iter(rules)).shared_tensors(every) if rules else {}
        for index, (rule, sites) in enumerate(rules.items()):
            shapes = [matrix_shape(site.parameter.shape, rule.for_site(site).layout)[-2:] for site in sites]
            rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
            for name, tensor in shared.items():
                own = tensor[:, :columns] if name == "vera_A" else tensor[:rows]
                reader.state[shared_name(name, index)] = tensor if len(rules) == 1 else own

    def write_extras(self, writer: PeftWriter, paths: Paths, sites: Mapping[str, Site]) -> None:
        for local in PROJECTIONS:
            found = [writer.state[name] for name in dict.fromkeys(writer.parts[site].names[local] for site in sites)]
            widest = max(found, key=Tensor.numel)
            for tensor in found:
                rows, columns = tensor.shape
                if not torch.equal(widest[:rows, :columns].to(tensor.dtype), tensor):
                    raise AdaptError(
                        f"PEFT keeps one {local} for all places, and the rules of this adapter have different ones. Adapt "
                        "them by one rule, or save it natively."
                    )
            writer.tensors[f"base_model.{local}"] = widest


class HiRAFormat(FileFormat):
    """HIRA stores the factors of an embedding transposed, as LORA does, and the rank follows from the tensors.

    PEFT reads its rank_pattern, but does not use it: every module has rank r.
    """

    def place(self, reader: PeftReader, config: Config, path: str, name: str) -> None:
        found = reader.remaining.get(f"{path}.hira_A", reader.remaining.get(f"{path}.hira_embedding_A"))
        super().place(reader, config if found is None else {**config, "r": found.shape[0]}, path, name)

    def file_tensors(self, path: str, site: Site, method: WeightMethod) -> list[FileTensor]:
        if not isinstance(site.module, nn.Embedding):
            return super().file_tensors(path, site, method)
        return [
            FileTensor(f"{path}.hira_embedding_A", "hira_B", transposed, transposed),
            FileTensor(f"{path}.hira_embedding_B", "hira_A", transposed, transposed),
        ]


class AdaLoRAFormat(FileFormat):
    """ADALORA drops ranks while it trains: the tensors have those that are left, and the scale stays that of init_r."""

    def place(self, reader: PeftReader, config: Config, path: str, name: str) -> None:
        found = reader.remaining.get(f"{path}.lora_E")
        rank = config["init_r"] if found is None else found.shape[0]
        config_at = {**config, "init_r": rank, "lora_alpha": config["lora_alpha"] * rank / max(config["init_r"], 1)}
        super().place(reader, config_at, path, name)

    def write_extras(self, writer: PeftWriter, paths: Paths, sites: Mapping[str, Site]) -> None:
        methods = {site.module_name: writer.parts[name].method for name, site in sites.items()}
        ranks = {name: method.rank for name, method in methods.items() if isinstance(method, AdaLoRA)}
        scales = [(method.alpha or method.rank) / method.rank for method in methods.values() if isinstance(method, AdaLoRA)]
        widest = max(ranks.values())
        writer.config["init_r"] = writer.config["target_r"] = widest
        writer.config["lora_alpha"] = plain_number(shared_value("scale", [round(scale, 12) for scale in scales]) * widest)
        if min(ranks.values()) < widest:
            writer.config["rank_pattern"] = {
                f"{name}.lora_E": [index < rank for index in range(widest)] for name, rank in ranks.items()
            }
