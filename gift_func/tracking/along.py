"""Functions along some axes: reductions, softmax, norms, sorting. Samples go through unless it is their axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .elementwise import elementwise
from .layout import LOST, SampleAxis, Tag, picked
from .table import Args, Batch, Kwargs, Rule, argument, broadcast, follows, only_first, tensors


def _reduced(rows: Tag, n: int, dims: Any, result: Any) -> Tag:
    """The tag after axes were reduced; the result tells whether they were kept with size 1."""
    if not isinstance(rows, SampleAxis):
        return rows
    if dims is None or isinstance(dims, bool):
        return LOST
    gone = {dim % n for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if rows.axis in gone or not gone:
        return LOST
    out = result if isinstance(result, Tensor) else result[0]
    return rows if out.dim() == n else rows.on(rows.axis - sum(dim < rows.axis for dim in gone))


def _reduction(position: int, default: Any = None) -> Rule:
    def rule(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        x, rows = only_first(args, kwargs)
        return _reduced(rows, x.dim(), argument(args, kwargs, position, "dim", default), result)

    return rule


follows("""
    sum mean nansum nanmean prod amax amin logsumexp argmax argmin any all var std var_mean std_mean median nanmedian
    count_nonzero mode
    """)(_reduction(1))
follows("norm vector_norm")(_reduction(2))
follows("kthvalue")(_reduction(2, -1))


@follows("max min")
def extreme(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """Of two tensors, elementwise; else a reduction."""
    if (len(args) > 1 and isinstance(args[1], Tensor)) or "other" in kwargs:
        return elementwise(batch, args, kwargs, result)
    x, rows = only_first(args, kwargs)
    return _reduced(rows, x.dim(), argument(args, kwargs, 1, "dim"), result)


def _kept(position: int, default: Any = None, name: str = "dim") -> Rule:
    def rule(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        x, rows = only_first(args, kwargs)
        dim = argument(args, kwargs, position, name, default)
        if not isinstance(rows, SampleAxis):
            return rows
        if dim is None:
            return LOST
        return LOST if rows.axis in [d % x.dim() for d in (dim if isinstance(dim, Sequence) else [dim])] else rows

    return rule


follows("softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp cumsum_ cumprod_")(_kept(1))
follows("glu")(_kept(1, -1))
follows("gumbel_softmax")(_kept(4, -1))
follows("normalize")(_kept(2, 1))
follows(Tensor.unfold)(_kept(1, None, "dimension"))


@follows("layer_norm rms_norm")
def layer_norm(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The last axes are normalised."""
    x, rows = only_first(args, kwargs)
    last = x.dim() - len(argument(args, kwargs, 1, "normalized_shape"))
    return LOST if isinstance(rows, SampleAxis) and rows.axis >= last else rows


def _pairwise(position: int | None, default: int) -> Rule:
    def rule(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
        a, b = list(tensors(args, kwargs))[:2]
        shape = torch.broadcast_shapes(a.shape, b.shape)
        dim = default if position is None else argument(args, kwargs, position, "dim", default)
        return _reduced(broadcast([a, b], shape, batch), len(shape), dim, result)

    return rule


follows("cosine_similarity")(_pairwise(2, 1))
follows("pairwise_distance")(_pairwise(None, -1))


def _sorting(position: int) -> Rule:
    """Along an axis that is not the samples'. A vector along it may be sorted too: where its elements went is known."""

    def rule(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        x, rows = only_first(args, kwargs)
        if not isinstance(rows, SampleAxis):
            return rows
        if argument(args, kwargs, position, "dim", -1) % x.dim() != rows.axis:
            return rows
        order = result if isinstance(result, Tensor) else result[-1]
        return LOST if x.dim() > 1 else SampleAxis(0, 1, picked(rows, x.shape[0], order, batch.size))

    return rule


follows("sort argsort")(_sorting(1))
follows("topk")(_sorting(2))


@follows("multinomial")
def multinomial(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Draws along the last axis."""
    x, rows = only_first(args, kwargs)
    return LOST if isinstance(rows, SampleAxis) and rows.axis == x.dim() - 1 else rows
