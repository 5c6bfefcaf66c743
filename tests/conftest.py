"""What every test file shares: one thread, and the third-party warnings that are let through."""

from __future__ import annotations

import pytest
import torch

THIRD_PARTY = [
    # oneDNN has no float32 kernel for LSTMs with proj_size; torch says so once.
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
    # nn.TransformerEncoder packs a padded batch into a nested tensor in eval; torch says so once.
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",
    # Not every kernel of attention has a batching rule; torch says so under vmap.
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
    # Forward mode scripts its decompositions when it is first used.
    "ignore:`torch.jit.script:DeprecationWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", line)
    # The tensors are tiny: threads only wait for each other, the longer the busier the machine is.
    torch.set_num_threads(1)
