"""The table of the formats of kohya's and LyCORIS's files: one row each, and what is refused by name."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...errors import AdaptError, FileError, nearest
from ...methods import IA3, OFT, BitFit, Diff, DoRA, Full, LoHa, LoKr, LoRA, NormTuning, WeightMethod
from ...methods.norm_tuning import is_norm
from ...select import Site
from ...weights.value import Side
from . import factors
from .methods import Decomposed, GivenLoKr, WeightIA3
from .module_tensors import ChangeFormat, ModuleTensors, TensorDict, WriteChange

MERGE = "Merge it where it was made (LyCORIS: merge_to), or save it natively there."
REFUSED = {
    "a1.weight": "GLoRA, a change of W by W·A + B",
    "b1.weight": "GLoRA, a change of W by W·A + B",
    "lambda_layer": "T-LoRA, whose rank follows a diffusion model's time step",
    "lokr_t1": "a LoKr with a core in its first factor, which LyCORIS never reads",
    "oft_diag": "an early diag-OFT, whose formula is not known from the file",
    "lora_A.weight": "a LoRA by PEFT's or diffusers' names: gf.interop.peft reads PEFT's directories",
    "lora_B.weight": "a LoRA by PEFT's or diffusers' names: gf.interop.peft reads PEFT's directories",
    "lora_down.0.weight": "a LoRA of several parts, one for each share of a fused layer (split_dims)",
    "reshape_weight": "a change of the weight's own shape",
    "set_weight": "a weight to be put in a model's place",
}


def _read_oft(source: ModuleTensors, site: Site) -> tuple[WeightMethod, TensorDict]:
    blocks = source.matrix("oft_blocks")
    if blocks.ndim == 4:
        raise FileError(f"{source.name}.oft_blocks holds a BOFT of outputs, and gf.BOFT turns inputs. {MERGE}")
    if blocks.ndim != 3:
        raise FileError(f"{source.name}.oft_blocks is to be (blocks, size, size), and is {tuple(blocks.shape)}")
    bound = source.scalar("alpha", 0.0)
    rescale = {"rescale": source.take("rescale")} if "rescale" in source.remaining else {}
    method = OFT(blocks.shape[1], side="output", rescale=bool(rescale))
    return method.replace(coft=True, eps=bound) if bound > 0 else method, {"oft_blocks": blocks, **rescale}


def _write_oft(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    assert isinstance(method, OFT)
    if method.side != "output":
        raise AdaptError(f"{site.name!r} has its inputs turned, and LyCORIS's diag-OFT turns outputs: use OFT(side='output')")
    blocks = tensors["oft_blocks"].expand(method.count, -1, -1)
    bound = method.eps if method.coft else 0.0
    if method.coft and method.block_share:
        raise AdaptError(f"{site.name!r} bounds one shared block (coft, block_share), and LyCORIS bounds them all together")
    return {**tensors, "oft_blocks": blocks, "alpha": torch.tensor(bound)}


def _read_ia3(source: ModuleTensors, site: Site) -> tuple[WeightMethod, TensorDict]:
    side: Side = "input" if source.scalar("on_input", 0.0) else "output"
    change = source.take("weight")
    wide = torch.promote_types(change.dtype, site.parameter.dtype)
    return WeightIA3(side=side), {"ia3_l": change.to(wide) + 1}


def _write_ia3(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    assert isinstance(method, IA3)
    if type(method) is IA3 and method.side == "output" and getattr(site.module, "bias", None) is not None:
        raise AdaptError(
            f"{site.name!r} has its bias scaled along with it, as in the paper, and LyCORIS scales the weight alone. Use "
            "gf.interop.kohya.WeightIA3."
        )
    change = tensors["ia3_l"] - 1
    return {"weight": change if change.ndim > 2 else change.flatten(), "on_input": torch.tensor(int(method.side == "input"))}


def change_of(method: WeightMethod, tensors: TensorDict, base: Tensor) -> Tensor:
    """The difference between a trained or changed parameter and the base's."""
    if isinstance(method, Diff):
        return tensors["diff"] if method.scale == 1 else tensors["diff"] * method.scale
    return tensors[""] - base


def _read_change(name: str, source: ModuleTensors, site: Site) -> tuple[WeightMethod, TensorDict]:
    return Diff(), {"diff": source.take(name)}


def _write_change(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    return {"w_norm" if is_norm(site.module) else "diff": change_of(method, tensors, base)}


KOHYA_FORMATS = [
    ChangeFormat("LoRA", "lora_up.weight lora_down.weight", "lora_mid.weight alpha dora_scale", factors.read_lora),
    ChangeFormat("LoHa", "hada_w1_a hada_w1_b", "hada_w2_a hada_w2_b hada_t1 hada_t2 alpha dora_scale", factors.read_loha),
    ChangeFormat(
        "LoKr",
        "lokr_w1 lokr_w1_a lokr_w2 lokr_w2_a",
        "lokr_w1_b lokr_w2_b lokr_t2 alpha dora_scale",
        factors.read_lokr,
    ),
    ChangeFormat("diag-OFT", "oft_blocks", "rescale alpha", _read_oft),
    ChangeFormat("IA3", "on_input", "weight", _read_ia3),
    ChangeFormat("a change in full", "diff", "", partial(_read_change, "diff")),
    ChangeFormat("a norm's change", "w_norm", "", partial(_read_change, "w_norm")),
]
BIASES = ("diff_b", "b_norm")

WRITERS: dict[type[WeightMethod], tuple[str, WriteChange]] = {
    LoRA: ("lora", factors.write_lora),
    DoRA: ("lora", factors.write_dora),
    LoHa: ("loha", factors.write_loha),
    LoKr: ("lokr", factors.write_lokr),
    GivenLoKr: ("lokr", factors.write_lokr),
    OFT: ("diag-oft", _write_oft),
    IA3: ("ia3", _write_ia3),
    WeightIA3: ("ia3", _write_ia3),
    **dict.fromkeys((Diff, Full, NormTuning, BitFit), ("full", _write_change)),
    Decomposed: ("", factors.write_decomposed),
}


def format_of(source: ModuleTensors) -> ChangeFormat:
    """The format of a module's tensors, which must be of one known format that has a method here."""
    for name, what in REFUSED.items():
        if name in source.remaining:
            raise FileError(f"{source.name} holds {what} ({name}), which has no place here. {MERGE}")
    kinds = [kind for kind in KOHYA_FORMATS if kind.marks & source.remaining.keys()]
    if not kinds:
        shown = ", ".join(map(repr, source.remaining))
        near = nearest(next(iter(source.remaining)), sorted(name for kind in KOHYA_FORMATS for name in kind.marks))
        raise FileError(f"{source.name} holds {shown}, which is no kind of change that is known; {near}")
    if len(kinds) > 1:
        raise FileError(f"{source.name} holds both {kinds[0].label} and {kinds[1].label}, and only one has a place")
    unknown = next((name for name in source.remaining if name not in kinds[0].tensors), None)
    if unknown is not None:
        near = nearest(unknown, sorted(kinds[0].tensors))
        raise FileError(f"{source.name} holds {kinds[0].label}, and {unknown!r} is no part of it; {near}")
    return kinds[0]
