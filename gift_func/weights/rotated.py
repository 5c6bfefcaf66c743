"""`W·Rᵀ` and `Rᵀ·W`: a weight whose inputs or outputs are rotated by an orthogonal matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..kernels.choice import can_fuse
from ..kernels.rotated_linear import rotated_linear
from .value import Dense, Index, OnBase, Side, Weight, as_weight, without_padding

MIN_TOKENS_ROTATED = 512
"""Tokens from which on the fused kernel is faster (measured: slower at 256, faster at 768)."""


class Rotated(OnBase):
    """`W' = W·Rᵀ` on the input side, where rows of x are multiplied by R before W; `W' = Rᵀ·W` on the output side.

    Attributes:
        base: W, a matrix or a stack of matrices.
        side: whether R rotates inputs or outputs.
        inverse: whether Rᵀ takes R's place.
    """

    side: Side
    inverse: bool

    @abstractmethod
    def rotate(self, rows: Tensor, inverse: bool) -> Tensor:
        """`rows @ R`, or `rows @ R.mT`, for rows of shape `(..., n, d)`."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Products that rotating one row takes."""

    def dense(self) -> Tensor:
        weight = self.base.dense()
        if self.side == "input":
            return self._rotated(weight, not self.inverse)
        return self._rotated(weight.mT, self.inverse).mT

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, columns = self.shape[-2:]
        tokens = x.shape[:-1].numel()
        # Rotations of activations, one for each token, or of the weight, one for each of its rows (columns). In backward the
        # former take two more each; the latter one more, and the weight's full gradient.
        through, forming = tokens * self.cost, (rows if self.side == "input" else columns) * self.cost
        if torch.is_grad_enabled():
            through, forming = 3 * through, 2 * forming + tokens * rows * columns
        if through > forming:
            return super().linear(x, bias)
        if self.side == "input":
            return self.base.linear(self._rotated(x, self.inverse), bias)
        y = self._rotated(self.base.linear(x), self.inverse)
        return y if bias is None else y + bias

    def lookup(self, pick: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        if self.side == "output" or self.ndim != 2:
            return super().lookup(pick, padding)
        return without_padding(self._rotated(self.base.lookup(pick, padding), not self.inverse), padding)

    @property
    def mT(self) -> Weight:
        return self.replace(base=self.base.mT, side="output" if self.side == "input" else "input", inverse=not self.inverse)

    def __getitem__(self, index: Index) -> Weight:
        if self.ndim > 2:
            own = {name: item[index] for name, item in self.__dict__.items() if isinstance(item, Tensor)}
            return self.replace(base=self.base[index], **own)
        whole = self.side == "input" and isinstance(index, slice)
        return self.replace(base=self.base[index]) if whole else super().__getitem__(index)

    def _rotated(self, rows: Tensor, inverse: bool) -> Tensor:
        return self.rotate(rows.unsqueeze(0), inverse).squeeze(0) if rows.ndim == 1 else self.rotate(rows, inverse)


class Blocks(Rotated):
    """R is a product of factors, each a block-diagonal matrix between a butterfly's permutation and its inverse.

    `R = R_m ⋯ R_2·R_1`. The first factor rotates neighbours; factor i combines features `b/2·2^i` apart. A single factor is
    block-diagonal.

    Args:
        base: W.
        raw: the tensor that the blocks are computed from.
        make: computes the orthogonal blocks from `raw`: `(..., m, d/b, b, b)`, or `(..., m, 1, b, b)` if all blocks of a
            factor are the same. Leading dimensions are those of a stack of matrices. Called in each operation.
        size: b.
        side: whether R rotates inputs or outputs.
        factors: m.
        dropout: probability of replacing a block by the identity, in training.
        orthogonal: whether the blocks are exactly orthogonal; those of a truncated series are not.
    """

    def __init__(
        self,
        base: Weight | Tensor,
        raw: Tensor,
        make: Callable[[Tensor], Tensor],
        size: int,
        side: Side = "input",
        factors: int = 1,
        dropout: float = 0.0,
        orthogonal: bool = True,
    ) -> None:
        self.base = as_weight(base)
        self.raw = raw
        self.make = make
        self.size = size
        self.side = side
        self.factors = factors
        self.dropout = dropout
        self.orthogonal = orthogonal
        self.inverse = False

    @property
    def cost(self) -> int:
        return self.factors * self.size * self.shape[-1 if self.side == "input" else -2]

    def _blocks(self, inverse: bool) -> Tensor:
        """The blocks that rows are multiplied by, of all factors; in training, some of them replaced by the identity."""
        blocks = self.make(self.raw)
        if self.dropout:
            kept = F.dropout(torch.ones(blocks.shape[:-2], dtype=blocks.dtype, device=blocks.device), self.dropout) > 0
            eye = torch.eye(self.size, dtype=blocks.dtype, device=blocks.device)
            blocks = torch.where(kept[..., None, None], blocks, eye)
        return blocks.mT if inverse else blocks

    def rotate(self, rows: Tensor, inverse: bool) -> Tensor:
        blocks, size = self._blocks(inverse), self.size
        kind = torch.promote_types(rows.dtype, blocks.dtype)
        blocks, rotated = blocks.to(kind), rows.to(kind)
        for i in range(self.factors) if inverse else reversed(range(self.factors)):
            # A vector is (segment, even or odd, block, half a block); a block takes one half of each kind.
            if i:
                rotated = rearrange(rotated, "... (s e c h) -> ... (s c e h)", e=2, c=2**i, h=size // 2)
            rotated = _by_blocks(rotated, blocks[..., i, :, :, :])
            if i:
                rotated = rearrange(rotated, "... (s c e h) -> ... (s e c h)", e=2, c=2**i, h=size // 2)
        return rotated.to(rows.dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        plain = self.side == "input" and self.factors == 1 and x.shape[:-1].numel() >= MIN_TOKENS_ROTATED
        if plain and isinstance(self.base, Dense) and can_fuse(x, self.base.tensor, bias, self.raw):
            return rotated_linear(x, self.base.tensor, bias, self._blocks(self.inverse).squeeze(0), self.orthogonal)
        return super().linear(x, bias)


class HouseholderRotation(Rotated):
    """`W' = W·H` with `H = I - left @ right`, a product of reflections as two thin factors.

    Args:
        base: W, `(..., out, d)`.
        raw: the tensor that the factors are computed from, `(..., d, r)`.
        make: computes left `(..., d, r)` and right `(..., r, d)` from `raw`. Called in each operation.
    """

    def __init__(self, base: Weight | Tensor, raw: Tensor, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.base = as_weight(base)
        self.raw = raw
        self.make = make
        self.side = "input"
        self.inverse = False

    @property
    def cost(self) -> int:
        return 2 * self.raw.shape[-2] * self.raw.shape[-1]

    def rotate(self, rows: Tensor, inverse: bool) -> Tensor:
        left, right = self.make(self.raw)
        kind = torch.promote_types(rows.dtype, left.dtype)
        left, right = left.to(kind), right.to(kind)
        wide = rows.to(kind)
        change = (wide @ left) @ right if inverse else (wide @ right.mT) @ left.mT
        return (wide - change).to(rows.dtype)


def _by_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """`rows @ R` for R with these blocks on its diagonal, `(..., count, b, b)`, or one block for all, `(..., 1, b, b)`."""
    size = blocks.shape[-1]
    count = rows.shape[-1] // size
    if blocks.ndim > 3:  # a stack of matrices
        blocks = blocks.expand(*blocks.shape[:-3], count, size, size)
        return torch.matmul(rows.unflatten(-1, (count, size)).transpose(-2, -3), blocks).transpose(-2, -3).flatten(-2)
    if blocks.shape[0] < count:
        return torch.matmul(rows.unflatten(-1, (count, size)), blocks[0]).flatten(-2)
    # One product for each block whatever the dimensions of the rows, in fewer steps than einsum takes.
    by_block = rows.reshape(rows.shape[:-1].numel(), count, size).transpose(0, 1)
    return torch.bmm(by_block, blocks).transpose(0, 1).reshape(rows.shape)


def skew(upper: Tensor, size: int) -> Tensor:
    """The skew-symmetric matrices `(..., size, size)` with these elements `(..., size·(size-1)/2)` above the diagonal."""
    i, j = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], size * size)
    matrix: Tensor = flat.index_copy(-1, i * size + j, upper).unflatten(-1, (size, size))
    return matrix - matrix.mT


def cayley(skewed: Tensor) -> Tensor:
    """The orthogonal matrices `(I - Q)·(I + Q)⁻¹` of skew-symmetric Q; in float32 at least."""
    q = skewed.to(torch.promote_types(skewed.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    inverse: Tensor = torch.linalg.inv_ex(eye + q).inverse
    return 2 * inverse - eye


def neumann(skewed: Tensor, terms: int) -> Tensor:
    """`I + 2Q + 2Q² + ... + Q^(terms-1)`, about `(I + Q)·(I - Q)⁻¹` for small Q; in float32 at least."""
    q = skewed.to(torch.promote_types(skewed.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms < 3:
        return torch.add(eye, q, alpha=2 if terms == 2 else 0)
    # In pairs of powers, which halves the number of products: 2 + 2Q + Q²·(2 + 2Q + Q²·(...)).
    degree = max(terms, 4) - 1  # three terms are four in PEFT, whose checkpoints this must read
    q = q.reshape(-1, *q.shape[-2:])
    square, first = torch.bmm(q, q), torch.add(eye, q, alpha=2)
    pair = first + eye
    found: Tensor = eye + eye + q if degree % 2 else pair + square
    for left in reversed(range((degree - 1) // 2)):
        found = torch.baddbmm(pair if left else first, square, found)
    return found.reshape(skewed.shape)
