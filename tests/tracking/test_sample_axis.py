"""Tracking the samples of a batch: a tag is right if changing one sample changes nothing that is another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import models
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from gift_func.tracking.sample_axis import SampleAxis, TrackSamples, Untracked, owner_index, sample_axis_of, tag

B = 3
LAYOUTS: dict[str, tuple[tuple[int, ...], SampleAxis]] = {
    "a": ((3, 3, 4), SampleAxis(0, 1)),  # as many tokens as samples
    "b": ((3, 3, 4), SampleAxis(1, 1)),
    "c": ((6, 3, 4), SampleAxis(0, 2)),
    "d": ((6, 3, 4), SampleAxis(0, 1)),  # two rounds of the samples
    "e": ((5, 3, 4), SampleAxis(0, 1, torch.tensor([2, 0, 1, 1, 0]))),
    "f": ((3, 4, 3), SampleAxis(2, 1)),
    "g": ((4, 6, 2), SampleAxis(1, 2)),
    "h": ((4, 5, 6), SampleAxis(1, 1, torch.tensor([1, 1, 2, 0, 2]))),
}
FIRST, MIDDLE, ALL = "acde", "bgh", "abcdefgh"


def w(*shape: int) -> Tensor:
    """A constant: always the same numbers."""
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)


def ids(x: Tensor) -> Tensor:
    """Numbers below 8 made of a tensor."""
    return (x * 10).floor().long().remainder(8)


def zeros(x: Tensor) -> Tensor:
    """A buffer that is not of the batch."""
    return torch.zeros(x.shape, dtype=x.dtype)


def wrote(x: Tensor, write: Callable[[Tensor], Any], buffer: Tensor | None = None) -> Tensor:
    """A buffer, of zeros, after something was written to it or to a view of it."""
    buffer = zeros(x) if buffer is None else buffer
    write(buffer)
    return buffer


def put(x: Tensor, index: Any, value: Any) -> Tensor:
    """A tensor after an assignment to a part of it."""
    x[index] = value
    return x


def attend(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A tensor's attention to itself."""
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def wide(x: Tensor) -> Tensor:
    """Six features."""
    return F.pad(x, (0, 6))[:, :, :6]


def there_and_back(x: Tensor) -> Tensor:
    """Rows in another order, and back in their own by the inverse permutation."""
    order = x[:, 0].argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return torch.tanh(x[order])[back]


def experts(x: Tensor) -> Tensor:
    """A mixture of experts on `[N, D]`: the best two of three for each token, a loop over the experts."""
    weights, chosen = torch.topk(F.softmax(x @ w(x.shape[-1], 3), dim=-1), 2)
    out = torch.zeros_like(x)
    for expert in range(3):
        token, place = torch.where(chosen == expert)
        hidden = torch.tanh(F.linear(x[token], w(x.shape[-1], x.shape[-1]) + expert))
        out.index_add_(0, token, hidden * weights[token, place, None])
    return out


def grouped(x: Tensor) -> Tensor:
    """Rows in two groups, each with a matrix of its own."""
    return torch._grouped_mm(x.bfloat16(), w(2, 24, 8).bfloat16(), offs=torch.tensor([2, len(x)], dtype=torch.int32)).float()


def matrix(x: Tensor) -> Tensor:
    """The same rows as `[N, D]`."""
    return x.reshape(x.shape[0], -1)


MHA = nn.MultiheadAttention(6, 2).double()
LSTM = nn.LSTM(6, 3, bidirectional=True).double()
GRU = nn.GRU(6, 3, batch_first=True).double()
CELL = nn.LSTMCell(6, 3).double()

