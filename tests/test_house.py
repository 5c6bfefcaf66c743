"""The house: a file imports only from floors below it, and private torch modules from one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gift_func

ROOT = Path(gift_func.__file__).parent
FLOORS = [
    ["errors", "reading", "weights._torch", "weights.function"],
    ["weights.names", "weights.value"],
    ["weights.convolution", "weights.gain", "weights.stacked_linear"],
    ["weights.mixed_linear"],
    ["weights.stacked_attention"],
    ["weights.fused_linear", "weights.fusing", "weights.shared_linear", "weights.turned_linear"],
    ["weights.call", "weights.circulant", "weights.fourier", "weights.low_rank", "weights.mixing",
     "weights.output_dropout", "weights.reshaped", "weights.rotated", "weights.scaled", "weights.shared",
     "weights.scattered", "weights.spectral"],
    ["weights.hadamard", "weights.kronecker", "weights.magnitude", "weights.modulated", "weights.residual", "weights.triple"],
    ["weights.slot"],
    ["weights.rules.attention", "weights.rules.convolution", "weights.rules.embedding", "weights.rules.products",
     "weights.rules.views"],
    ["weights.rules"],
    ["weights"],
    ["many.following.layout"],
    ["many.following.table"],
    ["many.following.elementwise", "many.following.indexing", "many.following.layers", "many.following.products",
     "many.following.shapes"],
    ["many.following.along", "many.following.writing"],
    ["many.following", "many.following.replaying"],
    ["many.following.rows"],
    ["replica"],
    ["structure", "select", "snapshot"],
    ["methods.settings"],
    ["methods.method"],
    ["methods.full", "methods.graft", "methods.matrix", "methods.rank_allocation"],
    ["methods.layout"],
    ["methods.factored"],
    ["methods.lora_init"],
    ["methods.lora"],
    ["methods.*"],
    ["methods"],
    ["fused"],
    ["base"],
    ["strategy", "adapter", "private", "show"],
    ["body", "surgery"],
    ["adapted", "initial"],
    ["adapt", "factories", "functional"],
    ["many.banks.modes", "many.recipe"],
    ["many.banks.entry", "many.banks.mix"],
    ["many.banks.at_once", "many.banks.fresh", "many.banks.low_rank_runs"],
    ["many.banks.routed_weight"],
    ["many.banks.by_runs"],
    ["many.banks.routed"],
    ["many.banks.planning", "many.banks.samples"],
    ["many.banks.arguments", "many.banks.gathered", "many.banks.keeping", "many.banks.steps"],
    ["many.banks.mixing"],
    ["many.banks.bank", "many.banks.members"],
    ["many.banks"],
    ["many.ensembles.batching"],
    ["many.ensembles.running"],
    ["many.ensembles.ensemble"],
    ["many.ensembles.stacking"],
    ["many.ensembles"],
    ["calibrate", "files", "optim.blocks", "optim.clipping", "optim.lora_plus", "strategies", "utils"],
    ["many.stores.folder", "many.stores.reading", "many.stores.serving", "many.stores.shelf"],
    ["many.stores.store"],
    ["many.stores"],
    ["optim.per_member"],
    ["optim"],
    ["many.sweeps.batches", "many.sweeps.packing", "many.sweeps.progress", "many.sweeps.report", "many.sweeps.trials"],
    ["many.sweeps.course"],
    ["many.sweeps.saving"],
    ["many.sweeps.sweep"],
    ["many.sweeps"],
    ["many"],
    ["interop.peft.config", "interop.peft.keys"],
    ["interop.peft.draft", "interop.peft.plan"],
    ["interop.peft.kinds", "interop.peft.lora"],
    ["interop.peft.special"],
    ["interop.peft.table"],
    ["interop.peft.load"],
    ["interop.peft.save"],
    ["interop.peft"],
    ["interop.kohya.found", "interop.kohya.methods", "interop.kohya.names", "interop.kohya.read"],
    ["interop.kohya.factors"],
    ["interop.kohya.table"],
    ["interop.kohya.load", "interop.kohya.save"],
    ["interop.kohya"],
    ["interop"],
    ["testing.hosts"],
    ["testing.laws"],
    ["testing"],
]  # fmt: skip
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(ROOT.rglob("*.py"))
# A new method is a file among the others, and needs no line here.
HEIGHT |= {
    f"methods.{path.stem}": HEIGHT["methods.*"]
    for path in (ROOT / "methods").glob("*.py")
    if f"methods.{path.stem}" not in HEIGHT and path.stem != "__init__"
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[str]:
    """The dotted names, inside the package, of the files that a file imports."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            prefix = [part for part in package[: len(package) - node.level + 1] if part]
            for target in (
                [*prefix, *(node.module or "").split(".")],
                *([*prefix, *(node.module or "").split("."), alias.name] for alias in node.names),
            ):
                name = ".".join(part for part in target if part)
                if name in HEIGHT:
                    found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=[name_of(path) or "gift_func" for path in FILES])
def test_imports_go_down(path: Path) -> None:
    name = name_of(path)
    if not name:
        return
    assert name in HEIGHT, f"{name} stands on no floor: add it to FLOORS"
    for other in imports(path):
        inside = name == other or other.startswith(f"{name}.") or name.startswith(f"{other}.")
        assert inside or HEIGHT[other] < HEIGHT[name], f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=[name_of(path) or "gift_func" for path in FILES])
def test_files_are_one_idea_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
