"""GIFt's tutorial, second half, line by line: LoRA in attention over a sequence and over a field.

The `Q`, `K` and `V` matrices of an attention layer are Linear layers if the input is a sequence, and convolutions if it is
a field; one strategy adapts both. Run it: `python examples/gift_attention.py`.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from gift_func import AdaptedModel, adapt
from gift_func.strategies import LoRAFullFineTuningStrategy
from gift_func.utils import num_trainable_parameters

torch.manual_seed(0)

# --- 1. Attention, for sequences and for fields


class MultiHeadAttentionBase(nn.Module):
    def __init__(self, num_heads: int, linear_attention: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_rate = dropout

    # GIFt's text calls `self.dropout` below and never defines it, so its attention cannot be called. (It accepts
    # `linear_attention` as well and never uses it.) As a method it adds nothing to the printed tree.
    def dropout(self, weights: Tensor) -> Tensor:
        return nn.functional.dropout(weights, self.dropout_rate, self.training)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries, keys, values = map(self.apart_input, (queries, keys, values))
        d_k = keys.shape[-1]
        weights = torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(d_k)
        weights = nn.functional.softmax(weights, dim=-1)
        return self.concat_output(torch.bmm(self.dropout(weights), values))

    # GIFt writes each of these as reshape, permute, reshape; a pattern says the same in one line.
    def apart_input(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch elements (heads dim) -> (batch heads) elements dim", heads=self.num_heads)

    def concat_output(self, x: Tensor) -> Tensor:
        return rearrange(x, "(batch heads) elements dim -> batch elements (heads dim)", heads=self.num_heads)


class SequenceMultiHeadAttention(nn.Module):
    def __init__(
        self,
        dim_q: int,
        dim_k: int,
        dim_v: int,
        num_heads: int,
        dim_heads: int,
        dim_out: int,
        linear_attention: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        dim_hiddens = num_heads * dim_heads
        self.w_q = nn.Linear(dim_q, dim_hiddens, bias=bias)
        self.w_k = nn.Linear(dim_k, dim_hiddens, bias=bias)
        self.w_v = nn.Linear(dim_v, dim_hiddens, bias=bias)
        self.mha = MultiHeadAttentionBase(num_heads=num_heads, linear_attention=linear_attention, dropout=dropout)
        self.w_o = nn.Linear(dim_hiddens, dim_out, bias=bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.w_q(queries)
        k = self.w_k(keys)
        v = self.w_v(values)
        att = self.mha(q, k, v)
        out: Tensor = self.w_o(att)
        return out


class TwoDFieldMultiHeadAttention(nn.Module):
    def __init__(
        self,
        dim_q: int,
        dim_k: int,
        dim_v: int,
        num_heads: int,
        dim_heads: int,
        dim_out: int,
        linear_attention: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        dim_hiddens = num_heads * dim_heads
        self.w_q = nn.Conv2d(dim_q, dim_hiddens, 1, bias=bias)
        self.w_k = nn.Conv2d(dim_k, dim_hiddens, 1, bias=bias)
        self.w_v = nn.Conv2d(dim_v, dim_hiddens, 1, bias=bias)
        self.mha = MultiHeadAttentionBase(num_heads=num_heads, linear_attention=linear_attention, dropout=dropout)
        self.w_o = nn.Conv2d(dim_hiddens, dim_out, 1, bias=bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        width = queries.shape[-1]
        q = self.w_q(queries)
        k = self.w_k(keys)
        v = self.w_v(values)
        q, k, v = (rearrange(t, "b c h w -> b (h w) c") for t in (q, k, v))
        att = self.mha(q, k, v)
        # `w=width` looks as if it asked for square fields. It does not: the height follows, and the elements are the
        # queries', whatever the size of keys and values. The runs below use a 4 x 6 field and keys of 3 x 5.
        att_2d = rearrange(att, "b (h w) c -> b c h w", w=width)
        out: Tensor = self.w_o(att_2d)
        return out


def census(model: nn.Module) -> tuple[list[object], list[Tensor]]:
    """What the model is (objects, flags, gradients, hooks, tree) and a copy of every value, to compare with later."""
    facts: list[object] = [repr(model)]
    for name, module in model.named_modules():
        hooks = [id(hook) for key, found in module.__dict__.items() if "hooks" in key for hook in found or ()]
        facts += [name, id(module), type(module), module.training, sorted(module.__dict__), hooks]
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in tensors.items():
        facts += [name, id(tensor), tensor.requires_grad, id(tensor.grad)]
    return facts, [tensor.detach().clone() for tensor in tensors.values()]


def unchanged(model: nn.Module, before: tuple[list[object], list[Tensor]]) -> bool:
    facts, values = census(model)
    return facts == before[0] and all(map(torch.equal, values, before[1]))


# --- 2. One strategy for both

sequence_attention = SequenceMultiHeadAttention(10, 10, 10, 2, 5, 10)
sequence_before = census(sequence_attention)
print("sequence_attention before adapting:")
print(sequence_attention)
adapted_sequence = adapt(sequence_attention, LoRAFullFineTuningStrategy())
print("sequence_attention after adapting:")
print(adapted_sequence)
print("")

# GIFt's text prints "after enable fine_tuning" over the field attention before it adapts it; here each has its own.
field_attention = TwoDFieldMultiHeadAttention(10, 10, 10, 2, 5, 10)
field_before = census(field_attention)
print("field_attention before adapting:")
print(field_attention)
adapted_field = adapt(field_attention, LoRAFullFineTuningStrategy())
print("field_attention after adapting:")
print(adapted_field)

# Rank 3 at four places of 10 x 10, and a 1 x 1 convolution is a matrix: (10 + 10) * 3 * 4 either way.
assert num_trainable_parameters(adapted_sequence) == num_trainable_parameters(adapted_field) == 240
names = [f"w_{layer}.lora_{letter}" for layer in "qkvo" for letter in "BA"]
assert sorted(adapted_sequence.adapter) == sorted(adapted_field.adapter) == sorted(names)

# --- 3. Forward and backward


def train_a_little(model: nn.Module, adapted: AdaptedModel, queries: Tensor, keys: Tensor) -> None:
    """A fresh adapter gives the model's own answer; a few steps change it, and every tensor of it is trained."""
    assert torch.equal(adapted(queries, keys, keys), model(queries, keys, keys))
    assert adapted(queries, keys, keys).shape == queries.shape
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(adapted(queries, keys, keys), queries)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{type(model).__name__}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())
    assert torch.allclose(adapted.merge()(queries, keys, keys), adapted(queries, keys, keys), atol=1e-5)


train_a_little(sequence_attention, adapted_sequence, torch.randn(2, 7, 10), torch.randn(2, 9, 10))
train_a_little(field_attention, adapted_field, torch.randn(2, 10, 4, 6), torch.randn(2, 10, 3, 5))

# --- 4. The user's models are what they were

assert unchanged(sequence_attention, sequence_before)
assert unchanged(field_attention, field_before)
print("Both models are bit for bit what they were.")
