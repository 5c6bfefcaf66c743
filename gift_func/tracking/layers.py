"""Functions of whole layers: convolutions, pooling, normalisation over a batch, attention and recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .layout import UNTRACKED, SampleAxis, Tag, Untracked, agree, merge
from .table import Args, AxisRule, BatchInfo, Kwargs, argument, axis_rule_for, rule_for, tag_of


def _batched(n: int | None) -> AxisRule:
    """Samples on the first axis of an input that has that axis, a channel axis and n more; None for any number."""

    def rule(x: Tensor, tag: SampleAxis, batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
        return UNTRACKED if tag.axis != 0 or n not in (None, x.dim() - 2) else tag

    return rule


for _n in (1, 2, 3):
    axis_rule_for(f"""
        conv{_n}d conv_transpose{_n}d max_pool{_n}d avg_pool{_n}d adaptive_avg_pool{_n}d adaptive_max_pool{_n}d lp_pool{_n}d
        max_pool{_n}d_with_indices adaptive_max_pool{_n}d_with_indices fractional_max_pool{_n}d
        fractional_max_pool{_n}d_with_indices
        """)(_batched(_n))


# Statistics of the batch mix values, as without adapters, but each row stays its sample's.
axis_rule_for("""
    batch_norm instance_norm group_norm local_response_norm interpolate upsample upsample_nearest upsample_bilinear
    """)(_batched(None))
axis_rule_for(F.unfold)(_batched(2))
axis_rule_for(F.fold)(_batched(1))


@rule_for("grid_sample affine_grid")
def track_sampled(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Samples on the first axis of the input and of the grid."""
    found: Tag = None
    for value in (*args, *kwargs.values()):
        tag = tag_of(value)
        if isinstance(tag, SampleAxis) and tag.axis != 0:
            return UNTRACKED
        found = merge(found, tag, result.shape, batch.size)
    return found


@rule_for("multi_head_attention_forward")
def track_multi_head_attention(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Any:
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
            return UNTRACKED
    for x, axis, n, inner in given:
        tag = tag_of(x)
        if tag is None:
            continue
        if isinstance(tag, Untracked) or x.dim() != n or tag.axis != axis:
            return UNTRACKED
        if inner > 1:
            # A mask may be [N * heads, L, S], with a sample's heads next to each other.
            if tag.owners is not None or tag.inner % inner:
                return UNTRACKED
            tag = SampleAxis(0, tag.inner // inner)
        tag = tag.on(1)
        if isinstance(found, SampleAxis) and not agree(found, tag, size, batch.size):
            return UNTRACKED
        found = tag
    return [found, found.on(0) if isinstance(found, SampleAxis) else found]


@rule_for("lstm gru rnn_tanh rnn_relu")
def track_recurrent(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """Samples on axis 1, or 0 with `batch_first`; of the states always on axis 1. Packed sequences mix them."""
    state = args[1]
    if len(args) != 9 or isinstance(args[2], Tensor):
        return UNTRACKED
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    found: Tag = None
    axis = 0 if args[8] else 1
    for x, where in ((args[0], axis), *((x, 1) for x in states)):
        tag = tag_of(x)
        if tag is None:
            continue
        if isinstance(tag, Untracked) or x.dim() != 3 or tag.axis != where:
            return UNTRACKED
        if isinstance(found, SampleAxis) and not agree(found, tag, x.shape[where], batch.size):
            return UNTRACKED
        found = tag.on(1)
    if any(tag_of(x) is not None for x in args[2]):
        return UNTRACKED
    return [found.on(axis) if isinstance(found, SampleAxis) else found, *(found for _ in result[1:])]


@rule_for("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def track_recurrent_cell(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """One step: samples on the first axis of the input and of the states."""
    state = args[1]
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    found: Tag = None
    for x in (args[0], *states):
        tag = tag_of(x)
        if isinstance(tag, SampleAxis) and (tag.axis != 0 or x.dim() != 2):
            return UNTRACKED
        found = merge(found, tag, x.shape, batch.size)
    return UNTRACKED if any(tag_of(value) is not None for value in args[2:]) else found
