"""EVA: LoRA initialised from the inputs of the layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapt import base_of, draw_adapter
from .adapted_model import AdaptedModel
from .errors import AdaptError
from .initialise import Initial
from .methods import DoRA, LoRA, Method
from .methods.matrix import CONVOLUTIONS, HF_CONV1D
from .methods.method import is_a
from .methods.options import FrozenMap
from .network.fast_path import FastPath
from .network.frozen_base import FrozenBase
from .network.module_tree import clone
from .select import Regex
from .strategy import Explanation, Placement, Strategy

Forward = Callable[[Any, Any], object]
Mask = Callable[[Any], Tensor | None]


def eva(
    model: nn.Module | FrozenBase,
    strategy: Method | Mapping[str, Method] | Strategy,
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    forward: Forward | None = None,
    mask: Mask | None = None,
    generator: torch.Generator | None = None,
) -> AdaptedModel:
    """Adapt a model by LoRA whose A and ranks are computed from the layers' inputs: `A = V_rᵀ`, `B = 0`.

    V_r are the first r principal directions of a layer's inputs, in which they vary most. The sum of all ranks is that of
    the strategy, but they are distributed by explained variance: the directions of all layers are ordered by the share of
    their layer's variance that each explains, and the first of them are taken, at most `rho · rank` of one layer. A layer
    none of whose directions is taken is not adapted. The scale s of every layer is that of the strategy.

    Shapes (`n` = all positions of all batches): inputs X `(n, in)`, A `(r, in)`; for a convolution X holds its patches,
    `(n, in·k...)`, and A is `(r, in, k, ...)`.

    Args:
        model: as for `adapt`; a private copy of it is run, in evaluation mode.
        strategy: as for `adapt`, but not GIFt's protocol. Its LoRA and DoRA rules must select weights of Linear,
            transformers' Conv1D and ungrouped convolutions (`conv="kernel"`); other methods are initialised as usual.
        batches: the batches that the model is run on, once each.
        rho: the largest factor by which a layer's rank may grow, at least 1; with 1 the ranks do not change.
        forward: runs the frozen base on a batch, `forward(base, batch)`. By default a mapping is passed as keyword
            arguments, a tuple or list as arguments, and anything else as the only argument.
        mask: returns the positions of a batch that count (padding does not), boolean and in the shape of a layer's input
            without its features; None for all.
        generator: the source of the other methods' initial values. For LoRA nothing is drawn.

    Returns:
        The adapted model. Its strategy names every site, with `rank_pattern` and `alpha_pattern`, and is plain data.

    Raises:
        AdaptError: for a rho below 1, a LoRA rule with its own init, a site of another kind or without inputs, a mask of
            another shape, or inputs that span too few directions for the ranks.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> adapted = gf.eva(model, gf.LoRA(rank=2), torch.randn(3, 20, 6))
        >>> sum(adapted.adapter[name].shape[0] for name in adapted.adapter if name.endswith("lora_A"))
        4

    References:
        Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, 2024
        (arXiv:2410.07170). There, as in PEFT, a randomised incremental SVD iterates over the data until its directions
        converge (`tau`). Here the covariance of all inputs is computed in float64 and decomposed, so the result is exact,
        does not depend on the split into batches, and needs `in²` numbers for each site. As in PEFT the inputs are centred.
        With `rslora` PEFT multiplies alpha by r'/r, which changes s; here s does not change. Whitening is not supported.
    """
    if not (isinstance(rho, (int, float)) and isfinite(rho) and rho >= 1):
        raise AdaptError(f"rho is how often its own rank a site may get, a number of at least 1, got rho={rho!r}")
    rules = Strategy.of(strategy)
    base = base_of(model)
    plain = model if isinstance(model, nn.Module) and not isinstance(model, AdaptedModel) else None
    found = rules.examine(base, plain)
    found.check()
    sites = {placement.name: placement for _, placement in found.taken.values() if type(placement.method) in (LoRA, DoRA)}
    if not sites:
        raise AdaptError("EVA finds starting points for gf.LoRA and gf.DoRA, and no rule of the strategy places either")
    with torch.no_grad():
        spectra = _spectra(base, sites, batches, forward or _call, mask)
        ranks = _ranks(sites, spectra, float(rho))
    rows = {name: spectra[name].directions[:rank] for name, rank in ranks.items()}
    return AdaptedModel(draw_adapter(base, _redistributed(found, ranks), _Calibrated(rows, generator)))


@dataclass(frozen=True)
class _Scatter:
    """The inputs so far: their number, their mean, and the sum of the outer products of their deviations from it."""

    count: int
    mean: Tensor
    total: Tensor

    def plus(self, rows: Tensor) -> _Scatter:
        """The same of these and more inputs `(n, in)` (Chan et al., 1983)."""
        if not len(rows):
            return self
        mean = rows.mean(0)
        centred, apart, count = rows - mean, mean - self.mean, self.count + len(rows)
        between = torch.outer(apart, apart) * (self.count * len(rows) / count)
        return _Scatter(count, self.mean + apart * (len(rows) / count), self.total + centred.mT @ centred + between)


@dataclass(frozen=True)
class _Spectrum:
    """Principal directions `(d, in)`, in order of variance, and the share of the variance that each explains."""

    directions: Tensor
    shares: Tensor

    @staticmethod
    def of(scatter: _Scatter) -> _Spectrum:
        values, vectors = torch.linalg.eigh(scatter.total)
        values, vectors = values.flip(0), vectors.flip(1)
        # The sign of an eigenvector depends on the library; here its largest element is made positive.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        directions = (vectors * largest.sign()).mT
        threshold = values[:1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        real = int((values > threshold).sum())
        return _Spectrum(directions[:real], (values / values.sum())[:real].cpu())


class _Calibrated(Initial):
    """Initial tensors with given `lora_A`; the others are drawn."""

    def __init__(self, rows: Mapping[str, Tensor], generator: torch.Generator | None) -> None:
        super().__init__(generator)
        self.rows = rows

    def own(self, placement: Placement) -> dict[str, Tensor]:
        rows = self.rows.get(placement.name)
        if rows is None:
            return super().own(placement)
        device = placement.site.parameter.device
        tensors = placement.method.init_tensors(placement.site, torch.Generator(device))  # what it draws is replaced
        return {**tensors, "lora_A": rows.reshape(tensors["lora_A"].shape).to(tensors["lora_A"])}


def _spectra(
    base: FrozenBase, sites: Mapping[str, Placement], batches: Iterable[Any], forward: Forward, mask: Mask | None
) -> dict[str, _Spectrum]:
    """The spectra of the sites' inputs while a frozen base runs on the batches."""
    tree = base.tree.copy(clone)
    tree.module.eval()
    for name, tensor in FastPath(base, tree, ()).bindings({}, ()).items():
        tree.bind(name, tensor)
    seen: dict[str, _Scatter] = {}
    selected: Tensor | None = None

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = _positions(module, args[0] if args else next(iter(kwargs.values())))
        if selected is not None:
            if selected.shape != rows.shape[:-1]:
                raise AdaptError(
                    f"the mask has shape {tuple(selected.shape)}, and {name!r} is given inputs at positions of shape "
                    f"{tuple(rows.shape[:-1])}"
                )
            rows = rows[selected.to(rows.device, torch.bool)]
        rows = rows.reshape(-1, rows.shape[-1]).double()
        width = rows.shape[-1]
        start = seen.get(name) or _Scatter(0, rows.new_zeros(width), rows.new_zeros(width, width))
        seen[name] = start.plus(rows)

    for name, placement in sites.items():
        for module, attribute in tree.places[name]:
            reason = _why_not(placement.rule, module, attribute)
            if reason:
                raise AdaptError(f"EVA cannot find a start for {placement.site.name!r} of {type(module).__name__}: {reason}")
            module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
    for batch in batches:
        selected = None if mask is None else mask(batch)
        forward(tree.module, batch)
    for name, placement in sites.items():
        if name not in seen or not seen[name].count:
            raise AdaptError(
                f"{placement.site.name!r} was given no input by the batches, so nothing is known of it. Give batches that "
                "reach it (its module must be called, not only its weight read), or leave it out of the strategy."
            )
        if not bool(seen[name].total.isfinite().all()):
            raise AdaptError(f"{placement.site.name!r} was given inputs that are not finite, which have no directions")
    return {name: _Spectrum.of(seen[name]) for name in sites}