# What it is called: the function, and the layouts in which the samples must be found again.
CASES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "add": (lambda x: x + w(x.shape[-1]), ALL),
    "radd": (lambda x: 2 + x, ALL),
    "rsub": (lambda x: 2 - x, ALL),
    "rdiv": (lambda x: 2 / (x.abs() + 1), ALL),
    "rpow": (lambda x: 2**x, ALL),
    "iadd": (lambda x: x.clone().__iadd__(x), ALL),
    "mul_": (lambda x: x.clone().mul_(3), ALL),
    "self": (lambda x: x * torch.tanh(x) / (1 + x.square()), ALL),
    "where": (lambda x: torch.where(x > 0, x, w(x.shape[-1])), ALL),
    "masked_fill": (lambda x: x.masked_fill(x < 0, 7.0), ALL),
    "constant_mask": (lambda x: torch.where(w(*x.shape) > 0, x, 0.0), ALL),
    "clamp": (lambda x: x.clamp(-1, 1), ALL),
    "lerp": (lambda x: torch.lerp(x, w(*x.shape), 0.3), ALL),
    "addcmul": (lambda x: torch.addcmul(w(*x.shape), x, x), ALL),
    "gelu": (lambda x: F.gelu(x), ALL),
    "silu": (lambda x: F.silu(x), ALL),
    "relu_": (lambda x: F.relu(x.clone(), inplace=True), ALL),
    "leaky": (lambda x: F.leaky_relu(x), ALL),
    "prelu": (lambda x: F.prelu(x, w(1)), ALL),
    "to": (lambda x: x.to(torch.float32), ALL),
    "to_other": (lambda x: x.to(w(1)), ALL),
    "type_as": (lambda x: x.float().type_as(x), ALL),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), ALL),
    "detach": (lambda x: x.detach() + x.data, ALL),
    "contiguous": (lambda x: x.transpose(0, 2).contiguous(), ALL),
    "compare": (lambda x: (x > 0) & ~(x == 1), ALL),
    "max_of_two": (lambda x: torch.max(x, w(*x.shape)), ALL),
    "copy_": (lambda x: torch.empty_like(x).copy_(x), ALL),
    "out": (lambda x: torch.add(x, 1, out=torch.empty_like(x)), ALL),
    "outer_axis": (lambda x: x + w(5, 1, 1, 1), ALL),
    "zeros_like": (lambda x: x + torch.zeros_like(x), ALL),
    "new_ones": (lambda x: x * x.new_ones(x.shape[-1]), ALL),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(torch.stack([x, x], -1))), ALL),
    "mse": (lambda x: F.mse_loss(x, w(*x.shape), reduction="none"), ALL),
    "view_merge": (lambda x: x.reshape(-1, x.shape[-1]), "abcdegh"),
    "view_flat": (lambda x: x.flatten(), ALL),
    "view_last": (lambda x: x.flatten(1), "acdebgh"),
    "view_heads": (lambda x: x.view(*x.shape[:-1], -1, 2) if x.shape[-1] % 2 == 0 else x, "abcdegh"),
    "view_back": (lambda x: x.reshape(-1, x.shape[-1]).view(x.shape), "abcdegh"),
    "flat_back": (lambda x: x.flatten().reshape(x.shape), "abcdeh"),
    "ravel": (lambda x: x.ravel(), ALL),
    "unflatten": (lambda x: x.unflatten(-1, (1, -1)), ALL),
    "view_as": (lambda x: matrix(x).view_as(x), "acde"),
    "split_samples": (lambda x: x.reshape(3, -1, *x.shape[1:]) if x.shape[0] % 3 == 0 else x, "ac"),
    "rounds": (lambda x: x.reshape(-1, 3, *x.shape[1:]) if x.shape[0] % 3 == 0 else x, "ad"),
    "transpose": (lambda x: x.transpose(0, 1), ALL),
    "transpose_names": (lambda x: x.transpose(dim0=-1, dim1=0), ALL),
    "T": (lambda x: matrix(x).T, FIRST),
    "mT": (lambda x: x.mT, ALL),
    "permute": (lambda x: x.permute(2, 0, 1), ALL),
    "permute_tuple": (lambda x: torch.permute(x, (-1, 0, 1)), ALL),
    "movedim": (lambda x: x.movedim(0, -1), ALL),
    "movedims": (lambda x: x.movedim((0, 2), (1, 0)), ALL),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), ALL),
    "squeeze_all": (lambda x: x[None, :, :, None].squeeze(), ALL),
    "unsqueeze": (lambda x: x.unsqueeze(-1).unsqueeze(0), ALL),
    "expand": (lambda x: x[None].expand(2, -1, -1, -1), ALL),
    "expand_as": (lambda x: x[:, :, :1].expand_as(x), "abcdegh"),
    "broadcast_tensors": (lambda x: torch.broadcast_tensors(x, w(2, 1, 1, 1))[0], ALL),
    "repeat": (lambda x: x.repeat(2, 3, 1), ALL),
    "repeat_more": (lambda x: x.repeat(2, 1, 1, 2), ALL),
    "tile": (lambda x: x.tile(2), ALL),
    "interleave": (lambda x: x.repeat_interleave(2, dim=0), ALL),
    "interleave_middle": (lambda x: x.repeat_interleave(3, dim=1), ALL),
    "interleave_counts": (lambda x: x.repeat_interleave(torch.arange(x.shape[0]), dim=0), ALL),
    "interleave_flat": (lambda x: x.repeat_interleave(2), ALL),
    "chunk": (lambda x: x.chunk(2, dim=-1), ALL),
    "chunk_first": (lambda x: x.chunk(2), ALL),
    "split": (lambda x: x.split([1, x.shape[1] - 1], dim=1), ALL),
    "split_size": (lambda x: torch.split(x, 2, 0), ALL),
    "unbind": (lambda x: x.unbind(1), "acdef"),
    "iterate": (lambda x: list(x.transpose(0, 1)), "acdef"),
    "select": (lambda x: x.select(-1, 0), "abcdegh"),
    "narrow": (lambda x: x.narrow(1, 1, 2), ALL),
    "flip": (lambda x: x.flip(0, 1), ALL),
    "roll": (lambda x: x.roll((1, 2), (0, 1)), ALL),
    "tril": (lambda x: x.tril(), ALL),
    "cat": (lambda x: torch.cat([x, x * 2], dim=-1), ALL),
    "cat_first": (lambda x: torch.cat([x, x[:1], x]), ALL),
    "cat_rounds": (lambda x: torch.cat((x, x), dim=1), ALL),
    "cat_constant": (lambda x: torch.cat([w(x.shape[0], 2, x.shape[2]), x], dim=1), "acdef"),
    "cat_past": (lambda x: torch.cat([torch.tensor([]), x], dim=-2), ALL),
    "hstack": (lambda x: torch.hstack([x, x]), ALL),
    "stack": (lambda x: torch.stack([x, -x], dim=1), ALL),
    "stack_last": (lambda x: torch.stack([x, -x], -1), ALL),
    "pad": (lambda x: F.pad(x, (1, 1)), "abcdegh"),
    "pad_two": (lambda x: F.pad(x, (1, 0, 2, 0)), FIRST),
    "unfold": (lambda x: x.unfold(-1, 2, 1), "abcdegh"),
    "matmul": (lambda x: x @ w(x.shape[-1], 5), "abcdegh"),
    "rmatmul": (lambda x: w(5, x.shape[-2]) @ x, "acdef"),
    "matmul_vector": (lambda x: x @ w(x.shape[-1]), "abcdegh"),
    "self_attention": (lambda x: (x @ x.mT).softmax(-1) @ x, FIRST),
    "bmm": (lambda x: torch.bmm(x, x.mT), FIRST),
    "baddbmm": (lambda x: torch.baddbmm(w(x.shape[1]), x, x.mT), FIRST),
    "mm": (lambda x: torch.mm(matrix(x), w(matrix(x).shape[1], 2)), FIRST),
    "addmm": (lambda x: torch.addmm(w(2), matrix(x), w(matrix(x).shape[1], 2)), FIRST),
    "linear": (lambda x: F.linear(x, w(5, x.shape[-1]), w(5)), "abcdegh"),
    "linear_name": (lambda x: F.linear(input=x, weight=w(5, x.shape[-1])), "abcdegh"),
    "bilinear": (lambda x: F.bilinear(x, x, w(2, x.shape[-1], x.shape[-1])), "abcdegh"),
    "einsum": (lambda x: torch.einsum("btd,bsd->bts", x, x), FIRST),
    "einsum_out": (lambda x: torch.einsum("...d,de->e...", x, w(x.shape[-1], 2)), "abcdegh"),
    "einsum_implied": (lambda x: torch.einsum("bij,jk", x, w(x.shape[-1], 2)), "abcdegh"),
    "outer": (lambda x: torch.outer(x[:, 0, 0], w(3)), FIRST),
    "cdist": (lambda x: torch.cdist(x, w(2, x.shape[-1])), "abcdegh"),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), FIRST),
    "attention_heads": (lambda x: attend(x[:, None], w(x.shape[1], x.shape[1])), FIRST),
    "attention_keys": (lambda x: F.scaled_dot_product_attention(x, w(7, x.shape[-1]), w(7, 2)), "abcdegh"),
    "softmax": (lambda x: F.softmax(x, dim=-1), "abcdegh"),
    "log_softmax": (lambda x: x.log_softmax(1), "acdef"),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:], w(x.shape[-1])), "abcdegh"),
    "rms_norm": (lambda x: F.rms_norm(x, x.shape[-2:]), FIRST),
    "normalize": (lambda x: F.normalize(x, dim=-1), "abcdegh"),
    "glu": (lambda x: F.glu(torch.cat([x, x], -1)), "abcdegh"),
    "cumsum": (lambda x: x.cumsum(1), "acdef"),
    "cummax": (lambda x: x.cummax(1), "acdef"),
    "sum": (lambda x: x.sum(1), "acdef"),
    "sum_keep": (lambda x: x.sum(dim=(1, 2), keepdim=True), FIRST),
    "mean": (lambda x: x.mean(-1, keepdim=True), "abcdegh"),
    "mean_first": (lambda x: x.mean(0), "bfgh"),
    "amax": (lambda x: x.amax((0, 2)), "bgh"),
    "max": (lambda x: x.max(1), "acdef"),
    "argmax": (lambda x: x.argmax(dim=1), "acdef"),
    "std": (lambda x: x.std(-1), "abcdegh"),
    "var_mean": (lambda x: torch.var_mean(x, -1), "abcdegh"),
    "norm": (lambda x: x.norm(dim=-1), "abcdegh"),
    "linalg_norm": (lambda x: torch.linalg.vector_norm(x, dim=1), "acdef"),
    "logsumexp": (lambda x: x.logsumexp(-1), "abcdegh"),
    "all": (lambda x: (x[..., :1] > 0).all(-1), "abcdegh"),
    "topk": (lambda x: x.topk(2, dim=1), "acdef"),
    "sort": (lambda x: x.sort(-1), "abcdegh"),
    "sort_stable": (lambda x: torch.sort(x, dim=1, stable=True), "acdef"),
    "cosine": (lambda x: F.cosine_similarity(x, w(x.shape[-1]), dim=-1), "abcdegh"),
    "distance": (lambda x: F.pairwise_distance(x, w(*x.shape)), "abcdegh"),
    "cross_entropy": (lambda x: F.cross_entropy(x, w(*x.shape).softmax(1), reduction="none"), "acdef"),
    "cross_entropy_ids": (lambda x: F.cross_entropy(x, torch.zeros(x.shape[0], x.shape[2]).long(), reduction="none"), "acdef"),
    "multinomial": (lambda x: torch.multinomial(F.one_hot(ids(x)[:, :, 0], 8).double().flatten(0, 1), 1), "abcdeh"),
    "embedding": (lambda x: F.embedding(ids(x), w(8, 4)), ALL),
    "embedding_bag": (lambda x: F.embedding_bag(ids(matrix(x)), w(8, 4), mode="sum", per_sample_weights=matrix(x)), FIRST),
    "one_hot": (lambda x: F.one_hot(ids(x), 8), ALL),
    "gather": (lambda x: x.gather(1, x.argsort(1)), "acdef"),
    "gather_samples": (lambda x: x.gather(0, torch.tensor([1, 0]).view(2, 1, 1).expand(2, *x.shape[1:])), FIRST),
    "gather_table": (lambda x: w(*x.shape[:2], 8).gather(2, ids(x)), ALL),
    "along": (lambda x: torch.take_along_dim(x, x.argmax(1, keepdim=True), dim=1), "acdef"),
    "scatter": (lambda x: torch.zeros(*x.shape, dtype=x.dtype).scatter(1, x.argsort(1), x), "acdef"),
    "scatter_add_": (lambda x: x.clone().scatter_add_(2, ids(x) % 2, x), "abcdegh"),
    "item_int": (lambda x: x[..., 0], "abcdegh"),
    "item_none": (lambda x: x[:, None, :, None], ALL),
    "item_slices": (lambda x: x[1:, :-1, ::2], ALL),
    "item_vector": (lambda x: x[torch.tensor([2, 0, 2, 1])], ALL),
    "item_negative": (lambda x: x[torch.tensor([-1, 0])], ALL),
    "item_list": (lambda x: x[[0, 2, 2]], ALL),
    "item_middle": (lambda x: x[:, torch.tensor([2, 0, 2, 1])], ALL),
    "item_mask": (lambda x: x[torch.arange(x.shape[0]) != 1], ALL),
    "item_own_mask": (lambda x: x[x[:, 0, 0] > 0], FIRST),
    "item_mask_two": (lambda x: x[w(*x.shape[:2]) > 0], "abcdegh"),
    "item_own_mask_two": (lambda x: x[x[:, :, 0] > 0], "abcdegh"),
    "item_pair": (lambda x: x[torch.tensor([2, 0, 1]), torch.tensor([0, 0, 2])], "abcdegh"),
    "item_last_token": (lambda x: x[torch.arange(x.shape[0]), ids(x)[:, 0, 0] % 3], FIRST),
    "item_apart": (lambda x: x[torch.tensor([2, 0]), :, torch.tensor([0, 1])], ALL),
    "item_grid": (lambda x: x[torch.tensor([2, 0])[:, None], torch.tensor([0, 1, 2])], "abcdegh"),
    "item_of_table": (lambda x: w(8, 5)[ids(x)], ALL),
    "item_of_table_last": (lambda x: w(5, 8)[:, ids(x)], ALL),
    "index_select": (lambda x: x.index_select(0, torch.tensor([2, 0, 0])), ALL),
    "where_positions": (lambda x: matrix(x)[torch.where(matrix(x)[:, :2] > 0)[0]], FIRST),
    "sorted_vector": (lambda x: x[:, 0, 0].sort()[0], FIRST),
    "permuted": (lambda x: matrix(x)[matrix(x)[:, 0].argsort()], FIRST),
    "permuted_back": (lambda x: there_and_back(matrix(x)), FIRST),
    "set_slice": (lambda x: put(zeros(x), (slice(None), slice(1, None)), x[:, 1:]), "acdef"),
    "set_column": (lambda x: put(zeros(x), (slice(None), 0), x[:, 1]), "acdef"),
    "set_tagged": (lambda x: put(x.clone(), (..., 0), 0.0), ALL),
    "set_mask": (lambda x: put(x.clone(), x > 0, 0.0), ALL),
    "set_part": (lambda x: put(x.clone(), slice(1, 3), x[1:3]), ALL),
    "set_rows": (lambda x: put(x.clone(), torch.tensor([2, 1]), x[torch.tensor([2, 1])]), ALL),
    "view_write": (lambda x: wrote(x, lambda z: z[:, 1:].copy_(x[:, 1:])), "acdef"),
    "view_column": (lambda x: wrote(x, lambda z: z[:, 0].add_(x[:, 1])), "acdef"),
    "index_add": (lambda x: x.index_add(0, torch.tensor([1, 2]), x[torch.tensor([1, 2])]), ALL),
    "index_add_middle": (lambda x: x.index_add(1, torch.tensor([1, 0]), x[:, :2]), "acdef"),
    "index_copy": (lambda x: wrote(x, lambda z: z.index_copy_(1, torch.tensor([1, 0]), x[:, :2])), "acdef"),
    "index_fill": (lambda x: x.index_fill(0, torch.tensor([1]), 0.0), ALL),
    "conv1d": (lambda x: F.conv1d(x, w(2, x.shape[1], 2), padding=1), FIRST),
    "conv_transpose": (lambda x: F.conv_transpose1d(x, w(x.shape[1], 2, 2)), FIRST),
    "conv2d": (lambda x: F.conv2d(x[:, None], w(2, 1, 2, 2)), FIRST),
    "max_pool": (lambda x: F.max_pool1d(x, 2), FIRST),
    "max_pool_indices": (lambda x: F.max_pool2d(x[:, None], 2, return_indices=True), FIRST),
    "avg_pool": (lambda x: F.avg_pool1d(x, 2), FIRST),
    "adaptive_pool": (lambda x: F.adaptive_avg_pool2d(x[:, None], 1), FIRST),
    "batch_norm": (lambda x: F.batch_norm(x, w(x.shape[1]), w(x.shape[1]) + 2), FIRST),
    "group_norm": (lambda x: F.group_norm(x, 1), FIRST),
    "instance_norm": (lambda x: F.instance_norm(x), FIRST),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), FIRST),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x[:, None].repeat(1, 4, 1, 1), 2), FIRST),
    "im2col": (lambda x: F.unfold(x[:, None], 2), FIRST),
    "grid_sample": (lambda x: F.grid_sample(x[:, None], x[:, :, :2].tanh()[:, None], align_corners=False), FIRST),
    "mha": (lambda x: MHA(wide(x), wide(x), wide(x)), MIDDLE),
    "lstm": (lambda x: LSTM(wide(x)), MIDDLE),
    "gru_first": (lambda x: GRU(wide(x)), FIRST),
    "cell": (lambda x: CELL(wide(x)[:, 0]), FIRST),
    "grouped_mm": (lambda x: grouped(F.pad(matrix(x), (0, 24))[:, :24].float()), FIRST),
    "experts": (lambda x: experts(matrix(x)), "acd"),
    "experts_tokens": (lambda x: experts(x.reshape(-1, x.shape[-1])).view(x.shape), "abcd"),
}  # fmt: skip
# Which elements come out depends on all samples here; changing one moves the others' places.
MOVES = {
    "item_own_mask",
    "item_last_token",
    "item_own_mask_two",
    "where_positions",
    "sorted_vector",
    "permuted",
    "permuted_back",
}


