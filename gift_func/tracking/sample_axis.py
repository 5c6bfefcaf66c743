"""The mode that tracks a batch's samples through torch functions, so that the sample axis of every activation is known.

The network's input is tagged with its sample axis. While the mode `TrackSamples` is on, the result of every torch function
that has a rule is tagged as the rule says; the result of a function without a rule, or of one that mixes samples, is tagged
`Untracked`, with the function's name. Shapes are never taken as evidence: a tensor of as many tokens as there are samples is
not taken for a batch.

Some results have no tag although they were made from the batch, because a mode does not see what made them: scripted
functions, numpy, custom kernels (an `autograd.Function` is tracked where it is written in torch functions), what `torch.vmap`
returns, and in inference mode the base of a view that was written to. A tensor without a tag is therefore not always a
constant. Tags stay on tensors that are kept after the mode ends, such as a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from ..weights.names import METADATA
from ..weights.slot import TorchFunction
from .layout import TAG_KEY, UNTRACKED, SampleAxis, Tag, Untracked, owner_index, sample_axis_of, set_tag, tag
from .replay import READERS, Answer
from .table import TOLERANT, TRACKING_RULES, BatchInfo, Kwargs

__all__ = ["SampleAxis", "TrackSamples", "Untracked", "owner_index", "sample_axis_of", "tag"]


class TrackSamples(TorchFunctionMode):
    """A mode in which the results of torch functions of tagged tensors are tagged.

    An index is data: in `x[i]`, with `i` on the sample axis, each row's sample follows from the values of `i`, whatever these
    were computed from. Values of the batch that leave torch (`item()`, `tolist()`, `if x.any():`) are not tracked.

    Args:
        batch: the number of samples, B.

    Attributes:
        answers: the numbers that were read from tensors, in order; with other numbers the network may call other functions.
        depends_on_values: whether what the network does may depend on values other than these: many read at once, or sizes.

    Example:
        >>> import torch
        >>> from gift_func.tracking.sample_axis import TrackSamples, SampleAxis, sample_axis_of, tag
        >>> tokens = tag(torch.randn(2, 3, 4), SampleAxis(0, 1))  # [B, T, D]
        >>> with TrackSamples(2):
        ...     flat = tokens.reshape(6, 4)
        ...     sample_axis_of(flat), sample_axis_of(flat[torch.tensor([5, 0])])
        (SampleAxis(axis=0, inner=3, owners=None), SampleAxis(axis=0, inner=1, owners=tensor([1, 0])))
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.answers: list[Answer] = []
        self.depends_on_values = False
        self._known = BatchInfo(batch)

    def __torch_function__(
        self, func: TorchFunction, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func in METADATA:
            return result
        if func in READERS:
            self.answers.append(result)
            return result
        # Without a generator or a list: this runs for every torch function of a tracked call.
        tagged = False
        untracked: Tag = None
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                found = value.__dict__.get(TAG_KEY)
                if found is not None:
                    tagged = True
                    untracked = found if type(found) is Untracked else untracked
            elif type(value) is list or type(value) is tuple:
                for item in value:
                    found = item.__dict__.get(TAG_KEY) if isinstance(item, Tensor) else None
                    if found is not None:
                        tagged = True
                        untracked = found if type(found) is Untracked else untracked
        if tagged:
            self._pass_on(func, args, kwargs or {}, result, untracked)
        return result

    def _pass_on(self, func: TorchFunction, args: tuple[Any, ...], kwargs: Kwargs, result: Any, untracked: Tag) -> None:
        """Tag the result of a function of tagged tensors."""
        target = result
        written = bool(args) and result is args[0]
        if not isinstance(result, Tensor):
            name = getattr(func, "__name__", "")
            if result is None and (func in _WRITERS or (name.endswith("_") and not name.endswith("__"))):
                target, written = args[0], True
            elif not isinstance(result, (tuple, list)):
                self.depends_on_values = True
                return
            elif not all(isinstance(item, Tensor) for item in result):
                self.depends_on_values = True
        if func in _SIZED_BY_VALUES or (func is Tensor.__getitem__ and _has_mask(args[1])):
            self.depends_on_values = self.depends_on_values or func not in _WHERE or isinstance(result, tuple)
        if "out" in kwargs:
            written = True
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        rule = TRACKING_RULES.get(func)
        made: Any
        if untracked is not None and func not in TOLERANT:
            made = untracked
        elif rule is None:
            made = UNTRACKED
        else:
            try:
                made = rule(self._known, args, kwargs, result)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                # The rule does not know this form of the call, so where the samples are in its result is not known.
                made = UNTRACKED
        if made is UNTRACKED:
            made = untracked or Untracked(_name(func))
        if not written and type(made) is SampleAxis and isinstance(target, Tensor):
            target.__dict__[TAG_KEY] = made
        else:
            _tag_result(target, made, func, written)


def _tag_result(target: Any, made: Any, func: TorchFunction, written: bool) -> None:
    """Set the tags of a result: one for all its tensors, or one for each."""
    if isinstance(target, Tensor):
        if made is UNTRACKED:
            made = Untracked(_name(func))
        if written and made is not None:
            _tag_base(target, made, func)
        set_tag(target, made)
    elif isinstance(target, (tuple, list)):
        each = made if isinstance(made, list) else [made] * len(target)
        for item, one in zip(target, each if len(each) == len(target) else [UNTRACKED] * len(target), strict=True):
            _tag_result(item, one, func, written)


def _tag_base(view: Tensor, made: Tag, func: TorchFunction) -> None:
    """Tag the base of a view that was written to, on the axis that the view's sample axis is a view of, if there is one."""
    base = view._base
    if base is None:
        return
    before, had = sample_axis_of(base), sample_axis_of(view)
    if before is None and had is not None:
        return  # an alias made by `tag`: its base is the caller's tensor
    if isinstance(before, Untracked) or (before is not None and _plainly_same(had, made)):
        return
    if isinstance(made, SampleAxis) and before is None:
        size, stride = view.shape[made.axis], view.stride(made.axis)
        axes = [a for a in range(base.dim()) if base.shape[a] == size and base.stride(a) == stride]
        if len(axes) == 1 and size > 1:
            set_tag(base, made.on(axes[0]))
            return
    set_tag(base, Untracked(_name(func)))


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
"""Functions whose result has a size that depends on values; for `where` only if it is called with a condition alone."""


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)


_WRITERS = frozenset([Tensor.__setitem__, Tensor.data.__set__])  # type: ignore[attr-defined]  # a getset descriptor to Python
_RULE_OF_DATA = TRACKING_RULES.setdefault(Tensor.data.__set__, lambda batch, args, kwargs, result: sample_axis_of(args[1]))  # type: ignore[attr-defined]


@cache
def _name(func: TorchFunction) -> str:
    """A function as a user would write it: `torch.Tensor.mean`, `torch.fft.fft`."""
    return str(resolve_name(func) or getattr(func, "__qualname__", repr(func)))
