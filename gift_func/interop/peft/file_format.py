"""The file format of one of PEFT's methods other than LoRA: how a file is read and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...errors import AdaptError, FileError
from ...methods import Diff, Full, LoRA, TrainableTokens, WeightMethod
from ...methods.ia3 import ScaledBias
from ...methods.matrix import HF_CONV1D
from ...methods.method import is_a
from ...methods.options import first_match
from ...select import Site
from . import config as configs
from .config import Config
from .keys import FileTensor, Paths
from .reader import PeftReader, redrawn
from .writer import PeftWriter, shared_value

LAYERS: Config = {"layers_pattern": None, "layers_to_transform": None}


@dataclass(frozen=True)
class FileFormat:
    """One method of PEFT: its config and its tensors.

    Attributes:
        method: the class of the method here.
        keys: the keys of its config and their defaults.
        fields: keys that the method has as fields -> those fields' names.
        read: from a module's config, the method's other arguments.
        write: from a method, the other keys that describe it.
        suffixes: the names of tensors in the file, if they are other than the method's.
        patterns: keys that may differ by module -> the key of the pattern with the other values.
        training: keys that act in training only, and are not supported.
        hosts: the classes of modules that PEFT adapts by the method; "Conv1D" is that of transformers.
        drawn: the method's tensors that are not in a file because they are drawn from the config's seed.
        exact: whether a pattern's key is a whole name, or an expression for the end of one after a dot.
        unsupported: keys that change what the tensors do, and that are not supported.
    """

    method: type[WeightMethod]
    keys: Config
    fields: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Config], dict[str, Any]] = lambda config: {}
    write: Callable[[Any], Config] = lambda method: {}
    suffixes: Mapping[str, str] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    training: Collection[str] = ()
    hosts: tuple[str, ...] = ("Linear",)
    drawn: Collection[str] = ()
    exact: bool = False
    unsupported: Collection[str] = ()

    @property
    def known(self) -> Config:
        """All keys of the method's config."""
        patterns: Config = {pattern: {} for pattern in self.patterns.values()}
        return {"modules_to_save": None, "target_modules": None, **self.keys, **patterns}

    def full_config(self, given: Config, ignore: Collection[str]) -> Config:
        """The config with its defaults, without keys that are not supported."""
        config = configs.complete(given, self.known, ignore, self.unsupported)
        for key in self.training:
            if config[key]:
                raise FileError(
                    f"{configs.FILE} sets {key}={config[key]!r}, which acts in training and is not supported. To load the "
                    f"adapter without it, pass ignore=({key!r},)."
                )
        return config

    def read_file(self, reader: PeftReader, given: Config, ignore: Collection[str]) -> None:
        """Read a file; what is not supported or does not fit is an error."""
        config = configs.resolved(self.full_config(given, ignore), reader.base.tree.module)
        names = [name for name in reader.modules if name and configs.targets(config, name)]
        paths = Paths(dict.fromkeys(names, 1))
        for name in names:
            self.place(reader, self.config_at(config, name), paths.outside(name), name)
        reader.save_modules(config["modules_to_save"] or (), paths)
        if config.get("bias", "none") != "none":
            reader.biases(paths)
        reader.base_weights(paths)

    def config_at(self, config: Config, name: str) -> Config:
        """The config for one module, with the values that patterns give it."""
        return {**config, **{key: self.lookup(config, key, name) for key in self.patterns}}

    def lookup(self, config: Config, key: str, name: str) -> Any:
        """The value of a key for one module, as PEFT looks it up."""
        patterns = config[self.patterns[key]] or {}
        if not self.exact:
            return first_match(patterns, name, config[key])
        found = next((pattern for pattern in patterns if re.match(rf".*\.{pattern}$", name)), name)
        return patterns.get(found, config[key])

    def place(self, reader: PeftReader, config: Config, path: str, name: str) -> None:
        """Read one module."""
        module = reader.modules[name]
        if not self.adapts(module):
            raise FileError(f"the config targets {name!r}, a {type(module).__name__}; PEFT adapts {', '.join(self.hosts)} so")
        site = reader.site(name, "weight")
        method = self.method(**{name: config[key] for key, name in self.fields.items()}, **self.read(config))
        reason = method.why_not(site)
        if reason is not None:
            raise FileError(f"the config adapts {site.name!r} by {method}, which needs {reason}")
        reader.place(site, method, self.file_tensors(path, site, method))
        reader.draw(site, method, self.drawn)

    def adapts(self, module: nn.Module) -> bool:
        """Whether PEFT adapts such a module by this method."""
        known = tuple(getattr(nn, name) for name in self.hosts if name != "Conv1D")
        hosted = isinstance(module, known) or ("Conv1D" in self.hosts and is_a(module, HF_CONV1D))
        return hosted and module._parameters.get("weight") is not None

    def file_tensors(self, path: str, site: Site, method: WeightMethod) -> list[FileTensor]:
        """The tensors of a module's weight: their keys in the file and their names here."""
        bare = torch.empty(site.parameter.shape, dtype=site.parameter.dtype, device="meta")
        try:
            names = method.for_site(site).init_tensors(replace(site, parameter=bare), torch.Generator())
        except RuntimeError as error:
            raise FileError(f"{method} makes no tensors for {site.name!r}: {error}") from None
        return [FileTensor(f"{path}.{self.suffixes.get(name, name)}", name) for name in names if name not in self.drawn]

    def write_file(self, writer: PeftWriter) -> None:
        """Write a file; what the format cannot express is an error."""
        sites = {name: writer.site(name) for name in writer.parts}
        paths = Paths({site.module_name: 1 for site in sites.values()})
        settings: dict[str, dict[str, Any]] = {}
        for name, site in sites.items():
            if site.param_name != "weight" or not self.adapts(site.module):
                raise AdaptError(
                    f"PEFT's {self.method.__name__} adapts weights of {', '.join(self.hosts)}, and not {name!r} of a "
                    f"{type(site.module).__name__}. Save it natively."
                )
            part = writer.parts[name]
            for local in self.drawn:
                if not torch.equal(writer.state[part.names[local]], redrawn(site, part.method)[local]):
                    raise AdaptError(f"PEFT draws {part.names[local]!r} from its config, and these were drawn otherwise")
            own = {key: getattr(part.method, name) for key, name in self.fields.items()} | self.write(part.method)
            for key, value in own.items():
                settings.setdefault(key, {})[site.module_name] = value
            writer.write_tensors(part, self.file_tensors(paths.outside(site.module_name), site, part.method))
        writer.config |= self.known
        for key, values in settings.items():
            pattern = self.patterns.get(key)
            writer.config[key] = (
                writer.set_pattern(pattern, values, self.exact) if pattern else shared_value(key, list(values.values()))
            )
            unclear = [name for name, value in values.items() if pattern and self.lookup(writer.config, key, name) != value]
            if unclear:
                raise AdaptError(f"PEFT's {pattern} cannot tell {unclear[0]!r} from a name that ends so. Save it natively.")
        if "fan_in_fan_out" in self.keys:
            writer.config["fan_in_fan_out"] = any(is_a(site.module, HF_CONV1D) for site in sites.values())
        writer.set_targets([site.module_name for site in sites.values()])
        self.write_extras(writer, paths, sites)
        left = next(iter([*writer.biases, *writer.tokens]), None)
        if left is not None:
            raise AdaptError(f"PEFT's {self.method.__name__} has no place for the change of {left!r}. Save it natively.")
        writer.save_whole(paths, takes_biases="bias" in self.keys)

    def write_extras(self, writer: PeftWriter, paths: Paths, sites: Mapping[str, Site]) -> None:
        """Write what the format has in addition."""


def peft_type_of(methods: Sequence[WeightMethod], kinds: Mapping[str, FileFormat]) -> str:
    """The `peft_type` of an adapter with these methods; it is an error if there is none."""
    main = [method for method in methods if not isinstance(method, (Full, Diff, TrainableTokens, ScaledBias))]
    # What other files have in addition to their method may also be all that there is.
    alone = {type(method) for method in main or methods}
    if alone and all(issubclass(kind, LoRA) for kind in alone):
        return "LORA"
    found = [name for name, kind in kinds.items() if alone == {kind.method}]
    if not found:
        names = ", ".join(sorted(kind.__name__ for kind in alone))
        raise AdaptError(
            f"a PEFT directory holds one method that PEFT has, and this adapter is of {names}. Save it natively "
            "(gf.save_adapter), or merge() it and save the model."
        )
    return found[0]
