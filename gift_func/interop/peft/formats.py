"""The table of the file formats of PEFT's methods other than LoRA: one row each."""

from __future__ import annotations

from typing import Any

from ...errors import AdaptError
from ...methods import (  # fmt: skip
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    FourierFT,
    HiRA,
    LoHa,
    LoKr,
    MiSS,
    NormTuning,
    SHiRA,
    TrainableTokens,
    VeRA,
)
from .config import LORA_KEYS, UNSUPPORTED, Config
from .file_format import LAYERS, FileFormat
from .special_formats import AdaLoRAFormat, HiRAFormat, IA3Format, NormFormat, TokensFormat, VeRAFormat
from .writer import plain_number

TARGETS: Config = {"exclude_modules": None, **LAYERS}
RANKS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
HADA = {key: key for key in ("use_effective_conv2d", "rank_dropout", "module_dropout")}
KRON = {key: key for key in ("decompose_both", "decompose_factor", "rank_dropout_scale", *HADA)}
TRANSPOSED = ("Linear", "Conv1D")
PLANES = ("Linear", "Conv2d")


def _alpha(method: Any) -> Config:
    return {"alpha": plain_number(method.rank if method.alpha is None else method.alpha)}


def _oft(method: OFT) -> Config:
    if method.side != "input" or method.rescale:
        raise AdaptError("PEFT's OFT turns inputs, and this one has side='output', as LyCORIS's. Save it natively.")
    return {
        "r": method.block_num or 0,
        "oft_block_size": 0 if method.block_num else method.block_size,
        "use_cayley_neumann": bool(method.neumann),
        "num_cayley_neumann_terms": method.neumann or 5,
    }


PEFT_FORMATS: dict[str, FileFormat] = {
    "ADALORA": AdaLoRAFormat(
        AdaLoRA,
        {**LORA_KEYS, "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "orth_reg_weight": 0.5, "rank_pattern": None,
         "target_r": 8, "tfinal": 0, "tinit": 0, "total_step": 1},
        {"lora_dropout": "dropout"},
        lambda c: {"rank": c["init_r"], "alpha": c["lora_alpha"]},
        hosts=(*TRANSPOSED, "Conv2d"),
        unsupported=(*UNSUPPORTED, "lora_bias", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora"),
    ),
    "BOFT": FileFormat(
        BOFT,
        {**TARGETS, "bias": "none", "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0,
         "boft_n_butterfly_factor": 1, "fan_in_fan_out": False, "init_weights": True},
        {"boft_n_butterfly_factor": "n_butterfly_factor", "boft_dropout": "dropout"},
        lambda c: {"block_size": c["boft_block_size"] or 4, "block_num": c["boft_block_num"] or None},
        lambda m: {"boft_block_size": 0 if m.block_num else m.block_size, "boft_block_num": m.block_num or 0},
        hosts=PLANES,
    ),
    "C3A": FileFormat(
        C3A,
        {**LAYERS, "bias": "none", "block_size": 256, "init_weights": "xavier_uniform"},
        {"block_size": "block_size"},
        patterns={"block_size": "block_size_pattern"},
        exact=True,
    ),
    "FOURIERFT": FileFormat(
        FourierFT,
        {**TARGETS, "bias": "none", "fan_in_fan_out": False, "init_weights": False, "n_frequency": 1000,
         "random_loc_seed": 777, "scaling": 150.0},
        {"n_frequency": "n_frequency", "scaling": "scaling", "random_loc_seed": "random_loc_seed"},
        patterns={"n_frequency": "n_frequency_pattern"},
        exact=True,
        hosts=TRANSPOSED,
        drawn=("fourierft_indices",),
    ),
    "HIRA": HiRAFormat(
        HiRA,
        {**TARGETS, "fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True, "r": 32,
         "rank_pattern": {}},
        {"r": "rank", "hira_dropout": "dropout"},
        hosts=(*TRANSPOSED, "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    ),
    "HRA": FileFormat(
        HRA,
        {**TARGETS, "apply_GS": False, "bias": "none", "init_weights": True, "r": 8},
        {"r": "rank", "apply_GS": "apply_gs"},
        hosts=PLANES,
    ),
    "IA3": IA3Format(
        IA3,
        {"exclude_modules": None, "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True},
        read=lambda c: {"side": c["side"]},
        hosts=(*TRANSPOSED, "Conv2d", "Conv3d"),
    ),
    "LN_TUNING": NormFormat(NormTuning, {"exclude_modules": None}),
    "LOHA": FileFormat(
        LoHa,
        {**TARGETS, "alpha": 8, "init_weights": True, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0,
         "use_effective_conv2d": False},
        {"r": "rank", "alpha": "alpha", **HADA},
        write=_alpha,
        patterns=RANKS,
        hosts=("Linear", "Conv1d", "Conv2d"),
    ),
    "LOKR": FileFormat(
        LoKr,
        {**TARGETS, "alpha": 8, "decompose_both": False, "decompose_factor": -1, "init_weights": True, "module_dropout": 0.0,
         "r": 8, "rank_dropout": 0.0, "rank_dropout_scale": False, "use_effective_conv2d": False},
        {"r": "rank", "alpha": "alpha", **KRON},
        write=_alpha,
        patterns=RANKS,
        hosts=("Linear", "Conv1d", "Conv2d"),
    ),
    "MISS": FileFormat(
        MiSS,
        {**TARGETS, "bias": "none", "init_weights": True, "mini_r": 1, "miss_dropout": 0.0, "r": 64},
        {"r": "rank", "mini_r": "mini_rank", "miss_dropout": "dropout"},
        lambda c: {"mode": c["init_weights"] if c["init_weights"] in ("mini", "bat") else "default"},
        lambda m: {"init_weights": True if m.mode == "default" else m.mode},
    ),
    "OFT": FileFormat(
        OFT,
        {**TARGETS, "bias": "none", "block_share": False, "coft": False, "eps": 6e-05, "fan_in_fan_out": False,
         "init_weights": True, "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "oft_block_size": 32, "r": 0,
         "use_cayley_neumann": True},
        {"coft": "coft", "eps": "eps", "block_share": "block_share", "module_dropout": "dropout"},
        lambda c: {"block_size": c["oft_block_size"] or 32, "block_num": c["r"] or None,
                   "neumann": c["num_cayley_neumann_terms"] if c["use_cayley_neumann"] else 0},
        _oft,
        suffixes={"oft_R": "oft_R.weight", "oft_embedding_R": "oft_embedding_R.weight"},
        hosts=(*PLANES, "Embedding"),
    ),
    "SHIRA": FileFormat(
        SHiRA,
        {"fan_in_fan_out": False, "init_weights": True, "mask_type": "random", "r": 32, "random_seed": None},
        {"r": "rank", "random_seed": "random_seed"},
    ),
    "TRAINABLE_TOKENS": TokensFormat(
        TrainableTokens,
        {"init_weights": True, "token_indices": []},
        {"token_indices": "token_indices"},
        hosts=("Embedding",),
    ),
    "VERA": VeRAFormat(
        VeRA,
        {**LAYERS, "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "projection_prng_key": 0,
         "r": 256, "save_projection": True, "vera_dropout": 0.0},
        {"r": "rank", "projection_prng_key": "projection_prng_key", "d_initial": "d_initial", "vera_dropout": "dropout"},
        hosts=TRANSPOSED,
    ),
}  # fmt: skip