def owners_like(tensor: Tensor, samples: SampleAxis, batch: int = B) -> Tensor:
    """The sample of every element of a tensor."""
    size = tensor.shape[samples.axis]
    assert samples.owners is None or samples.owners.shape == (size,)
    shape = [size if axis == samples.axis else 1 for axis in range(tensor.dim())]
    return owner_index(samples, size, batch).reshape(shape).expand(tensor.shape)


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_one_sample_changes_its_own_elements_only(name: str, layout: str) -> None:
    function, known = CASES[name]
    shape, samples = LAYOUTS[layout]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    try:
        function(x)
    except (RuntimeError, IndexError, ValueError):
        assert layout not in known, "the function does not take this layout"
        return
    marked = tag(x, samples)
    with TrackSamples(B):
        out = leaves(function(marked))
    assert sample_axis_of(x) is None
    assert sample_axis_of(marked) is samples
    tags = [sample_axis_of(tensor) for tensor in out]
    if layout in known:
        assert all(isinstance(found, SampleAxis) for found in tags), tags
    owner = owners_like(x, samples)
    if name in MOVES:
        return _check_by_gradient(function, x, owner, tags)
    moved = False
    for sample in range(B):
        other = leaves(function(torch.where(owner == sample, 2 * torch.sin(3 * x) + 0.1, x)))
        for before, after, found in zip(out, other, tags, strict=True):
            if isinstance(found, Untracked):
                continue
            changed = (before.double() - after.double()).abs() > 1e-12
            moved |= bool(changed.any())
            allowed = owners_like(before, found) == sample if found is not None else torch.zeros_like(changed)
            assert not (changed & ~allowed).any(), (sample, found)
    assert moved or not all(isinstance(found, SampleAxis) for found in tags)


