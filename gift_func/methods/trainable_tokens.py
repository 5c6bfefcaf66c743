"""Trainable tokens: some rows of an embedding are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import AdaptError
from ..select import Site
from ..weights import ReplacedRows, Weight
from .weight_method import WeightMethod


@dataclass(frozen=True)
class TrainableTokens(WeightMethod):
    """`W'[t_i] = θ_i` for the chosen tokens t, the other rows of W as they are.

    For new or special tokens: only their rows are held, trained and saved. The rows are replaced and not added to, so an
    adapter does not depend on what the base holds there, be it the random rows of a resized vocabulary. A head that is tied
    to the embedding follows.

    Shapes: trainable_tokens_delta `(n, dim)`, the rows themselves, starting at W's.

    Args:
        token_indices: the rows' numbers, each once.

    Raises:
        AdaptError: if there are none, or one is negative, not whole, or named twice.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Embedding(100, 8), gf.TrainableTokens([97, 98, 99]))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'trainable_tokens_delta': (3, 8)}

    References:
        PEFT's trainable tokens, whose tensors keep their name: replacements, in spite of it.
    """

    token_indices: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        found = tuple(self.token_indices)
        if not found or len(set(found)) < len(found):
            raise AdaptError(f"token_indices needs at least one token, and each once, got {list(found)}")
        for token in found:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise AdaptError(f"token_indices holds whole numbers from 0 up, got {token!r}")
        object.__setattr__(self, "token_indices", found)

    def is_default_site(self, site: Site) -> bool:
        return isinstance(site.module, nn.Embedding) and site.param_name == "weight"

    def why_not(self, site: Site) -> str | None:
        if site.parameter.ndim != 2 or site.parameter.shape[0] <= max(self.token_indices):
            return f"a matrix of more than {max(self.token_indices)} rows, one for each token"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rows = torch.tensor(self.token_indices, device=site.parameter.device)
        return {"trainable_tokens_delta": site.parameter.detach().index_select(0, rows)}

    def precompute(self, base: Weight) -> dict[str, Tensor]:
        indices = torch.tensor(self.token_indices, device=base.device)
        positions = torch.full((base.shape[0], 1), -1, device=base.device)
        places = torch.arange(len(self.token_indices), device=base.device).unsqueeze(-1)
        return {"indices": indices, "positions": positions.index_copy(0, indices, places)}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        return ReplacedRows(base, tensors["trainable_tokens_delta"], tensors["indices"], tensors["positions"])
