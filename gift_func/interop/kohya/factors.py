"""LoRA, LoHa and LoKr in LyCORIS's files, with magnitudes (DoRA's) or without."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdaptError, FileError
from ...methods import DoRA, LoHa, LoKr, LoRA, WeightMethod
from ...select import Site
from ...weights.value import Side
from .methods import Decomposed, GivenLoKr
from .module_tensors import ModuleTensors, TensorDict

LORA_NAMES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}


def read_lora(source: ModuleTensors, site: Site) -> tuple[WeightMethod, TensorDict]:
    """`up·down`; a Tucker core between them is multiplied into `down`, which gives the same change."""
    down, up = source.matrix("lora_down.weight"), source.matrix("lora_up.weight")
    rank = down.shape[0]
    alpha = source.alpha(rank)
    if "lora_mid.weight" in source.remaining:
        mid, thin = source.matrix("lora_mid.weight"), down.flatten(1)
        if mid.shape[1] != rank or mid.shape[0] != rank:
            raise FileError(f"{source.name}.lora_mid.weight is to have {rank} channels on both sides, not {tuple(mid.shape)}")
        wide = torch.promote_types(mid.dtype, torch.float32)
        down = torch.einsum("pq...,qi->pi...", mid.to(wide), thin.to(wide))
    tensors = {"lora_A": down, "lora_B": up}
    if "dora_scale" in source.remaining and side_of(source, site) == "output":
        return DoRA(rank, alpha=alpha, detach_norm=False), {**tensors, "lora_magnitude_vector": source.take("dora_scale")}
    return decomposed(source, site, LoRA(rank, alpha=alpha), tensors)


def write_lora(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    """The factors as they are, and alpha = s·rank, which every reader divides by the rank."""
    assert isinstance(method, LoRA)
    if method.init.startswith(("pissa", "olora")):
        raise AdaptError(f"{site.name!r} starts at parts of W (init={method.init!r}), for which there is no place")
    if method.layout not in ("matrix", "kernel"):
        raise AdaptError(f"{site.name!r} is factored as conv={method.conv!r}, and LyCORIS factors kernels: use conv='kernel'")
    return {name: tensors[local] for local, name in LORA_NAMES.items()} | alpha_of(method.scale, method.rank, tensors)


def write_dora(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    """LoRA's tensors, and a magnitude for each output."""
    magnitude = tensors["lora_magnitude_vector"].reshape(-1, *[1] * (site.parameter.ndim - 1))
    return write_lora(method, tensors, site, base) | {"dora_scale": magnitude}


def read_loha(source: ModuleTensors, site: Site) -> tuple[WeightMethod, TensorDict]:
    """Four factors, or six with Tucker cores."""
    names = [f"hada_w{i}_{part}" for i in (1, 2) for part in ("a", "b")]
    names += [name for name in ("hada_t1", "hada_t2") if "hada_t1" in source.remaining or "hada_t2" in source.remaining]
    tensors = {name: source.matrix(name) for name in names}
    rank = tensors["hada_w1_b"].shape[0]
    method = LoHa(rank, alpha=source.alpha(rank), use_effective_conv2d="hada_t1" in tensors)
    return decomposed(source, site, method, tensors)


