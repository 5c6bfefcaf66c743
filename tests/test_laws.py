"""The table of laws: one row a method and configuration, every law on every kind of parameter."""

from __future__ import annotations

import pytest
import torch

import gift_func as gf
from gift_func import testing

METHODS: dict[str, gf.Method] = {
    "Full": gf.Full(),
    "LoRA": gf.LoRA(rank=2),
    "LoRA random": gf.LoRA(rank=2, alpha=3.0, init="random"),
    "LoRA orthogonal rslora": gf.LoRA(rank=4, init="orthogonal", rslora=True),
    "LoRA gaussian balanced": gf.LoRA(rank=2, init="gaussian", conv="balanced"),
    "LoRA in float64": gf.LoRA(rank=2, dtype=torch.float64),
    "LoRA pissa": gf.LoRA(rank=2, alpha=3.0, init="pissa"),
    "LoRA pissa_niter": gf.LoRA(rank=2, init="pissa_niter_4"),
    "LoRA olora": gf.LoRA(rank=2, init="olora"),
    "DoRA": gf.DoRA(rank=2, alpha=3.0),
    "DoRA flowing norm": gf.DoRA(rank=2, init="random", detach_norm=False),
    "DoRA olora": gf.DoRA(rank=2, init="olora"),
    "VeRA": gf.VeRA(rank=8),
    "AdaLoRA": gf.AdaLoRA(rank=3, alpha=2.0),
    "HiRA": gf.HiRA(rank=2),
    "LoHa": gf.LoHa(rank=2, alpha=3.0),
    "LoHa cores": gf.LoHa(rank=2, init="normal", use_effective_conv2d=True),
    "LoKr": gf.LoKr(rank=2, alpha=3.0),
    "LoKr cores": gf.LoKr(rank=1, init="lycoris", use_effective_conv2d=True, decompose_both=True),
    "LoKr random factor": gf.LoKr(rank=1, init="random", decompose_factor=2),
    "SVDiff": gf.SVDiff(),
    "SVDiff rows": gf.SVDiff(conv="rows"),
    "IA3": gf.IA3(),
    "IA3 input": gf.IA3(side="input"),
    "OFT": gf.OFT(4),
    "OFT exact": gf.OFT(4, neumann=0),
    "OFT shared coft": gf.OFT(4, coft=True, eps=0.05, neumann=0, block_share=True),
    "OFT output rescale": gf.OFT(4, side="output", rescale=True),
    "BOFT": gf.BOFT(4),
    "BOFT factors": gf.BOFT(2, n_butterfly_factor=2),
    "HRA": gf.HRA(4),
    "HRA apply_gs": gf.HRA(2, apply_gs=True),
    "FourierFT": gf.FourierFT(7),
    "FourierFT zeros": gf.FourierFT(7, init="zeros", random_loc_seed=None),
    "C3A": gf.C3A(4),
    "C3A zeros": gf.C3A(2, init="zeros"),
    "BitFit": gf.BitFit(),
    "NormTuning": gf.NormTuning(),
    "Diff": gf.Diff(scale=0.5),
    "SHiRA": gf.SHiRA(rank=1),
    "SHiRA scaled": gf.SHiRA(rank=1, scale=0.5, random_seed=3),
    "TrainableTokens": gf.TrainableTokens([1, 0, 3]),
    "MiSS": gf.MiSS(2),
    "MiSS mini": gf.MiSS(2, mode="mini", mini_rank=2),
    "MiSS bat": gf.MiSS(2, mode="bat"),
}


@pytest.mark.parametrize("law", testing.LAWS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_law(method: gf.Method, law: str) -> None:
    testing.check(method, laws=[law])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_element_type_is_kept(method: gf.Method) -> None:
    for name, host in testing.HOSTS.items():
        if not testing.refuses(method, name):
            testing.element_type_is_kept(method, host)
