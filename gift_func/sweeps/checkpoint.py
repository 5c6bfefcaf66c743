"""A sweep's checkpoint: one safetensors file, written atomically, from which the sweep resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import safetensors_io
from ..errors import FileError
from ..network.frozen_base import FrozenBase
from .packing import pack, unpack
from .training import SweepConfig, SweepRun

CHECKPOINT_KEY = "gift_func.sweep"
CHECKPOINT_VERSION = 1


def describe(
    base: FrozenBase, trials: Sequence[Mapping[str, Any]], strategies: Any, groups: Any, config: SweepConfig, optimizer: Any
) -> dict[str, Any]:
    """What must be the same for a sweep to resume, as values that JSON returns unchanged."""
    optimizer_class = optimizer.func if isinstance(optimizer, partial) else optimizer
    description = {
        **{name: getattr(config, name) for name in ("steps", "every", "max_norm", "own_order", "maximize")},
        "halving": dict(config.halving) if isinstance(config.halving, Mapping) else config.halving,
        "optimizer": getattr(optimizer_class, "__qualname__", str(optimizer_class)),
        "trials": [{key: str(value) for key, value in trial.items()} for trial in trials],
        "strategies": [str(rules) for rules in strategies],
        "groups": groups,
        "base": base.fingerprint(),
    }
    made: dict[str, Any] = json.loads(json.dumps(description))
    return made


def save_checkpoint(path: Path, description: Mapping[str, Any], run: SweepRun) -> None:
    """Write the state of a run."""
    tensors: dict[str, Tensor] = {"losses": run.losses}
    ended = [pack(dict(state), tensors, f"trial{index}") for index, state in enumerate(run.states)]
    groups = []
    for place, group in enumerate(run.groups):
        state = {"adapter": group.ensemble.state_dict(), "optimizer": group.optimizer.state_dict()}
        groups.append({"members": group.members, "step": group.step, "state": pack(state, tensors, f"run{place}")})
    header = {
        "version": CHECKPOINT_VERSION,
        "sweep": description,
        "status": run.status,
        "steps": run.steps,
        "scores": pack(run.scores, tensors, "scores"),
        "states": ended,
        "runs": groups,
    }
    safetensors_io.write(path, safetensors_io.to_bytes(tensors, {CHECKPOINT_KEY: json.dumps(header)}))


def load_checkpoint(path: Path, description: Mapping[str, Any], run: SweepRun) -> None:
    """Set a run to the state in a file; it is an error if that is damaged, no checkpoint of a sweep, or that of another one."""
    tensors, metadata = safetensors_io.read(path)
    if CHECKPOINT_KEY not in metadata:
        raise FileError(f"{path} is a safetensors file, but not the checkpoint of a sweep")
    header = json.loads(metadata[CHECKPOINT_KEY])
    if header.get("version") != CHECKPOINT_VERSION:
        raise FileError(f"{path} has format version {header.get('version')}, this release reads version {CHECKPOINT_VERSION}")
    for name, value in description.items():
        if header["sweep"].get(name) != value:
            raise FileError(
                f"{path} is the checkpoint of another sweep: its {name} differ. Go on with the same arguments, or name another "
                "file."
            )
    run.losses.copy_(tensors["losses"])
    run.status, run.steps = header["status"], header["steps"]
    run.scores = unpack(header["scores"], tensors)
    run.states = [unpack(state, tensors) for state in header["states"]]
    known = {index: group for group in run.groups for index in group.members}
    run.groups = []
    for saved in header["runs"]:
        group = known[saved["members"][0]]
        group.select(saved["members"])
        state = unpack(saved["state"], tensors)
        group.ensemble.load_state_dict(state["adapter"])
        group.optimizer.load_state_dict(state["optimizer"])
        group.step = saved["step"]
        run.groups.append(group)
