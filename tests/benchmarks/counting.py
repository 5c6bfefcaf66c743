"""What a call does, counted: the same on any machine, where time is too noisy to be asserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

GATHERS = {"aten::index", "aten::index_select", "aten::gather", "aten::take", "aten::take_along_dim"}


def product_in_place(_: Sequence[int], a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * prod(a) * b[-1]


# The counter knows these only with a fresh output.
IN_PLACE = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), product_in_place)


def flops(run: Callable[[], object]) -> int:
    """Multiplications and additions of all matrix products and attentions of a call."""
    run()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        run()
    return int(counter.get_total_flops())


class Kernels(TorchDispatchMode):
    """Counts the operations that compute, and what they gather.

    Attributes:
        seen: how often each operation ran; views are none.
        gathered: numbers that were picked from a tensor by index, but for rows of an embedding.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is not annotated
        self.seen: Counter[str] = Counter()
        self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            name = func._schema.name
            self.seen[name] += 1
            if name in GATHERS and isinstance(made, Tensor):
                self.gathered += made.numel()
        return made


def kernels(run: Callable[[], object]) -> Kernels:
    """The operations of a call that is not the first of its kind."""
    run()
    found = Kernels()
    with found:
        run()
    return found


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """What a forward pass keeps for the backward, each storage once, but for tensors that are there anyway.

    Args:
        forward: the pass.
        known: the model's tensors.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del made
    return total


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that tensors made in a call took at one time."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events: Any = found.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return int(most)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, with those of a base that is not a submodule."""
    return [*model.parameters(), *model.buffers()]
