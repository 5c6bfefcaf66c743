"""Files beside the bare reading of their tensors."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import gift_func as gf

from .measure import Call, Calls, Case, Scale
from .pairs import check_equal, mini_lm, read_by_peft, shaken
from .step import LINEARS, ids, outputs

FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # they go with the process


def load(scale: Scale) -> Case:
    """A LoRA of MiniLM from its file onto the model, ready to be called."""
    model, tokens = mini_lm(), ids(2, 16)
    adapted = shaken(gf.adapt(model, {LINEARS: gf.LoRA(rank=32 if scale.full else 8)}))
    FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(FOLDERS[-1].name)
    native = folder / "adapter.safetensors"
    gf.save_adapter(adapted, native)
    gf.interop.peft.save(adapted, folder / "peft")
    theirs = read_by_peft(copy.deepcopy(model), folder / "peft")
    for ours in (gf.load_adapter(model, native), gf.interop.peft.load(model, folder / "peft")):
        check_equal(model, ours, theirs, lambda m: outputs(m, tokens))

    def read() -> dict[str, Tensor]:
        # A clone: a mapped file is not read before it is touched.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in load_file(native).items()}

    base = gf.FrozenBase.of(model)
    store = gf.AdapterStore(base, folder)
    check_equal(model, store["adapter"].train(), theirs, lambda m: outputs(m, tokens))
    calls: Calls = {
        "ours": lambda: gf.load_adapter(model, native),
        "ours, known base": lambda: gf.load_adapter(base, native),
        # The first use makes the private copy that runs; reaching for an attribute of the network is one.
        "ours, known base, first used": lambda: gf.load_adapter(base, native).config,
        "ours, into a store": Call(lambda: store.evict("adapter"), lambda _: store.prefetch(["adapter"])),
        "ours, PEFT's file": lambda: gf.interop.peft.load(model, folder / "peft"),
        "PEFT": Call(lambda: copy.deepcopy(model), lambda fresh: read_by_peft(fresh, folder / "peft")),
        "reading": read,
    }
    ratios = (
        ("ours", "PEFT"),
        ("ours, PEFT's file", "PEFT"),
        ("ours", "reading"),
        ("ours, known base", "reading"),
        ("ours, known base, first used", "reading"),
        ("ours, into a store", "reading"),
    )
    targets = {"ours/reading": 2.0, "ours, known base/reading": 2.0, "ours, into a store/reading": 2.0}
    return Case(calls, ratios, facts={"bytes": native.stat().st_size}, targets=targets)
