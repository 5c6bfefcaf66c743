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
HADA = ("use_effective_conv2d", "rank_dropout", "module_dropout")
KRON = ("decompose_both", "decompose_factor", "rank_dropout_scale", *HADA)
TRANSPOSED = ("Linear", "Conv1D")
PLANES = ("Linear", "Conv2d")


def _alpha(method: Any) -> float:
    return plain_number(method.rank if method.alpha is None else method.alpha)


def _oft(method: OFT) -> Config:
    if method.side != "input" or method.rescale:
        raise AdaptError("PEFT's OFT turns inputs, and this one has side='output', as LyCORIS's. Save it natively.")
    return {
        "r": method.block_num or 0,
        "oft_block_size": 0 if method.block_num else method.block_size,
        "use_cayley_neumann": bool(method.neumann),
        "num_cayley_neumann_terms": method.neumann or 5,
        "coft": method.coft,
        "eps": method.eps,
        "block_share": method.block_share,
        "module_dropout": method.dropout,
    }


def _miss(config: Config) -> MiSS:
    mode: Any = config["init_weights"] if config["init_weights"] in ("mini", "bat") else "default"
    return MiSS(config["r"], mode=mode, mini_rank=config["mini_r"], dropout=config["miss_dropout"])


PEFT_FORMATS: dict[str, FileFormat] = {
    "ADALORA": AdaLoRAFormat(
        AdaLoRA,
        {**LORA_KEYS, "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "orth_reg_weight": 0.5, "rank_pattern": None,
         "target_r": 8, "tfinal": 0, "tinit": 0, "total_step": 1},
        lambda c: AdaLoRA(c["init_r"], alpha=c["lora_alpha"], dropout=c["lora_dropout"]),
        lambda m: {"lora_dropout": m.dropout},
        hosts=(*TRANSPOSED, "Conv2d"),
        unsupported=(*UNSUPPORTED, "lora_bias", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora"),
    ),
    "BOFT": FileFormat(
        BOFT,
        {**TARGETS, "bias": "none", "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0,
         "boft_n_butterfly_factor": 1, "fan_in_fan_out": False, "init_weights": True},
        lambda c: BOFT(
            c["boft_block_size"] or 4, block_num=c["boft_block_num"] or None,
            n_butterfly_factor=c["boft_n_butterfly_factor"], dropout=c["boft_dropout"],
        ),
        lambda m: {
            "boft_block_size": 0 if m.block_num else m.block_size, "boft_block_num": m.block_num or 0,
            "boft_n_butterfly_factor": m.n_butterfly_factor, "boft_dropout": m.dropout,
        },
        hosts=PLANES,
    ),
    "C3A": FileFormat(
        C3A,
        {**LAYERS, "bias": "none", "block_size": 256, "init_weights": "xavier_uniform"},
        lambda c: C3A(c["block_size"]),
        lambda m: {"block_size": m.block_size},
        patterns={"block_size": "block_size_pattern"},
        exact=True,
    ),
    "FOURIERFT": FileFormat(
        FourierFT,
        {**TARGETS, "bias": "none", "fan_in_fan_out": False, "init_weights": False, "n_frequency": 1000,
         "random_loc_seed": 777, "scaling": 150.0},
        lambda c: FourierFT(c["n_frequency"], scaling=c["scaling"], random_loc_seed=c["random_loc_seed"]),
        lambda m: {"n_frequency": m.n_frequency, "scaling": m.scaling, "random_loc_seed": m.random_loc_seed},
        patterns={"n_frequency": "n_frequency_pattern"},
        exact=True,
        hosts=TRANSPOSED,
        drawn=("fourierft_indices",),
    ),
    "HIRA": HiRAFormat(
        HiRA,
        {**TARGETS, "fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True, "r": 32,
         "rank_pattern": {}},
        lambda c: HiRA(c["r"], dropout=c["hira_dropout"]),
        lambda m: {"r": m.rank, "hira_dropout": m.dropout},
        hosts=(*TRANSPOSED, "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    ),
    "HRA": FileFormat(
        HRA,
        {**TARGETS, "apply_GS": False, "bias": "none", "init_weights": True, "r": 8},
        lambda c: HRA(c["r"], apply_gs=c["apply_GS"]),
        lambda m: {"r": m.rank, "apply_GS": m.apply_gs},
        hosts=PLANES,
    ),
    "IA3": IA3Format(
        IA3,
        {"exclude_modules": None, "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True},
        lambda c: IA3(side=c["side"]),
        lambda m: {},
        hosts=(*TRANSPOSED, "Conv2d", "Conv3d"),
    ),
    "LN_TUNING": NormFormat(NormTuning, {"exclude_modules": None}, lambda c: NormTuning(), lambda m: {}),
    "LOHA": FileFormat(
        LoHa,
        {**TARGETS, "alpha": 8, "init_weights": True, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0,
         "use_effective_conv2d": False},
        lambda c: LoHa(c["r"], alpha=c["alpha"], **{key: c[key] for key in HADA}),
        lambda m: {"r": m.rank, "alpha": _alpha(m), **{key: getattr(m, key) for key in HADA}},
        patterns=RANKS,
        hosts=("Linear", "Conv1d", "Conv2d"),
    ),
    "LOKR": FileFormat(
        LoKr,
        {**TARGETS, "alpha": 8, "decompose_both": False, "decompose_factor": -1, "init_weights": True, "module_dropout": 0.0,
         "r": 8, "rank_dropout": 0.0, "rank_dropout_scale": False, "use_effective_conv2d": False},
        lambda c: LoKr(c["r"], alpha=c["alpha"], **{key: c[key] for key in KRON}),
        lambda m: {"r": m.rank, "alpha": _alpha(m), **{key: getattr(m, key) for key in KRON}},
        patterns=RANKS,
        hosts=("Linear", "Conv1d", "Conv2d"),
    ),
    "MISS": FileFormat(
        MiSS,
        {**TARGETS, "bias": "none", "init_weights": True, "mini_r": 1, "miss_dropout": 0.0, "r": 64},
        _miss,
        lambda m: {"r": m.rank, "init_weights": True if m.mode == "default" else m.mode, "mini_r": m.mini_rank,
                   "miss_dropout": m.dropout},
    ),
    "OFT": FileFormat(
        OFT,
        {**TARGETS, "bias": "none", "block_share": False, "coft": False, "eps": 6e-05, "fan_in_fan_out": False,
         "init_weights": True, "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "oft_block_size": 32, "r": 0,
         "use_cayley_neumann": True},
        lambda c: OFT(
            c["oft_block_size"] or 32, block_num=c["r"] or None, coft=c["coft"], eps=c["eps"], block_share=c["block_share"],
            neumann=c["num_cayley_neumann_terms"] if c["use_cayley_neumann"] else 0, dropout=c["module_dropout"],
        ),
        _oft,
        suffixes={"oft_R": "oft_R.weight", "oft_embedding_R": "oft_embedding_R.weight"},
        hosts=(*PLANES, "Embedding"),
    ),
    "SHIRA": FileFormat(
        SHiRA,
        {"fan_in_fan_out": False, "init_weights": True, "mask_type": "random", "r": 32, "random_seed": None},
        lambda c: SHiRA(c["r"], random_seed=c["random_seed"]),
        lambda m: {"r": m.rank, "random_seed": m.random_seed},
    ),
    "TRAINABLE_TOKENS": TokensFormat(
        TrainableTokens,
        {"init_weights": True, "token_indices": []},
        lambda c: TrainableTokens(c["token_indices"]),
        lambda m: {"token_indices": m.token_indices},
        hosts=("Embedding",),
    ),
    "VERA": VeRAFormat(
        VeRA,
        {**LAYERS, "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "projection_prng_key": 0,
         "r": 256, "save_projection": True, "vera_dropout": 0.0},
        lambda c: VeRA(
            c["r"], projection_prng_key=c["projection_prng_key"], d_initial=c["d_initial"], dropout=c["vera_dropout"]
        ),
        lambda m: {"r": m.rank, "projection_prng_key": m.projection_prng_key, "d_initial": m.d_initial,
                   "vera_dropout": m.dropout},
        hosts=TRANSPOSED,
    ),
}  # fmt: skip
