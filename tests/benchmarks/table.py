"""The table of rows. One more row is a function `Scale -> Case` and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import compiled, counted, decode, files, growth, large, memory, resident, small, together
from .measure import Case, Counts, Scale
from .step import METHODS, step

# More kernels are no loss: a product in pieces that suit the cache is faster than one.
COUNTED = {"FLOP": {"ours/PEFT": 1.0}, "kernels": {}, "B saved": {"ours/PEFT": 1.0}, "B at the peak": {"ours/PEFT": 1.01}}
ROWS: dict[str, Callable[[Scale], Case | Counts]] = {
    **{f"step/{method}": partial(step, method) for method in METHODS},
    "together/32 adapters x 32 tokens": partial(together.stacked_step, 32, 1, {"ours/PEFT": 0.33, "ours/floor": 1.15}),
    "together/8 adapters x 128 tokens": partial(together.stacked_step, 8, 4, {"ours/PEFT": 0.62, "ours/floor": 1.15}),
    "together/shared prefix": together.prefix,
    "mixed/inference": together.mixed_batch,
    "mixed/training": together.mixed_training,
    "mixed/decode, SmolLM2": decode.mixed_decode,
    "resident/switch": resident.switch_alone,
    "resident/switch and call": resident.switch_and_call,
    "resident/attach": resident.attach,
    "growth/ensemble": growth.ensemble_time,
    "growth/bank": growth.bank_time,
    "memory/LoRA step": partial(memory.step_memory, "LoRA"),
    "memory/DoRA step": partial(memory.step_memory, "DoRA"),
    "memory growth/ensemble, adapters": partial(growth.memory, "ensemble", "adapters"),
    "memory growth/ensemble, step": partial(growth.memory, "ensemble", "step"),
    "memory growth/bank, adapters": partial(growth.memory, "bank", "adapters"),
    "memory growth/bank, step": partial(growth.memory, "bank", "step"),
    **{
        f"counted/{method} step, {unit}": partial(counted.step_work, method, unit, targets)
        for method in ("LoRA", "DoRA")
        for unit, targets in COUNTED.items()
    },
    "counted/mixed batch, FLOP": partial(counted.mixed_work, "FLOP", {"ours/PEFT": 1.0}),
    "counted/mixed batch, kernels": partial(counted.mixed_work, "kernels", {"ours/PEFT": 1.0}),
    "counted/mixed batch, numbers gathered": partial(counted.mixed_work, "numbers", {"ours/in and out": 1.0}),
    "counted/shared prefix, FLOP": counted.prefix_work,
    "compile/graphs for 3 adapters": compiled.graphs,
    "compile/LoRA step": compiled.compiled_step,
    "overhead/call": small.call,
    "overhead/call and backward": small.training_call,
    "adapt/Llama 70B on meta": large.adapt_llama,
    "files/load": files.load,
}
# The first two for PEFT, which takes seconds for a step.
FULL_ONLY = {"step/BOFT", "step/HRA", "adapt/Llama 70B on meta", "compile/LoRA step"}
FULL_ONLY |= {name for name in ROWS if name.startswith("memory")}  # a process each
