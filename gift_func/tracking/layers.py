"""Functions of whole layers: convolutions, pooling, normalisation over a batch, attention and recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .layout import LOST, SampleAxis, Tag, Untracked, agree, merge
from .table import Args, Batch, Kwargs, Rule, argument, follows, only_first, tag_of


def _batched(n: int) -> Rule:
    """Samples on the first axis of an input that has that axis, a channel axis and n more."""

    def rule(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        x, rows = only_first(args, kwargs)
        return LOST if isinstance(rows, SampleAxis) and (rows.axis != 0 or x.dim() != n + 2) else rows

    return rule


for _n in (1, 2, 3):
    follows(f"""
        conv{_n}d conv_transpose{_n}d max_pool{_n}d avg_pool{_n}d adaptive_avg_pool{_n}d adaptive_max_pool{_n}d lp_pool{_n}d
        max_pool{_n}d_with_indices adaptive_max_pool{_n}d_with_indices fractional_max_pool{_n}d
        fractional_max_pool{_n}d_with_indices
        """)(_batched(_n))


@follows("batch_norm instance_norm group_norm local_response_norm interpolate upsample upsample_nearest upsample_bilinear")
def on_first(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """Samples on the first axis. Statistics of the whole batch mix values, as without adapters, but rows stay rows."""
    _, rows = only_first(args, kwargs)
    return LOST if isinstance(rows, SampleAxis) and rows.axis != 0 else rows


follows(F.unfold)(_batched(2))
follows(F.fold)(_batched(1))


@follows("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle")
def leading(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The last three axes are put in another order."""
    x, rows = only_first(args, kwargs)
    return LOST if isinstance(rows, SampleAxis) and rows.axis >= x.dim() - 3 else rows


@follows("grid_sample affine_grid")
def sampled(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Samples on the first axis of the input and of the grid."""
    found: Tag = None
    for value in (*args, *kwargs.values()):
        rows = tag_of(value)
        if isinstance(rows, SampleAxis) and rows.axis != 0:
            return LOST
        found = merge(found, rows, result.shape, batch.size)
    return found


@follows("multi_head_attention_forward")
def multi_head_attention(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """Queries, keys and values `[L, N, E]`: samples on axis 1; of the attention weights `[N, L, S]`, on axis 0."""
    found: Tag = None
    size = args[0].shape[1]
    heads = argument(args, kwargs, 4, "num_heads")
    masks = {"key_padding_mask": (15, 2, 1), "attn_mask": (17, 3, heads)}
    given = [(x, 1, 3, 1) for x in args[:3]]
    given += [(argument(args, kwargs, at, name), 0, n, inner) for name, (at, n, inner) in masks.items()]
    known = [x for x, *_ in given]
    for value in (*args, *kwargs.values()):
        if tag_of(value) is not None and all(value is not x for x in known):
            return LOST
    for x, axis, n, inner in given:
        rows = tag_of(x)
        if rows is None:
            continue
        if isinstance(rows, Untracked) or x.dim() != n or rows.axis != axis:
            return LOST
        if inner > 1:
            # A mask may be [N * heads, L, S], a sample's heads being neighbours.
            if rows.owners is not None or rows.inner % inner:
                return LOST
            rows = SampleAxis(0, rows.inner // inner)
        rows = rows.on(1)
        if isinstance(found, SampleAxis) and not agree(found, rows, size, batch.size):
            return LOST
        found = rows
    return [found, found.on(0) if isinstance(found, SampleAxis) else found]


@follows("lstm gru rnn_tanh rnn_relu")
def recurrent(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """Samples on axis 1, or 0 if the batch comes first; of the states on axis 1 always. Packed sequences mix them."""
    state = args[1]
    if len(args) != 9 or isinstance(args[2], Tensor):
        return LOST
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    found: Tag = None
    axis = 0 if args[8] else 1
    for x, where in ((args[0], axis), *((x, 1) for x in states)):
        rows = tag_of(x)
        if rows is None:
            continue
        if isinstance(rows, Untracked) or x.dim() != 3 or rows.axis != where:
            return LOST
        if isinstance(found, SampleAxis) and not agree(found, rows, x.shape[where], batch.size):
            return LOST
        found = rows.on(1)
    if any(tag_of(x) is not None for x in args[2]):
        return LOST
    return [found.on(axis) if isinstance(found, SampleAxis) else found, *(found for _ in result[1:])]


@follows("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def recurrent_cell(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """One step: samples on the first axis of the input and of the states."""
    state = args[1]
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    found: Tag = None
    for x in (args[0], *states):
        rows = tag_of(x)
        if isinstance(rows, SampleAxis) and (rows.axis != 0 or x.dim() != 2):
            return LOST
        found = merge(found, rows, x.shape, batch.size)
    return LOST if any(tag_of(value) is not None for value in args[2:]) else found