def write_loha(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    """The tensors by their own names, which are LyCORIS's."""
    assert isinstance(method, LoHa)
    named = {name: core_of(tensor, site) if "_t" in name else tensor for name, tensor in tensors.items()}
    return named | alpha_of(method.scale, method.rank, tensors)


def read_lokr(source: ModuleTensors, site: Site) -> tuple[WeightMethod, TensorDict]:
    """C and D, each as a whole or as factors; if both are whole, there is no scale, and alpha is not used."""
    c = ["lokr_w1"] if "lokr_w1" in source.remaining else ["lokr_w1_a", "lokr_w1_b"]
    d = ["lokr_w2"] if "lokr_w2" in source.remaining else ["lokr_w2_a", "lokr_w2_b"]
    d += ["lokr_t2"] if "lokr_t2" in source.remaining else []
    tensors = {name: source.matrix(name) for name in c + d}
    ranks = {tensors[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors}
    if len(ranks) > 1:
        raise FileError(f"{source.name} holds a LoKr whose factors have the ranks {sorted(ranks)}, and only one has a place")
    whole_c, whole_d, core = len(c) == 1, "lokr_w2" in tensors, "lokr_t2" in tensors
    first = (tensors[c[0]].shape[0], tensors[c[-1]].shape[1])
    rank, alpha = next(iter(ranks), 0), source.alpha(next(iter(ranks), 0))
    if not ranks:
        rank, alpha = max(1, ceil(max(tensors["lokr_w2"].shape[:2]) / 2)), None
    options: dict[str, Any] = {"alpha": alpha, "decompose_both": not whole_c, "use_effective_conv2d": core}
    plain = (LoKr(rank, **options, decompose_factor=factor) for factor in (-1, *first))
    method = next((m for m in plain if fits_site(m, site, tensors)), None)
    return decomposed(source, site, method or GivenLoKr(rank, **options, first=first, full=whole_d), tensors)


def write_lokr(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    """The tensors by their own names, which are LyCORIS's; beside two whole factors, a scale is multiplied into the first."""
    assert isinstance(method, LoKr)
    named = {name: core_of(tensor, site) if name == "lokr_t2" else tensor for name, tensor in tensors.items()}
    scale = method.scale
    if {"lokr_w1", "lokr_w2"} <= named.keys():
        named["lokr_w1"] = named["lokr_w1"] * scale
        scale = 1.0
    return named | alpha_of(scale, method.rank, tensors)


def write_decomposed(method: WeightMethod, tensors: TensorDict, site: Site, base: Tensor) -> TensorDict:
    """The tensors of the method that is decomposed, and the magnitudes."""
    assert isinstance(method, Decomposed)
    of = method.of
    writers = {LoRA: write_lora, LoHa: write_loha, LoKr: write_lokr, GivenLoKr: write_lokr}
    own = {name: tensor for name, tensor in tensors.items() if name != "dora_scale"}
    return writers[type(of)](of, own, site, base) | {"dora_scale": tensors["dora_scale"]}


def decomposed(source: ModuleTensors, site: Site, method: WeightMethod, tensors: TensorDict) -> tuple[WeightMethod, TensorDict]:
    """The method, or its `Decomposed` if the file has magnitudes."""
    if "dora_scale" not in source.remaining:
        return method, tensors
    side = side_of(source, site)
    return Decomposed(method, side=side), {**tensors, "dora_scale": source.take("dora_scale")}


def side_of(source: ModuleTensors, site: Site) -> Side:
    """Whether the magnitudes are of outputs or of inputs, by their shape."""
    shape, w = tuple(source.remaining["dora_scale"].shape), site.parameter.shape
    ones = (1,) * (len(w) - 2)
    sides = shape[:2] if set(shape[2:]) <= {1} else ()
    if sides == (w[0], 1):
        return "output"
    if sides == (1, w[1]):
        return "input"
    raise FileError(
        f"{source.name}.dora_scale is to be {(w[0], 1, *ones)} for outputs, or {(1, w[1], *ones)} for inputs, and is {shape}"
    )


def fits_site(method: WeightMethod, site: Site, tensors: TensorDict) -> bool:
    """Whether the method's tensors at the site have these names and, axes of size 1 apart, these shapes."""
    if method.why_not(site) is not None:
        return False
    bare = replace(site, parameter=torch.empty_like(site.parameter, device="meta"))
    made = method.for_site(bare).init_tensors(bare, torch.Generator())
    sizes = {name: [n for n in tensor.shape if n != 1] for name, tensor in made.items()}
    return sizes == {name: [n for n in tensor.shape if n != 1] for name, tensor in tensors.items()}


def core_of(core: Tensor, site: Site) -> Tensor:
    """A Tucker core `(r, r, k...)` with as many axes as the kernel."""
    return core.squeeze(-1) if isinstance(site.module, nn.Conv1d) and core.ndim == 4 else core


def alpha_of(scale: float, rank: int, tensors: TensorDict) -> TensorDict:
    """alpha, so that alpha / rank is the scale: in single precision, as in LyCORIS, unless a tensor is in double."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    return {"alpha": torch.tensor(scale * rank, dtype=torch.float64 if wide else torch.float32)}
