"""The checkpoint of a sweep: one safetensors file, written whole or not at all, from which it goes on."""

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

KEY = "gift_func.sweep"
VERSION = 1


def describe(
    base: FrozenBase, trials: Sequence[Mapping[str, Any]], strategies: Any, groups: Any, plan: SweepConfig, optimizer: Any
) -> dict[str, Any]:
    """What two runs of one sweep have in common, as JSON holds it."""
    kind = optimizer.func if isinstance(optimizer, partial) else optimizer
    told = {
        "steps": plan.steps,
        "every": plan.every,
        "max_norm": plan.max_norm,
        "own_order": plan.own_order,
        "maximize": plan.maximize,
        "halving": dict(plan.halving) if isinstance(plan.halving, Mapping) else plan.halving,
        "optimizer": getattr(kind, "__qualname__", str(kind)),
        "trials": [{key: str(value) for key, value in trial.items()} for trial in trials],
        "strategies": [str(rules) for rules in strategies],
        "groups": groups,
        "base": base.fingerprint(),
    }
    made: dict[str, Any] = json.loads(json.dumps(told))
    return made


def write(path: Path, description: Mapping[str, Any], course: SweepRun) -> None:
    """Write where a sweep stands."""
    tensors: dict[str, Tensor] = {"losses": course.losses}
    ended = [pack(dict(state), tensors, f"trial{index}") for index, state in enumerate(course.states)]
    runs = []
    for place, run in enumerate(course.runs):
        state = {"adapter": run.ensemble.state_dict(), "optimizer": run.optimizer.state_dict()}
        runs.append({"members": run.members, "step": run.step, "state": pack(state, tensors, f"run{place}")})
    header = {
        "version": VERSION,
        "sweep": description,
        "status": course.status,
        "steps": course.steps,
        "scores": pack(course.scores, tensors, "scores"),
        "states": ended,
        "runs": runs,
    }
    safetensors_io.write(path, safetensors_io.to_bytes(tensors, {KEY: json.dumps(header)}))


def read(path: Path, description: Mapping[str, Any], course: SweepRun) -> None:
    """Bring a sweep to where a file says it stood.

    Raises:
        FileError: if the file is damaged, none of a sweep, or that of another one.
    """
    tensors, metadata = safetensors_io.read(path)
    text = metadata.get(KEY)
    if text is None:
        raise FileError(f"{path} is a safetensors file, but not the checkpoint of a sweep")
    header = json.loads(text)
    if header.get("version") != VERSION:
        raise FileError(f"{path} has format version {header.get('version')}, this release reads version {VERSION}")
    for name, value in description.items():
        if header["sweep"].get(name) != value:
            raise FileError(
                f"{path} is the checkpoint of another sweep: its {name} differ. Go on with the same arguments, or name another "
                "file."
            )
    course.losses.copy_(tensors["losses"])
    course.status, course.steps = header["status"], header["steps"]
    course.scores = unpack(header["scores"], tensors)
    course.states = [unpack(state, tensors) for state in header["states"]]
    known = {index: run for run in course.runs for index in run.members}
    course.runs = []
    for saved in header["runs"]:
        run = known[saved["members"][0]]
        run.keep(saved["members"])
        state = unpack(saved["state"], tensors)
        run.ensemble.load_state_dict(state["adapter"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = saved["step"]
        course.runs.append(run)
