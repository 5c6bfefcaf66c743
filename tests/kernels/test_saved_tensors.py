"""What kernels keep for backward is saved where hooks see it, so that checkpoints and offloading free it."""

from __future__ import annotations

import pytest
import torch
from benchmarks.counting import allocated_peak
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import gift_func as gf
from gift_func.kernels import gain

METHODS: dict[str, gf.Method] = {
    "stacked_linear": gf.LoRA(rank=2, init="random"),
    "gain": gf.DoRA(rank=2, init="random"),
    "rotated_linear": gf.OFT(32),
    "shared_linear": gf.MiSS(8),
}
TOKENS, WIDTH = 2048, 128


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(WIDTH, WIDTH)
    if name == "mixed_linear":
        adapted = [gf.adapt(net, gf.LoRA(rank=rank, init="random")) for rank in (2, 2, 2)]
        bank = gf.AdapterBank(dict(zip("abc", adapted, strict=True)))
        counts = {"a": 1, "b": 2, "c": 1}
        bank.names = [name for name, count in counts.items() for _ in range(count)]  # type: ignore[assignment]
        return bank
    return gf.adapt(net, METHODS[name])


def run(model: nn.Module, x: Tensor) -> Tensor:
    names = getattr(model, "names", None)
    out: Tensor = model(x) if names is None else model(x.view(len(names), -1, WIDTH), adapters=names)
    return out


@pytest.mark.parametrize("name", [*METHODS, "mixed_linear"])
def test_nothing_is_kept_past_saved_tensor_hooks(name: str) -> None:
    model = model_of(name)
    run(model, torch.randn(TOKENS, WIDTH))  # what is made once and kept
    x = torch.randn(TOKENS, WIDTH)
    alive = StorageWeakRef(x.untyped_storage())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda _: torch.zeros(())):
        out = run(model, x)
    del x
    assert out.grad_fn is not None
    assert alive.expired(), "the input is still in memory"


@pytest.mark.parametrize("name", [*METHODS, "mixed_linear"])
def test_gradients_with_what_is_saved_on_the_processor(name: str) -> None:
    model, x = model_of(name), torch.randn(TOKENS, WIDTH)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(run(model, x).square().mean(), parameters)
    with torch.autograd.graph.save_on_cpu():
        loss = run(model, x).square().mean()
    found = torch.autograd.grad(loss, parameters)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


class Stacks(nn.Module):
    """Four stacks of four layers, each stack in a checkpoint if there are to be any."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stacks = nn.ModuleList(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)]) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for stack in self.stacks:
            x = checkpoint(stack, x, use_reentrant=False) if self.checkpointed else stack(x)
        return x


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpointed_step_needs_less_memory(name: str) -> None:
    """Peak bytes of a training step of sixteen layers: the outputs of four checkpoints, and what one stack needs at a time."""
    torch.manual_seed(0)
    adapted = gf.adapt(Stacks(checkpointed=True), METHODS[name])
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)

    def step() -> None:
        adapted(x).square().mean().backward()
        adapted.zero_grad()

    step()
    activations = allocated_peak(step) / (x.nbytes)
    assert activations < 14, "that is what all sixteen layers need"


def test_a_gain_is_large_enough_here_to_take_its_kernel() -> None:
    assert TOKENS * WIDTH >= gain.MIN_ELEMENTS
