"""Peak memory, each figure in a fresh process, so that nothing that an earlier one allocated is counted."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import gift_func as gf

from .measure import Counts, Scale
from .pairs import family, mini_lm, peft_family
from .step import LINEARS, METHODS, floor, ids, training
from .together import mapped_training, mixed_step

ROOT = Path(__file__).parents[2]
# Each tensor gets pages of its own and gives them back. Else the figure is that of glibc's heap, which by luck keeps twice
# what is in use: PEFT's step took 310 to 350 MB without this, and 167 with it; ours 187 to 200, and 161.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "8192", "MALLOC_MMAP_MAX_": "1000000"}


class Figure(NamedTuple):
    """Bytes.

    Attributes:
        kept: of the tensors that a contender has beside the base, between its steps.
        step: of resident memory that a step takes beyond that, at its peak.
    """

    kept: int
    step: int


def step_memory(method: str, scale: Scale) -> Counts:
    """The peak of a training step beyond the model and the adapter."""
    sentences, length = (8, 128) if scale.full else (4, 128)
    figures = at_once([(who, method, 1, sentences, length) for who in ("ours", "PEFT", "floor")])
    found = {who: [float(figure.step)] for who, figure in zip(("ours", "PEFT", "floor"), figures, strict=True)}
    facts = {"tokens": sentences * length}
    return Counts("B", found, facts=facts, note="resident memory, a process each", targets={"ours/PEFT": 1.0}, always=False)


def at_once(given: Sequence[tuple[str, str, int, int, int]]) -> list[Figure]:
    """Figures of several processes, two of which run at a time: no time is taken."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: apart(*one), given))


def apart(who: str, method: str, members: int, sentences: int, length: int) -> Figure:
    """A figure from a process of its own.

    Args:
        who: "ours", "PEFT", "floor", "ensemble" or "bank".
        method: of `step.METHODS`.
        members: how many adapters.
        sentences: of all adapters together.
        length: tokens of a sentence.
    """
    given = json.dumps([who, method, members, sentences, length])
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.memory", given]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
    if run.returncode:
        raise AssertionError(f"the process for {given} ended with {run.returncode}: {run.stderr[-2000:]}")
    return Figure(*json.loads(run.stdout.splitlines()[-1]))


def figure(who: str, method: str, members: int, sentences: int, length: int) -> Figure:
    """A figure of this process, which has done nothing else."""
    training(floor(), ids(2, 8))()  # a mapped file is in memory once it is read, and libraries get theirs at the first use
    before = living()
    step = contender(who, method, members)
    kept = living() - before
    step(members, 2)()  # what is made once
    run = step(sentences, length)
    start = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is this moment's from here
    run()
    return Figure(kept, status("VmHWM") - start)


def contender(who: str, method: str, members: int) -> Callable[[int, int], Callable[[], object]]:
    """(sentences, tokens of each) -> a step."""
    if who == "floor":
        return lambda sentences, length: training(floor(), ids(sentences, length))
    if who in ("ours", "PEFT"):
        made = gf.adapt(mini_lm(), {LINEARS: METHODS[method]}, generator=torch.Generator().manual_seed(0))
        model = made if who == "ours" else peft_alone(method, made)
        return lambda sentences, length: training(model, ids(sentences, length))
    adapters = family(mini_lm(), LINEARS, members)
    if who == "ensemble":
        ens = gf.stack(adapters.values())
        return lambda sentences, length: mapped_training(ens, ids(sentences, length).reshape(members, -1, length))
    bank = gf.AdapterBank(adapters).train()
    return lambda sentences, length: mixed_step(bank, ids(sentences, length), names(bank, sentences))


def names(bank: gf.AdapterBank, sentences: int) -> list[str]:
    """As many sentences for each adapter."""
    return [name for name in bank for _ in range(sentences // len(bank))]


def peft_alone(method: str, adapted: gf.AdaptedModel) -> torch.nn.Module:
    """PEFT's model of one adapter."""
    import tempfile

    from .pairs import read_by_peft

    if method == "LoRA":
        made: torch.nn.Module = peft_family(mini_lm(), {"a0": adapted}).train()
        return made
    with tempfile.TemporaryDirectory() as folder:
        gf.interop.peft.save(adapted, folder)
        return read_by_peft(mini_lm(), folder).train()


def living() -> int:
    """Bytes of the tensors that there are."""
    gc.collect()
    tensors = (found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter))
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}.values())


def resident() -> int:
    """Bytes in memory now, after what was freed went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(json.dumps(figure(*json.loads(sys.argv[1]))))
