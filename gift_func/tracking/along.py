"""Functions along some axes: reductions, softmax, norms, sorting. They keep the sample axis unless it is one of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .elementwise import track_elementwise
from .layout import UNTRACKED, SampleAxis, Tag, picked
from .table import Args, AxisRule, BatchInfo, Kwargs, TrackingRule, argument, axis_rule_for, broadcast, rule_for, tensors


def _reduced(tag: SampleAxis, n: int, dims: Any, result: Any) -> Tag:
    """The tag after a reduction of axes; the result's shape says whether they were kept with size 1 (`keepdim`)."""
    if dims is None or isinstance(dims, bool):
        return UNTRACKED
    gone = {dim % n for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if tag.axis in gone or not gone:
        return UNTRACKED
    out = result if isinstance(result, Tensor) else result[0]
    return tag if out.dim() == n else tag.on(tag.axis - sum(dim < tag.axis for dim in gone))


def _reduction(position: int, default: Any = None) -> AxisRule:
    def rule(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        return _reduced(tag, x.dim(), argument(args, kwargs, position, "dim", default), result)

    return rule


_track_reduced = axis_rule_for("""
    sum mean nansum nanmean prod amax amin logsumexp argmax argmin any all var std var_mean std_mean median nanmedian
    count_nonzero mode
    """)(_reduction(1))
axis_rule_for("norm vector_norm")(_reduction(2))
axis_rule_for("kthvalue")(_reduction(2, -1))


@rule_for("max min")
def track_extreme(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """Elementwise for two tensors, otherwise a reduction."""
    if (len(args) > 1 and isinstance(args[1], Tensor)) or "other" in kwargs:
        return track_elementwise(batch, args, kwargs, result)
    return _track_reduced(batch, args, kwargs, result)


def _unreduced(position: int | None, default: Any = None, name: str = "dim") -> AxisRule:
    def rule(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        dim = default if position is None else argument(args, kwargs, position, name, default)
        if dim is None:
            return UNTRACKED
        return UNTRACKED if tag.axis in [d % x.dim() for d in (dim if isinstance(dim, Sequence) else [dim])] else tag

    return rule


axis_rule_for("softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp cumsum_ cumprod_")(_unreduced(1))
axis_rule_for("glu")(_unreduced(1, -1))
axis_rule_for("gumbel_softmax")(_unreduced(4, -1))
axis_rule_for("normalize")(_unreduced(2, 1))
axis_rule_for(Tensor.unfold)(_unreduced(1, None, "dimension"))
axis_rule_for("multinomial")(_unreduced(None, -1))
axis_rule_for("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle")(_unreduced(None, (-3, -2, -1)))


@axis_rule_for("layer_norm rms_norm")
def track_layer_norm(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Normalisation over the last axes."""
    last = x.dim() - len(argument(args, kwargs, 1, "normalized_shape"))
    return UNTRACKED if tag.axis >= last else tag


def _pairwise(position: int | None, default: int) -> TrackingRule:
    def rule(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
        a, b = list(tensors(args, kwargs))[:2]
        shape = torch.broadcast_shapes(a.shape, b.shape)
        dim = default if position is None else argument(args, kwargs, position, "dim", default)
        tag = broadcast([a, b], shape, batch)
        return _reduced(tag, len(shape), dim, result) if isinstance(tag, SampleAxis) else tag

    return rule


rule_for("cosine_similarity")(_pairwise(2, 1))
rule_for("pairwise_distance")(_pairwise(None, -1))


def _sorting(position: int) -> AxisRule:
    """Sorting along another axis than the sample axis; a vector may be sorted along it, since the order is known."""

    def rule(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        if argument(args, kwargs, position, "dim", -1) % x.dim() != tag.axis:
            return tag
        order = result if isinstance(result, Tensor) else result[-1]
        return UNTRACKED if x.dim() > 1 else SampleAxis(0, 1, picked(tag, x.shape[0], order, batch.size))

    return rule


axis_rule_for("sort argsort")(_sorting(1))
axis_rule_for("topk")(_sorting(2))
