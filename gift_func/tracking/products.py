"""Products: the sample axis may be a batch axis, the rows of the left operand or the columns of the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .layout import UNTRACKED, SampleAxis, Tag
from .table import Args, BatchInfo, Kwargs, argument, contract, rule_for, tag_of


def _labels(n: int, matrix: str) -> list[Any]:
    """Labels of an operand of n axes, the last two as in `matrix`; batch axes are numbered from the right."""
    return [*range(n - 3, -1, -1), *matrix]


@rule_for("matmul mm bmm mv dot vdot __matmul__")
def track_matmul(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """`[..., n, k] @ [..., k, m]`, and vectors in either place."""
    a, b = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
    return _product_tag(None, a, b, result, batch)


@rule_for("__rmatmul__")
def track_reversed_matmul(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """`matmul` with its operands swapped."""
    return _product_tag(None, args[1], args[0], result, batch)


@rule_for("addmm baddbmm addmv addmm_ baddbmm_ addmv_")
def track_added(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """A product added to a tensor that is broadcast to its shape."""
    return _product_tag(args[0], args[1], args[2], result, batch)


def _product_tag(onto: Tensor | None, a: Tensor, b: Tensor, result: Tensor, batch: BatchInfo) -> Tag:
    left = "nk" if a.dim() > 1 else "k"
    right = "km" if b.dim() > 1 else "k"
    out = _labels(max(a.dim(), b.dim()), left[:-1] + right[1:])
    operands = [(a, _labels(a.dim(), left)), (b, _labels(b.dim(), right))]
    if onto is not None:
        operands.append((onto, out[len(out) - onto.dim() :]))
    return contract(operands, out, result.shape, batch)


@rule_for("linear")
def track_linear(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """`[..., k]` times `[m, k]`, plus `[m]`."""
    x = args[0] if args else kwargs["input"]
    weight, bias = argument(args, kwargs, 1, "weight"), argument(args, kwargs, 2, "bias")
    tag = tag_of(x)
    if isinstance(tag, SampleAxis) and tag_of(weight) is None and tag_of(bias) is None:  # nearly every call
        return UNTRACKED if tag.axis == x.dim() - 1 else tag
    out = [*range(result.dim() - 1), "m"] if weight.dim() == 2 else [*range(result.dim())]
    inside = [*range(x.dim() - 1), "k"]
    outside = ["m", "k"] if weight.dim() == 2 else ["k"]
    return contract([(x, inside), (weight, outside), (bias, out[-1:])], out, result.shape, batch)


@rule_for("bilinear")
def track_bilinear(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """`[..., i]` and `[..., j]` through `[m, i, j]`."""
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    lead: list[Any] = list(range(result.dim() - 1))
    operands = [(args[0], [*lead, "i"]), (args[1], [*lead, "j"]), (weight, ["m", "i", "j"]), (bias, ["m"])]
    return contract(operands, [*lead, "m"], result.shape, batch)


@rule_for("outer ger")
def track_outer(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """`[n]` times `[m]`."""
    return contract([(args[0], "n"), (args[1], "m")], "nm", result.shape, batch)


@rule_for("cdist")
def track_cdist(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """`[..., n, k]` from `[..., m, k]`."""
    a, b = args[0], args[1]
    operands = [(a, _labels(a.dim(), "nk")), (b, _labels(b.dim(), "mk"))]
    return contract(operands, _labels(result.dim(), "nm"), result.shape, batch)


@rule_for("einsum")
def track_einsum(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The equation's letters are the labels; the axes of an ellipsis are numbered from the right."""
    if not isinstance(args[0], str):
        return UNTRACKED
    operands = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    left, arrow, right = args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = [letter for letter in left.replace("...", "") if letter != ","]
        right = "..." * ("..." in left) + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    labelled = [(x, _letters(term, x.dim())) for term, x in zip(terms, operands, strict=True)]
    return contract(labelled, _letters(right, result.dim()), result.shape, batch)


def _letters(term: str, n: int) -> list[Any]:
    before, dots, after = term.partition("...")
    return [*before, *(range(n - len(before) - len(after) - 1, -1, -1) if dots else ()), *after]


@rule_for("scaled_dot_product_attention")
def track_attention(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """`[..., L, E]`, `[..., S, E]` and `[..., S, Ev]`: samples on a leading axis, or on the queries alone."""
    labels = {"query": "le", "key": "se", "value": "sv", "attn_mask": "ls"}
    given = [(argument(args, kwargs, i, name), own) for i, (name, own) in enumerate(labels.items())]
    operands = [(x, _labels(x.dim(), own)) for x, own in given if isinstance(x, Tensor)]
    return contract(operands, _labels(result.dim(), "lv"), result.shape, batch)


@rule_for("grouped_mm _grouped_mm", tolerant=True)
def track_grouped_mm(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Groups of rows, each times its own matrix; where the groups end does not change which sample a row is of."""
    tag, other = tag_of(args[0]), tag_of(args[1])
    if args[0].dim() == args[1].dim() == 3:
        return _product_tag(None, args[0], args[1], result, batch)
    if other is not None or args[0].dim() != 2 or args[1].dim() != 3:
        return UNTRACKED
    return UNTRACKED if isinstance(tag, SampleAxis) and tag.axis == 1 else tag
