"""Methods of PEFT whose files need more than a row of the table says."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...errors import AdaptError, FileError
from ...initialise import common_name
from ...methods import AdaLoRA, Method, NormTuning, TrainableTokens, VeRA
from ...methods.layout import layout_of, matrix_of
from ...select import Site
from . import config as configs
from .config import Config
from .formats import FileFormat
from .keys import Entry, Paths, flipped
from .reader import PeftReader
from .writer import PeftWriter, number, one

PROJECTIONS = ("vera_A", "vera_B")


class IA3Kind(FileFormat):
    """IA3 names the modules whose input it scales; of the others it scales the bias along, as ours does by itself."""

    def settled(self, config: Config, name: str) -> Config:
        wanted = config["feedforward_modules"] or ()
        inside = re.fullmatch(wanted, name) if isinstance(wanted, str) else any(name.endswith(end) for end in wanted)
        return {**config, "side": "input" if inside else "output"}

    def beside(self, draft: PeftWriter, paths: Paths, sites: Mapping[str, Site]) -> None:
        sides = {site.module_name: draft.parts[name].method.side for name, site in sites.items()}  # type: ignore[attr-defined]
        inputs = sorted(name for name, side in sides.items() if side == "input")
        # PEFT wants them to be among the target_modules, letter by letter, and matches any end of a name.
        clear = not any(name.endswith(end) for end in inputs for name, side in sides.items() if side == "output")
        others = [name for name in draft.modules if name not in sides]
        clear = clear and not any(configs.matches(sides, name) for name in others)
        draft.config["target_modules"] = sorted(sides) if clear else "|".join(map(re.escape, sorted(sides)))
        draft.config["feedforward_modules"] = inputs if clear else "|".join(map(re.escape, inputs)) or "(?!)"
        for name, site in sites.items():
            bias = name.removesuffix("weight") + "bias"
            scaled = draft.biases.pop(bias, None)
            if sides[site.module_name] == "output" and bias in draft.groups and scaled is None:
                raise AdaptError(f"PEFT's IA3 scales {bias!r} along with the weight, and here it is adapted otherwise")


class NormKind(FileFormat):
    """LN_TUNING holds whole modules."""

    def place(self, plan: PeftReader, config: Config, path: str, name: str) -> None:
        module = plan.modules[name]
        for param_name, _ in module.named_parameters():
            owner, _, short = param_name.rpartition(".")
            site = plan.site(f"{name}.{owner}" if owner else name, short)
            plan.place(site, NormTuning(), [Entry(f"{path}.ln_tuning_layers.{param_name}", "")])
        for key in module.state_dict():
            if f"{path}.ln_tuning_layers.{key}" in plan.left:
                plan.state[f"{name}.{key}"] = plan.take(f"{path}.ln_tuning_layers.{key}")

    def draft(self, draft: PeftWriter) -> None:
        names = {draft.site(name).module_name: None for name in draft.whole}
        paths = Paths(dict.fromkeys(names, 1))
        for name in names:
            draft.save_module(name, f"{paths.outside(name)}.ln_tuning_layers")
        draft.config |= self.known
        draft.target(list(names))
        draft.lose_nothing(tuple(f"{name}." for name in names))


class TokensKind(FileFormat):
    """TRAINABLE_TOKENS finds the embedding itself, and lets a tied head follow."""

    @property
    def known(self) -> Config:
        return {"target_modules": None, **self.keys}

    def read(self, given: Config, ignore: Collection[str]) -> Config:
        config = super().read(given, ignore)
        return {**config, "modules_to_save": None, "target_modules": config["target_modules"] or ["embed_tokens"]}

    def place(self, plan: PeftReader, config: Config, path: str, name: str) -> None:
        tied = bool(getattr(getattr(plan.base.tree.module, "config", None), "tie_word_embeddings", False))
        method = TrainableTokens(config["token_indices"])
        plan.place(plan.site(name, "weight"), method, self.entries(path, plan.site(name, "weight"), method), tied=tied)

    def draft(self, draft: PeftWriter) -> None:
        tied = bool(getattr(getattr(draft.root, "config", None), "tie_word_embeddings", False))
        draft.parts, draft.tokens = draft.tokens, {}
        draft.tied = tied
        if draft.whole:
            raise AdaptError(f"PEFT's TRAINABLE_TOKENS has no place for {next(iter(draft.whole))!r}, trained whole beside it")
        super().draft(draft)
        del draft.config["modules_to_save"]


class VeRAKind(FileFormat):
    """VERA shares its projections among all places; a file may leave them to be drawn again."""

    def plan(self, plan: PeftReader, given: Config, ignore: Collection[str]) -> None:
        super().plan(plan, given, ignore)
        config = self.read(given, ignore)
        ranks = {tensor.shape[-1] for name, tensor in plan.state.items() if name.endswith("vera_lambda_d")}
        if not ranks <= {config["r"]}:
            raise FileError(f"{configs.FILE} has r={config['r']}, and the file's tensors are of rank {max(ranks)}")
        # One rule for each element type that the places have here, and so projections for each.
        rules: dict[VeRA, list[Site]] = {}
        for name in plan.base.tree.places:
            method = plan.methods.get(name)
            if isinstance(method, VeRA):
                rules.setdefault(method, []).append(plan.groups[name][0])
        every = [site for sites in rules.values() for site in sites]
        if config["save_projection"]:
            shared = {name: plan.take(f"base_model.{name}") for name in PROJECTIONS}
        else:
            shared = next(iter(rules)).shared_tensors(every) if rules else {}
        for index, sites in enumerate(rules.values()):
            shapes = [matrix_of(site.parameter.shape, layout_of(site))[1:] for site in sites]
            rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
            for name, tensor in shared.items():
                own = tensor[:, :columns] if name == "vera_A" else tensor[:rows]
                plan.state[common_name(name, index)] = tensor if len(rules) == 1 else own

    def beside(self, draft: PeftWriter, paths: Paths, sites: Mapping[str, Site]) -> None:
        for local in PROJECTIONS:
            found = [draft.state[name] for name in dict.fromkeys(draft.parts[site].names[local] for site in sites)]
            widest = max(found, key=Tensor.numel)
            for tensor in found:
                rows, columns = tensor.shape
                if not torch.equal(widest[:rows, :columns].to(tensor.dtype), tensor):
                    raise AdaptError(
                        f"PEFT keeps one {local} for all places, and the rules of this adapter have different ones. Adapt "
                        "them by one rule, or save it natively."
                    )
            draft.tensors[f"base_model.{local}"] = widest


class HiRAKind(FileFormat):
    """HIRA keeps the factors of an embedding transposed, as LORA does, and the tensors tell the rank.

    PEFT reads its rank_pattern and makes every place of rank r all the same.
    """

    def place(self, plan: PeftReader, config: Config, path: str, name: str) -> None:
        found = plan.left.get(f"{path}.hira_A", plan.left.get(f"{path}.hira_embedding_A"))
        super().place(plan, config if found is None else {**config, "r": found.shape[0]}, path, name)

    def entries(self, path: str, site: Site, method: Method) -> list[Entry]:
        if not isinstance(site.module, nn.Embedding):
            return super().entries(path, site, method)
        return [
            Entry(f"{path}.hira_embedding_A", "hira_B", flipped, flipped),
            Entry(f"{path}.hira_embedding_B", "hira_A", flipped, flipped),
        ]


class AdaLoRAKind(FileFormat):
    """ADALORA drops ranks while it trains: the tensors tell how many are left, and the scale stays that of init_r."""

    def place(self, plan: PeftReader, config: Config, path: str, name: str) -> None:
        found = plan.left.get(f"{path}.lora_E")
        rank = config["init_r"] if found is None else found.shape[0]
        settled = {**config, "init_r": rank, "lora_alpha": config["lora_alpha"] * rank / max(config["init_r"], 1)}
        super().place(plan, settled, path, name)

    def beside(self, draft: PeftWriter, paths: Paths, sites: Mapping[str, Site]) -> None:
        methods = {site.module_name: draft.parts[name].method for name, site in sites.items()}
        ranks = {name: method.rank for name, method in methods.items() if isinstance(method, AdaLoRA)}
        scales = [(method.alpha or method.rank) / method.rank for method in methods.values() if isinstance(method, AdaLoRA)]
        widest = max(ranks.values())
        draft.config["init_r"] = draft.config["target_r"] = widest
        draft.config["lora_alpha"] = number(one("scale", [round(scale, 12) for scale in scales]) * widest)
        if min(ranks.values()) < widest:
            draft.config["rank_pattern"] = {
                f"{name}.lora_E": [index < rank for index in range(widest)] for name, rank in ranks.items()
            }
