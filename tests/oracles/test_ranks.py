"""Adapters of a small rank, padded with zeros to a larger one, are what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gift_func as gf
from gift_func.adapter import AdaptedParameter
from gift_func.testing import HOSTS, refuses
from gift_func.testing.laws import Case

# Two methods that differ in rank alone, and so in scale.
PAIRS: dict[str, tuple[gf.WeightMethod, gf.WeightMethod]] = {
    "LoRA": (gf.LoRA(2, alpha=3.0), gf.LoRA(5, alpha=7.0)),
    "LoRA rslora balanced": (
        gf.LoRA(2, alpha=3.0, rslora=True, conv="balanced"),
        gf.LoRA(5, alpha=3.0, rslora=True, conv="balanced"),
    ),
    "LoRA pissa": (gf.LoRA(2, alpha=3.0, init="pissa"), gf.LoRA(3, alpha=3.0, init="pissa")),
    "DoRA": (gf.DoRA(2, alpha=3.0), gf.DoRA(3, alpha=3.0)),
    "DoRA flowing norm": (gf.DoRA(2, alpha=3.0, detach_norm=False), gf.DoRA(3, alpha=3.0, detach_norm=False)),
    "MixingLoRA": (gf.MixingLoRA(2, alpha=3.0), gf.MixingLoRA(4, alpha=3.0)),
    "AdaLoRA": (gf.AdaLoRA(2, alpha=3.0), gf.AdaLoRA(4, alpha=3.0)),
    "HiRA": (gf.HiRA(2), gf.HiRA(3)),
    "VeRA": (gf.VeRA(3), gf.VeRA(5)),
    "LoHa": (gf.LoHa(2, alpha=3.0), gf.LoHa(3, alpha=3.0)),
    "LoHa cores": (
        gf.LoHa(2, alpha=3.0, use_effective_conv2d=True),
        gf.LoHa(3, alpha=3.0, use_effective_conv2d=True),
    ),
    "LoKr": (gf.LoKr(1, alpha=3.0), gf.LoKr(2, alpha=3.0)),
    "LoKr cores": (
        gf.LoKr(1, alpha=3.0, use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
        gf.LoKr(2, alpha=3.0, use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
    ),
}
SPREAD = [
    (label, host)
    for label, pair in PAIRS.items()
    for host in HOSTS
    if not any(refuses(method, host) for method in pair) and (label, host) != ("MixingLoRA", "conv2d grouped")
]


def padded(
    mine: AdaptedParameter, tensors: dict[str, Tensor], larger: AdaptedParameter, shapes: dict[str, torch.Size]
) -> dict[str, Tensor]:
    """The tensors of the smaller rank as those of the larger one, by its names."""
    axes, scale = mine.method.rank_axes(tensors), mine.method.scaled_tensors(tensors)
    wanted = larger.method.scaled_tensors(tensors)
    assert scale.keys() == wanted.keys() <= tensors.keys()
    made = {}
    for local, tensor in tensors.items():
        tensor = tensor * (scale[local] / wanted[local]) if local in scale else tensor
        for axis in axes.get(local, ()):
            missing = list(tensor.shape)
            missing[axis] = shapes[local][axis] - tensor.shape[axis]
            assert missing[axis] > 0, f"{local} has no rank in axis {axis}"
            tensor = torch.cat([tensor, tensor.new_zeros(missing)], axis)
        assert tensor.shape == shapes[local], f"{local}: {tuple(tensor.shape)}, wanted {tuple(shapes[local])}"
        made[larger.names[local]] = tensor
    return made


@pytest.mark.parametrize(("label", "host"), SPREAD)
def test_padding_with_zeros_changes_nothing(label: str, host: str) -> None:
    narrow, wide = (Case(method, HOSTS[host]) for method in PAIRS[label])
    (mine,), (larger,) = ([p for p in case.adapted.adapted_parameters if p.names] for case in (narrow, wide))
    leaves = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in narrow.states[0].items()}
    own = {local: leaves[name] for local, name in mine.names.items()}
    shapes = {local: wide.start.adapter[name].shape for local, name in larger.names.items()}
    axes = mine.method.rank_axes(own)
    if own.keys() != shapes.keys() or all(own[local].shape == shape for local, shape in shapes.items()):
        assert label.startswith("LoKr")  # where a larger rank saves nothing, the factor is whole
        return
    state = padded(mine, own, larger, shapes)
    for tensor in state.values():
        tensor.retain_grad()
    found, wanted = wide.run(state), narrow.run(leaves)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    trained = list(narrow.trained(narrow.states[0]))
    wanted_gradients = torch.autograd.grad(wanted.sin().sum(), [leaves[name] for name in trained])
    found.sin().sum().backward()
    for name, gradient in zip(trained, wanted_gradients, strict=True):
        got = leaves[name].grad
        assert got is not None
        assert gradient.abs().max() > 0, f"{name}: nothing to compare"
        assert torch.allclose(got, gradient, rtol=1e-9, atol=1e-11), name
    zeros = 0
    for local in axes:
        of_padded = state[larger.names[local]].grad
        assert of_padded is not None
        rest = of_padded.clone()
        rest[tuple(slice(size) for size in own[local].shape)] = 0
        zeros += rest.numel() - own[local].numel()
        assert not rest.any(), f"{local}: the zeros have a gradient"
    assert zeros
    if label != "MixingLoRA":  # which makes no dense weight
        weights = [case.adapted.structured_weights(tensors) for case, tensors in ((wide, state), (narrow, leaves))]
        dense, plain = (made[mine.name].dense() for made in weights)
        assert torch.allclose(dense, plain, rtol=1e-13, atol=1e-13)


def test_every_pair_is_tried_where_the_method_goes() -> None:
    hosts = {label: {host for name, host in SPREAD if name == label} for label in PAIRS}
    wanted = {"linear", "conv2d", "conv2d grouped", "embedding", "attention", "conv1d of transformers", "experts"}
    for label, found in hosts.items():
        assert wanted <= found or label == "MixingLoRA", label
    assert hosts["MixingLoRA"] >= {"conv1d", "conv2d", "conv3d"}


def test_a_rank_shared_out_to_groups_is_no_axis() -> None:
    adapted = gf.adapt(torch.nn.Conv1d(4, 6, 3, groups=2), gf.MixingLoRA(rank=2))
    (part,) = adapted.adapted_parameters
    assert part.method.rank_axes({local: adapted.adapter[name] for local, name in part.names.items()}) == {}


def test_where_the_rank_is_more_than_zeros_nothing_is_said() -> None:
    for method in (gf.MiSS(2), gf.SHiRA(rank=1), gf.HRA(2), gf.OFT(4), gf.Full()):
        adapted = gf.adapt(torch.nn.Linear(8, 12), {"weight": method})
        (part,) = adapted.adapted_parameters
        tensors = {local: adapted.adapter[name] for local, name in part.names.items()}
        assert part.method.rank_axes(tensors) == {}
        assert part.method.scaled_tensors(tensors) == {}
