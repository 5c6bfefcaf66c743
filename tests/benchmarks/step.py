"""A training step, forward, backward and plain SGD: on MiniLM, every linear layer adapted, or on a stack of convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

from .measure import Case, Scale
from .pairs import check_gradients, mini_lm, pair, trained

LINEARS = gf.select.type_(nn.Linear)
# One line is one row. All linear layers, or for a dict the places it names.
METHODS: dict[str, Any] = {
    "LoRA": gf.LoRA(rank=8),
    "DoRA": gf.DoRA(rank=8),
    "VeRA": gf.VeRA(rank=256),
    "AdaLoRA": gf.AdaLoRA(rank=8),
    "HiRA": gf.HiRA(rank=8),
    "LoHa": gf.LoHa(rank=8),
    "LoKr": gf.LoKr(rank=8),
    "IA3": gf.IA3(),
    "OFT": gf.OFT(block_size=32),
    "BOFT": gf.BOFT(block_size=4),
    "HRA": gf.HRA(rank=8),
    "FourierFT": gf.FourierFT(n_frequency=1000),
    "C3A": gf.C3A(block_size=128),
    "MiSS": gf.MiSS(rank=8),
    "SHiRA": gf.SHiRA(rank=8),
    "LN tuning": {gf.select.type_(nn.LayerNorm): gf.NormTuning()},
}
# LoRA on all convolutions of so many channels: narrow ones form their kernels, wide ones do not.
CHANNELS = {"LoRA, 64 channels": 64, "LoRA, 256 channels": 256}
METHODS |= {name: {gf.select.type_(nn.Conv2d): gf.LoRA(rank=8)} for name in CHANNELS}

# The noise on the trained tensors, where products of small numbers would hardly change the output.
NOISE = {"AdaLoRA": 0.1, "HiRA": 0.1, "C3A": 0.1, **dict.fromkeys(CHANNELS, 0.1)}
TARGETS = {"LoRA": {"ours/PEFT": 0.83, "ours/floor": 1.08}, "DoRA": {"ours/PEFT": 0.6}}


def step(method: str, scale: Scale) -> Case:
    """A training step by one method."""
    if method in CHANNELS:
        model, tokens = convolutions(CHANNELS[method]), images(8, 16 if scale.full else 4)
        least, unit = carrying(model, "0"), "inputs"
    else:
        model, tokens = mini_lm(), ids(8, 128) if scale.full else ids(2, 32)
        least, unit = floor(), "tokens"
    chosen = METHODS[method]
    strategy = chosen if isinstance(chosen, dict) else {LINEARS: chosen}
    ours, theirs = pair(model, strategy, lambda m: outputs(m, tokens), NOISE.get(method, 0.02))
    check_gradients(ours, theirs, lambda m: backward(m, tokens, cotangents_of(m, tokens)))
    calls = {"ours": training(ours, tokens), "PEFT": training(theirs, tokens), "floor": training(least, tokens)}
    return Case(calls, facts={"trained": trained(ours), unit: tokens.numel()}, targets=TARGETS.get(method, {}))


def training(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """One step as a call. Its learning rate is 0: the work of a step, and the next one starts where this one did."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0) if parameters else None
    cotangents = cotangents_of(model, tokens)

    def run() -> None:
        backward(model, tokens, cotangents)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def backward(model: nn.Module, tokens: Tensor, cotangents: list[Tensor]) -> None:
    torch.autograd.backward(outputs(model, tokens), cotangents)


def cotangents_of(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The gradients of an imagined loss by the outputs, the same for every model."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return [torch.randn(tensor.shape, generator=generator) for tensor in outputs(model, tokens)]


def outputs(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    if tokens.is_floating_point():
        return [model(tokens)]
    found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return [found.last_hidden_state, found.pooler_output]


def ids(sentences: int, length: int) -> Tensor:
    return torch.randint(1000, 30000, (sentences, length), generator=torch.Generator().manual_seed(3))


def images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@cache
def convolutions(channels: int) -> nn.Module:
    """Four convolutions of 3×3 with ReLUs, frozen, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = [3, *[channels] * 4]
        layers = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(widths)]
        return nn.Sequential(*chain(*layers)).requires_grad_(False).train()


@cache
def floor() -> nn.Module:
    """The frozen model whose backward carries gradients to what the embeddings give, and to nothing else."""
    return carrying(mini_lm(), "embeddings")


def carrying(model: nn.Module, name: str) -> nn.Module:
    """The frozen model whose backward carries gradients to what one of its modules gives, and to nothing else."""
    model = copy.deepcopy(model)
    first = model.get_submodule(name)
    first.register_forward_hook(lambda _module, _args, out: out.requires_grad_() if torch.is_grad_enabled() else None)
    return model