def _why_not(method: Method, module: nn.Module, attribute: str) -> str | None:
    """Why the inputs of a module are not those of LoRA's A; None if they are."""
    assert isinstance(method, LoRA)
    if method.init != "kaiming":
        return f"the method sets A by init={method.init!r}, and EVA sets it by data; leave init at 'kaiming'"
    if isinstance(module, CONVOLUTIONS):
        if module.groups > 1:
            return f"it needs groups=1, since each group has its own share of the rank, and has groups={module.groups}"
        if method.conv != "kernel":
            return f"it needs conv='kernel', whose A acts on a patch, got conv={method.conv!r}"
    elif not isinstance(module, nn.Linear) and not is_a(module, HF_CONV1D):
        return "it needs a Linear, transformers' Conv1D or a convolution. Leave it out of the strategy, or of this rule"
    return None if attribute == "weight" else f"it needs the layer's weight, and this is its {attribute}"


def _positions(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as positions and features, `(..., in)`; for a convolution these are its patches."""
    if not isinstance(module, CONVOLUTIONS):
        return x
    spatial = len(module.kernel_size)
    x = x if x.ndim > spatial + 1 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x.movedim(1, 1 + spatial).flatten(1 + spatial)


def _ranks(sites: Mapping[str, Placement], spectra: Mapping[str, _Spectrum], rho: float) -> dict[str, int]:
    """For each site, how many of its directions are among the first of those of all sites."""
    wanted = {name: _lora(placement).rank for name, placement in sites.items()}
    shares = {name: spectrum.shares[: round(wanted[name] * rho)] for name, spectrum in spectra.items()}
    owners = [name for name, found in shares.items() for _ in range(len(found))]
    budget = sum(wanted.values())
    if len(owners) < budget:
        short = min(shares, key=lambda name: len(shares[name]) - wanted[name])
        raise AdaptError(
            f"the ranks sum to {budget}, and the inputs vary in {len(owners)} directions that rho={rho:g} lets be taken: "
            f"{sites[short].site.name!r} shows {len(shares[short])} for rank {wanted[short]}. Give more or longer batches, "
            "or lower the rank."
        )
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)
    first = [owners[index] for index in order[:budget].tolist()]
    return {name: first.count(name) for name in sites}


def _redistributed(explanation: Explanation, ranks: Mapping[str, int]) -> Strategy:
    """The strategy that names the sites it took, with their new ranks, and leaves out those of rank 0."""
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[dict[str, int], dict[str, float]]] = {}
    for name, (index, _) in explanation.added.items():
        names.setdefault(index, []).append(re.escape(name))
    for index, placement in explanation.taken.values():
        rank = ranks.get(placement.name)
        if placement.lead is not None or rank == 0:
            continue
        names.setdefault(index, []).append(re.escape(placement.site.name))
        if rank is None:
            continue
        lora, module = _lora(placement), f"^{re.escape(placement.site.module_name)}"
        rank_pattern, alpha_pattern = found.setdefault(index, ({}, {}))
        rule = placement.rule
        assert isinstance(rule, LoRA)
        if rank != rule.rank:
            rank_pattern[module] = rank
        alpha = lora.scale * (sqrt(rank) if lora.rslora else rank)
        if rank == lora.rank:  # no rounding
            alpha = rank if lora.alpha is None else lora.alpha
        if alpha != (rank if rule.alpha is None else rule.alpha):
            alpha_pattern[module] = alpha
    rules: list[tuple[Regex, Method]] = []
    for index in sorted(names):
        method = explanation.strategy.rules[index][1]
        if index in found:
            assert isinstance(method, LoRA)
            rank_pattern, alpha_pattern = found[index]
            method = method.replace(rank_pattern=FrozenMap(rank_pattern), alpha_pattern=FrozenMap(alpha_pattern))
        rules.append((Regex("|".join(names[index])), method))
    return Strategy(rules)


def _lora(placement: Placement) -> LoRA:
    assert isinstance(placement.method, LoRA)
    return placement.method


def _call(base: Any, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return base(**batch)
    return base(*batch) if isinstance(batch, (tuple, list)) else base(batch)
