"""Random draws that leave torch's global random state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Seed torch's global random state by a draw from a generator, and restore it afterwards; without one, do nothing."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def sample(total: int, count: int, *, seed: int | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """`count` different numbers below `total`, in random order.

    Args:
        seed: what they are drawn with, whatever the generator; None means from the generator.
        generator: None means torch's global one.
        device: where the result is; on the meta device nothing is drawn.
    """
    if device.type == "meta":
        return torch.empty(count, dtype=torch.long, device=device)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    source = "cpu" if generator is None else generator.device
    return torch.randperm(total, generator=generator, device=source)[:count].to(device)