def _check_by_gradient(function: Callable[[Tensor], Any], x: Tensor, owner: Tensor, tags: list[Any]) -> None:
    x = x.clone().requires_grad_()
    (out,) = leaves(function(x))
    (found,) = tags
    if isinstance(found, SampleAxis):
        for sample in range(B):
            (grad,) = torch.autograd.grad(out[owners_like(out, found) == sample].sum(), x, retain_graph=True)
            assert not (grad != 0)[owner != sample].any()


MIXED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "mean": (lambda x: x.mean() + 1, "torch.Tensor.mean"),
    "sum": (lambda x: x.transpose(0, 1).sum(1), "torch.Tensor.sum"),
    "contracted": (lambda x: F.linear(x.permute(1, 2, 0), w(2, 3)), "torch.nn.functional.linear"),
    "fft": (lambda x: torch.relu(torch.fft.rfft(x).real), "torch.fft.rfft"),
    "two_layouts": (lambda x: x + x.transpose(0, 1), "torch.Tensor.add"),
    "one_sample": (lambda x: x[1] * 2, "torch.Tensor.__getitem__"),
    "einsum": (lambda x: torch.einsum("btd->td", x), "torch.functional.einsum"),
    "attention": (lambda x: attend(x.transpose(0, 1)), "torch.nn.functional.scaled_dot_product_attention"),
    "softmax": (lambda x: x.softmax(0), "torch.Tensor.softmax"),
    "cat": (lambda x: torch.cat([x, w(1, 3, 4)]), "torch.cat"),
    "pad": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), "torch.nn.functional.pad"),
    "reshape": (lambda x: x.reshape(4, 9), "torch.Tensor.reshape"),
    "mask": (lambda x: x[:, x[:, 0, 0] > 0], "torch.Tensor.__getitem__"),
    "permuted_table": (lambda x: w(9)[ids(x.sum().reshape(1))], "torch.Tensor.sum"),
    "view_of_a_buffer": (lambda x: wrote(x, lambda z: z.view(9, 4)[::2].copy_(x.view(9, 4)[::2])), "torch.Tensor.copy_"),
    "view_of_the_batch": (lambda x: wrote(x, lambda z: z[:, 0].copy_(x[:, 0].flip(0)), x.clone()), "torch.Tensor.copy_"),
    "wrong_place": (lambda x: put(x.clone(), slice(0, 2), x[1:]), "torch.Tensor.__setitem__"),
    "buffer_of_no_layout": (lambda x: w(7, 3, 4).index_add_(0, torch.tensor([4, 1, 2]), x), "torch.Tensor.index_add_"),
    "wrong_rows": (lambda x: x.index_add(0, torch.tensor([1, 0]), x[:2]), "torch.Tensor.index_add"),
    "two_batches_in_a_cell": (lambda x: CELL(wide(x)[:, 0], (x[:, 0, :3].flip(0), w(3, 3)))[0], "torch.lstm_cell"),
    "unbatched": (lambda x: GRU(wide(x)[:, 0])[0], "torch.gru"),
    "unbatched_conv": (lambda x: F.conv1d(x[:, 0], w(2, 3, 2)), "torch.nn.functional.conv1d"),
    "scaled_by_a_sample": (lambda x: F.linear(x, x[:, 0]), "torch.nn.functional.linear"),
    "loss": (lambda x: F.mse_loss(x, w(3, 3, 4)), "torch.nn.functional.mse_loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_mixed_samples_are_untracked_and_the_function_is_named(name: str) -> None:
    function, wanted = MIXED[name]
    x = tag(torch.randn(3, 3, 4, dtype=torch.float64), SampleAxis(0, 1))
    with TrackSamples(3):
        found = sample_axis_of(function(x))
    assert found == Untracked(wanted)


def test_constants_are_untagged() -> None:
    x = tag(torch.randn(3, 4), SampleAxis(0, 1))
    with TrackSamples(3):
        made = [torch.zeros_like(x), x.new_ones(3), (x > 0).nonzero(), *torch.where(x > 0), torch.arange(3) + 1]
        buffer = x.clone()
        buffer.zero_()
        made.append(buffer)
    assert [sample_axis_of(tensor) for tensor in made] == [None] * len(made)


def test_flags_and_hooks_are_no_writes() -> None:
    x = tag(torch.randn(3, 4), SampleAxis(0, 1))
    with TrackSamples(3):
        x.requires_grad = True
        (x * 2).sum().backward()
        x.grad = None
        hook = x.register_hook(lambda grad: grad)
        hook.remove()
        x.data = torch.ones(3, 4)
        assert sample_axis_of(x) is None
        x.data = tag(torch.ones(3, 4), SampleAxis(1, 1))
    found = sample_axis_of(x)
    assert isinstance(found, SampleAxis)
    assert found.axis == 1


def test_the_callers_tensor_is_never_marked() -> None:
    x = torch.randn(3, 4)
    marked = tag(x, SampleAxis(0, 1))
    with TrackSamples(3):
        marked.mul_(2)
        F.dropout(marked, training=False)
    assert sample_axis_of(x) is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_buffer_is_marked_through_its_views(context: Callable[[], Any]) -> None:
    x = tag(torch.randn(3, 3, 4), SampleAxis(0, 1))
    with context(), TrackSamples(3):
        buffer = torch.zeros(3, 5, 4)
        torch.add(x, 1, out=buffer[:, 2:])
        found = sample_axis_of(buffer)
    assert isinstance(found, SampleAxis)
    assert found.axis == 0


class Doubled(torch.autograd.Function):
    """Torch functions, or numpy, inside of a function that a mode does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by_numpy: bool) -> Tensor:
        return torch.from_numpy(x.numpy(force=True) * 2) if by_numpy else x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * 2, None


@pytest.mark.parametrize("by_numpy", [False, True])
def test_an_autograd_function_is_tracked_as_far_as_it_is_torch(by_numpy: bool) -> None:
    x = tag(torch.randn(3, 4, requires_grad=True), SampleAxis(0, 1))
    function: Any = Doubled  # torch leaves `apply` untyped
    with TrackSamples(3):
        found = sample_axis_of(function.apply(x, by_numpy))
    assert (found is None) == by_numpy


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_tracked_and_recomputed(reentrant: bool) -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    with TrackSamples(3):
        y = checkpoint(torch.tanh, tag(leaf, SampleAxis(0, 1)), use_reentrant=reentrant)
        assert isinstance(sample_axis_of(y), SampleAxis)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, 1 - torch.tanh(leaf.detach()) ** 2)


def test_out_replaces_an_old_tag() -> None:
    x, into = tag(torch.randn(3, 4), SampleAxis(0, 1)), tag(torch.empty(3, 4), SampleAxis(1, 1))
    with TrackSamples(3):
        torch.add(torch.ones(3, 4), 1, out=into)
        assert sample_axis_of(into) is None
        torch.add(x, 1, out=into)
    found = sample_axis_of(into)
    assert isinstance(found, SampleAxis)
    assert found.axis == 0


def test_a_batch_of_one_is_tracked_whatever_its_axis_meets() -> None:
    x, y = tag(torch.randn(1, 5, 4), SampleAxis(0, 1)), tag(torch.randn(5, 1, 4), SampleAxis(1, 1))
    with TrackSamples(1):
        found = sample_axis_of(x + y)
        grown = sample_axis_of(x + torch.ones(3, 1, 1))
    assert isinstance(found, SampleAxis)
    assert isinstance(grown, SampleAxis)
    assert owner_index(grown, 3, 1).tolist() == [0, 0, 0]


def grid(row: str) -> models.Inputs:
    """As many tokens as samples, so that no shape tells one axis from the other."""
    ids = models.tokens(3, 3)
    more = {"decoder_input_ids": models.tokens(3, 3)} if row == "t5" else {}
    return (), {
        "input_ids": ids,
        "attention_mask": models.padded(3, 3),
        **more,
        **({} if row == "bert" else {"use_cache": False}),
    }


def moe(experts: str) -> models.Row:
    return models.Row(f"mixtral_{experts}", lambda: models.mixtral(experts), models.causal)


# The row, and the axis of its inputs along which the samples lie.
NETWORKS = [
    *((models.BY_NAME[name], 0) for name in (
        "mlp", "cnn", "conv1d", "conv2d_modes", "conv3d", "conv_transpose1d", "conv_transpose2d", "bilinear", "mha",
        "mha_weights", "mha_causal", "mha_float_mask", "mha_cross", "mha_dims_weights", "mha_bias_kv", "mha_zero_attn",
        "encoder", "encoder_padded", "encoder_norm_first", "transformer", "lstm", "lstm_cell", "shared", "named", "entangled",
        "bert", "llama", "gpt2", "t5", "vit", "mixtral", "mixtral_batched", "qwen2_moe",
    )),
    *((models.BY_NAME[name], 1) for name in ("gru", "rnn")),
    (moe("grouped_mm"), 0),
]  # fmt: skip


class Watch:
    """Looks at what enters the layers of a network, and from where its gradient comes."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.batch = batch
        self.sources: list[tuple[Tensor, SampleAxis]] = []
        self.seen: list[tuple[str, Tensor, Any]] = []
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                module.register_forward_pre_hook(self._reader(name))
            elif isinstance(module, nn.Embedding):
                module.register_forward_hook(self._start)

    def _reader(self, name: str) -> Callable[[nn.Module, Any], None]:
        def read(module: nn.Module, args: Any) -> None:
            self.seen.append((name, args[0], sample_axis_of(args[0])))

        return read

    def _start(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        samples = sample_axis_of(output)
        if samples is None:
            return None  # of positions, the same for every sample
        assert isinstance(samples, SampleAxis)
        leaf = output.detach().requires_grad_()
        assert sample_axis_of(leaf) is samples
        self.sources.append((leaf, samples))
        return leaf

    def check(self, name: str, tensor: Tensor, samples: Any) -> None:
        assert isinstance(samples, SampleAxis), f"{name}: {samples}"
        mine = owners_like(tensor, samples, self.batch)
        for sample in range(self.batch):
            part = torch.where(mine == sample, tensor, 0).square().sum()
            grads = torch.autograd.grad(part, [leaf for leaf, _ in self.sources], retain_graph=True, allow_unused=True)
            for grad, (leaf, where) in zip(grads, self.sources, strict=True):
                if grad is not None:
                    others = owners_like(leaf, where, self.batch) != sample
                    assert not (grad[others] != 0).any(), f"{name}: sample {sample} depends on others"


@pytest.mark.parametrize(("row", "axis"), NETWORKS, ids=[row.name for row, _ in NETWORKS])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_networks(row: models.Row, axis: int) -> None:
    # Products of groups are not made for float64.
    dtype = torch.float32 if row.name == "mixtral_grouped_mm" else torch.float64
    model = row.model(dtype).eval()
    args, kwargs = row.call(dtype) if "input_ids" not in row.call()[1] else grid(row.name)
    sizes = {leaf.shape[axis] for leaf in leaves(args)} or {3}
    (batch,) = sizes
    watch = Watch(model, batch)

    def start(tensor: Tensor) -> Tensor:
        samples = SampleAxis(axis, 1)
        if tensor.is_floating_point():
            tensor.requires_grad_()
            watch.sources.append((tensor, samples))
        return tag(tensor, samples)

    constant = {"attn_mask"}  # of every sample alike
    args = tree_map_only(Tensor, start, args)
    kwargs = {name: value if name in constant else tree_map_only(Tensor, start, value) for name, value in kwargs.items()}
    with TrackSamples(batch):
        output = model(*args, **kwargs)
    assert watch.sources
    for seen in watch.seen:
        watch.check(*seen)
    out = [leaf for leaf in leaves(output) if leaf.is_floating_point() and leaf.requires_grad]
    watch.check("output", out[0], sample_axis_of(out[0]))


def test_the_fast_path_of_encoders_is_not_taken() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    with torch.no_grad(), TrackSamples(3):
        found = sample_axis_of(layer(tag(torch.randn(3, 3, 8), SampleAxis(0, 1))))
    assert isinstance(found, SampleAxis)
    assert found.axis == 0


def test_owner_index() -> None:
    assert owner_index(SampleAxis(0, 2), 12, 3).tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert owner_index(SampleAxis(0, 1, torch.tensor([2, 0])), 2, 3).tolist() == [2, 0]
