"""Follow the samples of a batch through a network, so that each row of every activation is known to be of one sample.

The input is tagged with where its samples lie. While the mode `TrackSamples` is on, every torch function that has a rule passes
tags on; a function without a rule, or one that mixes samples, leaves a tag that says so, with its name. Nothing is ever
guessed from a shape: a tensor of as many tokens as there are samples is not taken for a batch.

What a mode cannot see comes out untagged though it was made of the batch: scripted functions, numpy and kernels of one's own
(an `autograd.Function` is followed as far as it is written in torch functions), what `torch.vmap` returns, and in inference
mode the whole of a buffer of which a view was written to. An untagged tensor is therefore no proof of a constant, only of a
tensor that no function known to torch made of a tagged one. Tags stay on tensors that outlive the mode, as a cache does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from ..weights.names import METADATA
from .layout import KEY, LOST, SampleAxis, Tag, Untracked, owner_index, put, rows_of, tag
from .replay import READERS, Answer
from .table import RULES, TOLERANT, Batch, Function, Kwargs

__all__ = ["SampleAxis", "TrackSamples", "Untracked", "owner_index", "rows_of", "tag"]


class TrackSamples(TorchFunctionMode):
    """While it is on, what torch functions make of tagged tensors is tagged.

    An index is data: `x[i]` with `i` on the samples' axis gives each row its own sample, whatever `i` was computed from. Values
    of the batch that leave torch (`item()`, `tolist()`, `if x.any():`) are not followed.

    Args:
        batch: the number of samples, B.

    Attributes:
        answers: the numbers that were read of tensors, one by one; for other numbers the network may go another way.
        decided: whether the way may hang on values of the batch that are not among them: many at once, or sizes.

    Example:
        >>> import torch
        >>> from gift_func.tracking.sample_axis import TrackSamples, SampleAxis, rows_of, tag
        >>> tokens = tag(torch.randn(2, 3, 4), SampleAxis(0, 1))  # [B, T, D]
        >>> with TrackSamples(2):
        ...     flat = tokens.reshape(6, 4)
        ...     rows_of(flat), rows_of(flat[torch.tensor([5, 0])])
        (SampleAxis(axis=0, inner=3, owners=None), SampleAxis(axis=0, inner=1, owners=tensor([1, 0])))
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.answers: list[Answer] = []
        self.decided = False
        self._known = Batch(batch)

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in METADATA:
            return func(*args, **kwargs) if kwargs else func(*args)
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func in READERS:
            self.answers.append(result)
            return result
        tagged = False
        lost: Tag = None
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                found = value.__dict__.get(KEY)
                if found is not None:
                    tagged = True
                    if type(found) is Untracked:
                        lost = found
            elif type(value) is list or type(value) is tuple:
                for item in value:
                    if isinstance(item, Tensor):
                        found = item.__dict__.get(KEY)
                        if found is not None:
                            tagged = True
                            if type(found) is Untracked:
                                lost = found
        if tagged:
            self._pass_on(func, args, kwargs or {}, result, lost)
        return result

    def _pass_on(self, func: Function, args: tuple[Any, ...], kwargs: Kwargs, result: Any, lost: Tag) -> None:
        """Tag what a function made of tagged tensors."""
        target = result
        written = bool(args) and result is args[0]
        if not isinstance(result, Tensor):
            if result is None and (func in _WRITERS or _in_place(getattr(func, "__name__", ""))):
                target, written = args[0], True
            elif not isinstance(result, (tuple, list)):
                self.decided = True
                return
            elif not all(isinstance(item, Tensor) for item in result):
                self.decided = True
        if func in _SIZED_BY_VALUES or (func is Tensor.__getitem__ and _has_mask(args[1])):
            self.decided = self.decided or func not in _WHERE or isinstance(result, tuple)
        if "out" in kwargs:
            written = True
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        rule = RULES.get(func)
        made: Any
        if lost is not None and func not in TOLERANT:
            made = lost
        elif rule is None:
            made = LOST
        else:
            try:
                made = rule(self._known, args, kwargs, result)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                # A form of the call that the rule does not know: what it makes of the samples is not known either.
                made = LOST
        if made is LOST:
            made = lost or Untracked(_name(func))
        if not written and type(made) is SampleAxis and isinstance(target, Tensor):
            target.__dict__[KEY] = made
        else:
            _spread(target, made, func, written)


def _spread(target: Any, made: Any, func: Function, written: bool) -> None:
    """Put tags to a result: one to all its tensors, or each its own."""
    if isinstance(target, Tensor):
        if made is LOST:
            made = Untracked(_name(func))
        if written and made is not None:
            _tag_whole(target, made, func)
        put(target, made)
    elif isinstance(target, (tuple, list)):
        each = made if isinstance(made, list) else [made] * len(target)
        for item, one in zip(target, each if len(each) == len(target) else [LOST] * len(target), strict=True):
            _spread(item, one, func, written)


def _tag_whole(view: Tensor, made: Tag, func: Function) -> None:
    """Tag the tensor of which a view was written to: along the axis that the view's own axis is a view of, if there is one."""
    whole = view._base
    if whole is None:
        return
    before, had = rows_of(whole), rows_of(view)
    if before is None and had is not None:
        return  # an alias that was tagged by hand: its whole is the caller's own
    if isinstance(before, Untracked) or (before is not None and _plainly_same(had, made)):
        return
    if isinstance(made, SampleAxis) and before is None:
        size, stride = view.shape[made.axis], view.stride(made.axis)
        axes = [a for a in range(whole.dim()) if whole.shape[a] == size and whole.stride(a) == stride]
        if len(axes) == 1 and size > 1:
            put(whole, made.on(axes[0]))
            return
    put(whole, Untracked(_name(func)))


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _plainly_same(a: Tag, b: Tag) -> bool:
    if isinstance(a, SampleAxis) and isinstance(b, SampleAxis):
        return a.axis == b.axis and a.owners is b.owners and (a.inner == b.inner or a.owners is not None)
    return a is b


_SIZED_BY_VALUES = frozenset(
    getattr(space, name)
    for space in (torch, Tensor)
    for name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "where")
)
_WHERE = frozenset([torch.where, Tensor.where])
"""Functions whose result's size follows from values: of `where`, only where it is given a condition alone."""


def _has_mask(index: Any) -> bool:
    """Whether an index holds a mask, which picks as many as are true."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)


_WRITERS = frozenset([Tensor.__setitem__, Tensor.data.__set__])  # type: ignore[attr-defined]  # a getset descriptor to Python
_RULE_OF_DATA = RULES.setdefault(Tensor.data.__set__, lambda batch, args, kwargs, result: rows_of(args[1]))  # type: ignore[attr-defined]


@cache
def _name(func: Function) -> str:
    """A function as a user would write it: `torch.Tensor.mean`, `torch.fft.fft`."""
    return str(resolve_name(func) or getattr(func, "__qualname__", repr(func)))
