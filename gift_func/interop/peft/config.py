"""`adapter_config.json`: what its keys mean, which of them are supported, which modules it targets."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import FileError, nearest
from ...methods.matrix import HF_CONV1D
from ...methods.method import is_a

Config = dict[str, Any]

FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"
"""The release of PEFT whose format is written."""

COMMON_KEYS: Config = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
}
"""The keys of every method, with their values in a new file."""

LORA_KEYS: Config = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""LoRA's own keys, with their defaults."""

UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Keys that change what LoRA's tensors do, and that are not supported."""

MUTATING = ("corda", "loftq", "lora_ga", "pissa_niter")
"""Initialisations that rewrite the base's weights from data or random draws, which are in no file."""

TIED = ("modules_to_tie", "target_modules_to_tie")
"""Keys that PEFT adds with `ensure_weight_tying`."""

WORDS = {"bias", "mask_type", "megatron_core", "peft_type", "peft_version"}
"""Keys whose value is a string."""

MODULES = {"exclude_modules", "feedforward_modules", "layers_pattern", "target_modules"}
"""Keys whose value is a pattern or a list of names."""

LISTS: dict[str, type] = {"modules_to_save": str, "target_parameters": str, "token_indices": int}
"""Keys whose value is a list, and the type of its elements."""

NUMBERS = {"random_loc_seed": int, "random_seed": int}
"""Keys whose value is a number though their default is not."""


def read_config(directory: Path) -> Config:
    """The config of a directory, as it is in the file, which must be a JSON object with a `peft_type`."""
    path = directory / FILE
    if not path.is_file():
        below = sorted(found.parent.name for found in directory.glob(f"*/{FILE}"))
        hint = f"; PEFT keeps named adapters in folders of their own: {', '.join(below)}" if below else ""
        raise FileError(f"there is no file {path}{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is no JSON file: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FileError(f"{path} is no PEFT config: it has no peft_type")
    return config


def complete(config: Config, known: Config, ignore: Collection[str], unsupported: Collection[str] = ()) -> Config:
    """The config with defaults for the keys that it leaves out.

    Args:
        config: as in the file.
        known: the method's own keys and their defaults.
        ignore: keys to leave out, whatever their values.
        unsupported: keys that must not be set.

    Raises:
        FileError: for a key that is set and not supported or not known, or a value of a wrong type.
    """
    given = {key: value for key, value in config.items() if key not in ignore and key != "runtime_config"}
    for key, value in given.items():
        if value in (None, False, "none") or value == {} or value == []:
            continue
        if key in unsupported:
            raise FileError(
                f"{FILE} sets {key}={value!r}, which changes what the adapter computes and is not supported. Merge the "
                "adapter with PEFT and adapt the result, or train one without it."
            )
        if key not in known and key not in COMMON_KEYS:
            raise FileError(
                f"{FILE} sets {key}={value!r}, and {config['peft_type']} has no such key here; {nearest(key, known)}. If "
                f"it does not change what the adapter computes, pass ignore=({key!r},)."
            )
    # An explicit null is an old way to leave a key out.
    given = {key: value for key, value in given.items() if value is not None or known.get(key) is None}
    for key, value in given.items():
        if not has_type(key, value, known.get(key)):
            raise FileError(f"{FILE} has {key}={value!r}, which is not what {config['peft_type']} has there")
    return {**COMMON_KEYS, **known, **given}


def has_type(key: str, value: Any, default: Any) -> bool:
    """Whether a value is of the type that the key has."""
    if value is None:
        return True
    if key in MODULES:
        return isinstance(value, str) or _all(value, str)
    if key in LISTS:
        return _all(value, LISTS[key])
    if key == "layers_to_transform":
        return _is_instance(value, int) or _all(value, int)
    if key == "trainable_token_indices":
        return _all(value, int) or (isinstance(value, dict) and all(_all(tokens, int) for tokens in value.values()))
    if key.endswith("_pattern"):
        return isinstance(value, dict) and all(_is_instance(item, (int, float)) or _all(item, bool) for item in value.values())
    if key in WORDS:
        return isinstance(value, str)
    if key.startswith("init_") and key != "init_r":
        return isinstance(value, (bool, str))
    kind = NUMBERS.get(key, type(default))
    if kind is type(None):
        return True
    return _is_instance(value, (int, float) if kind is float or key in ("alpha", "lora_alpha") else kind)


def _is_instance(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(_is_instance(item, kind) for item in value)


def check_lora(config: Config) -> None:
    """Refuse values of LoRA's keys that are not supported."""
    init = str(config["init_lora_weights"]).lower()
    if init.startswith(MUTATING):
        raise FileError(
            f"{FILE} sets init_lora_weights={config['init_lora_weights']!r}: PEFT rewrites the base's weights before it adds "
            "the adapter, and the file does not say to what. Save it from PEFT as a plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if config["bias"] not in ("none", "all", "lora_only"):
        raise FileError(f"{FILE} has bias={config['bias']!r}, which is none of none, all, lora_only")


def targets(config: Mapping[str, Any], name: str) -> bool:
    """Whether the config targets the module of this dotted name, as PEFT decides."""
    excluded = config.get("exclude_modules")
    if excluded and matches(excluded, name):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.get("modules_to_save") or ()):
        return False
    wanted = config.get("target_modules")
    if not wanted or not matches(wanted, name):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or name in wanted or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    prefix = r".*?\." if not config.get("layers_pattern") else r"(?:^|.*?\.)"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"{prefix}{pattern}\.(\d+)\.", name)
        if found is not None:
            return int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)
    return False


def matches(wanted: str | Iterable[str], name: str) -> bool:
    """Whether a dotted name matches a regular expression, as a whole, or ends with a name of a list."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def resolved(config: Config, root: nn.Module) -> Config:
    """The config with the modules' names for `"all-linear"`."""
    wanted = config.get("target_modules")
    if not isinstance(wanted, str) or wanted.lower() != "all-linear":
        return config
    named = dict(root.named_modules())
    found = {name for name, module in named.items() if isinstance(module, nn.Linear) or is_a(module, HF_CONV1D)}
    head = getattr(root, "get_output_embeddings", lambda: None)()
    if head is not None:
        found -= {name for name, module in named.items() if module is head}
    elif config.get("task_type") == "SEQ_CLS":
        found -= {next((head for head in ("score", "classifier") if head in named), "")}
    return {**config, "target_modules": sorted(found)}


def shortest(chosen: Collection[str], others: Collection[str]) -> list[str] | str:
    """`target_modules` that matches these modules and no others: ends of names if there are such, or else a pattern."""
    names, taken = [], {end for other in others for end in _ends(other)}
    for name in chosen:
        end = next((end for end in _ends(name) if end not in taken), None)
        if end is None:
            return "|".join(re.escape(name) for name in sorted(chosen))
        names.append(end)
    return sorted(set(names))


def _ends(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[i:]) for i in reversed(range(len(steps)))]
