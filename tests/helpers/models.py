"""Small models of many kinds, as a table: every row is adapted, compared, differentiated and counted by the tests."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import gift_func as gf
from gift_func.select import Selector

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: what the test is called.
        build: makes the module; it is called with a fixed seed and cast afterwards.
        inputs: makes positional and keyword arguments in float32, cast to the model's type afterwards.
        where: the parameters that LoRA and SVDiff take, of those with two or more dimensions.
        methods: names in METHODS that apply.
        pickles: whether pickle takes the model itself.
        vmaps: whether torch has batching rules for it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    where: Selector = field(default_factory=lambda: gf.select.name("*"))
    methods: tuple[str, ...] = ("lora", "svdiff", "full")
    pickles: bool = True
    vmaps: bool = True

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A fresh model, always with the same values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            return self.build().to(dtype)

    def call(self, dtype: torch.dtype = torch.float64) -> Inputs:
        """Fresh arguments, always with the same values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(21)
            inputs = self.inputs()
        made: Inputs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
        return made

    def strategy(self, method: str, rank: int = 2) -> gf.Strategy:
        """The strategy that takes all that the method can: parameters of two dimensions at least, or every one."""
        made = METHODS[method](rank)
        return gf.Strategy([(self.where if method == "full" else self.where & has_matrix, made)])

    def adapt(self, model: nn.Module, method: str, rank: int = 2, seed: int = 22) -> gf.AdaptedModel:
        """The model adapted by a method, far from its start."""
        return gf.adapt(model, self.strategy(method, rank), generator=torch.Generator().manual_seed(seed))


METHODS: dict[str, Callable[[int], gf.Method]] = {
    "lora": lambda rank: gf.LoRA(rank=rank, alpha=3, init="random"),
    "svdiff": lambda rank: gf.SVDiff(),
    "full": lambda rank: gf.Full(),
}


def has_matrix(site: gf.Site) -> bool:
    """Whether a parameter has two dimensions or more."""
    return site.parameter.ndim >= 2


def shake(adapted: gf.AdaptedModel, seed: int = 23, size: float = 0.1) -> gf.AdaptedModel:
    """Move every trainable tensor of the adapter by random steps: away from an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
            parameter.add_(step.to(parameter.dtype))
    return adapted


def flat(output: Any) -> Tensor:
    """Every floating-point tensor of an output, as one vector."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert leaves, f"no tensor in {type(output)}"
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def loss_of(output: Any) -> Tensor:
    """A number that depends on every element of an output differently."""
    vector = flat(output)
    return (vector * torch.sin(torch.arange(1, vector.numel() + 1, dtype=vector.dtype))).sum()


def assert_close(found: Tensor, wanted: Tensor, tolerance: float | None = None, what: str = "") -> None:
    """Equal within 1e-10 in float64 and 1e-5 in float32, of the largest element where that is above 1."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)} for {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{what}: {found.dtype} for {wanted.dtype}"
    if tolerance is None:
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[wanted.dtype]
    if wanted.numel():
        error = (found - wanted).abs().max().item()
        size = max(1.0, wanted.abs().max().item())
        assert error <= tolerance * size, f"{what}: off by {error:.2e}, sizes up to {size:.2e}"


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, d_in: int = 6, hidden: int = 8, d_out: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d_in, hidden), nn.Tanh(), nn.Linear(hidden, d_out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class CNN(nn.Module):
    """Convolutions of two dimensions in their variety, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding="same", dilation=2)
        self.pointwise = nn.Conv2d(12, 4, 1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))
        out: Tensor = self.head(self.pointwise(x).mean((-1, -2)))
        return out


class BagModel(nn.Module):
    """EmbeddingBag in all its modes and ways to be called."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.EmbeddingBag(7, 4, mode="sum", padding_idx=0)
        self.mean = nn.EmbeddingBag(7, 4, mode="mean", include_last_offset=True)
        self.most = nn.EmbeddingBag(7, 4, mode="max")

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        bags = [
            self.total(ids, offsets),
            self.total(ids.reshape(3, -1), per_sample_weights=weights.reshape(3, -1)),
            self.mean(ids, offsets),
            self.most(ids, offsets),
        ]
        return torch.cat(bags)


class Attention(nn.Module):
    """`nn.MultiheadAttention` on its own, called with keys and values of their own."""

    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **masks: Any) -> Any:
        key = query if key is None else key
        value = key if value is None else value
        out = self.attention(query, key, value, need_weights=self.need_weights, average_attn_weights=False, **masks)
        return out if self.need_weights else out[0]


class Experts(nn.Module):
    """Raw parameters of three dimensions, read by indexing, bmm, einsum and matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 2)
        self.mix = nn.Parameter(torch.randn(3, 4, 5) / 2)
        self.scale = nn.Parameter(torch.randn(()) / 2)
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([F.linear(x, self.up[i]) for i in range(3)])
        each = torch.bmm(torch.tanh(each), self.down.transpose(1, 2))
        mixed = torch.einsum("ebi,eij->ebj", each, self.mix) + each @ self.mix
        return mixed.sum(0) * self.gain * self.scale


class Tied(nn.Module):
    """A language model in little: the embedding's weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(self.embed(ids))))
        return out


class Shared(nn.Module):
    """One submodule under two names, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.all = nn.ModuleList([self.first, nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.first(x))))
        for layer in self.all:
            x = torch.sin(layer(x))
        return x


class Named(nn.Module):
    """Submodules whose names a dictionary has methods for."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("keys", "values", "items", "copy", "pop", "update"):
            self.add_module(name, nn.Linear(6, 6))
        self.get = nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = torch.tanh(child(x))
        return x


class Reader(nn.Module):
    """Reads a sibling's weight that is no part of it."""

    def __init__(self, sibling: nn.Linear) -> None:
        super().__init__()
        self.__dict__["sibling"] = sibling
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        sibling: nn.Linear = self.__dict__["sibling"]
        out: Tensor = self.linear(x) + F.linear(x, sibling.weight)
        return out


class Entangled(nn.Module):
    """Reaches its parts by a bound method, a sibling's reference, a list, a dict, a closure, a weak reference and hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.reader = Reader(self.first)
        self.run = self.inner
        self.listed = [self.second]
        self.keyed = {"third": (self.third,)}
        self.closure: Callable[[Tensor], Tensor] = lambda x: self.second(x) + self.third.weight.sum()
        self.partial = functools.partial(self.inner)
        self.weak = weakref.ref(self.third)
        self.calls: list[str] = []
        self.register_forward_hook(self.after)
        self.second.register_forward_pre_hook(self.before)

    def inner(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + self.third.weight.mean(),)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.first.weight.std()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.run(x)) + self.listed[0](x)
        x = torch.tanh(self.closure(x)) + self.keyed["third"][0](x)
        third = self.weak()
        assert third is not None
        out: Tensor = self.reader(x) + third(x) + self.partial(x)
        return out


class TwoInputs(nn.Module):
    """Bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.bilinear(x, y)
        return out


class First(nn.Module):
    """A module that returns a tuple, of which the first counts (the last state of an RNN too)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rnn = module

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)


class Seq2Seq(nn.Module):
    """`nn.Transformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        out: Tensor = self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)
        return out


def tokens(*shape: int, high: int = 32) -> Tensor:
    """Random ids without 0, which is padding."""
    return torch.randint(1, high, shape)


def padded(rows: int, columns: int) -> Tensor:
    """An attention mask: 1 where a token is, the second half of every other row being padding at the end."""
    mask = torch.ones(rows, columns, dtype=torch.long)
    mask[1::2, columns // 2 :] = 0
    return mask


def x_of(*shape: int) -> Callable[[], Inputs]:
    """One random input."""
    return lambda: ((torch.randn(*shape),), {})


def encoder(**options: Any) -> Callable[[], nn.Module]:
    """`nn.TransformerEncoder` of two layers."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)
        # Its nested-tensor path is meant only for layers that normalise last, and warns of others.
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first", False))

    return build


def masked(rows: int, columns: int, width: int) -> Callable[[], Inputs]:
    """A batch with a padding mask for torch's encoders, where True is padding."""
    return lambda: ((torch.randn(rows, columns, width),), {"src_key_padding_mask": padded(rows, columns) == 0})


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config)


def llama(tie: bool = True) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12, max_position_embeddings=32, tie_word_embeddings=tie, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTModel(config)


def mixtral(experts: str = "eager") -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def text() -> Inputs:
    """Ids and a padding mask, for transformers."""
    return (), {"input_ids": tokens(2, 6), "attention_mask": padded(2, 6)}


def causal() -> Inputs:
    """The same, for decoders that would otherwise also return their cache."""
    args, kwargs = text()
    return args, {**kwargs, "use_cache": False}


def seq2seq() -> Inputs:
    args, kwargs = causal()
    return args, {**kwargs, "decoder_input_ids": tokens(2, 4)}


def bags() -> Inputs:
    ids = torch.tensor([1, 2, 0, 3, 6, 5, 4, 2, 2])
    return (ids, torch.tensor([0, 2, 5, 9]), torch.rand(9)), {}


def different(options: dict[str, Any] | None = None) -> Inputs:
    return (torch.randn(2, 4, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 7)), options or {}


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


ROWS: list[Row] = [
    Row("mlp", MLP, x_of(3, 6)),
    Row("linear", lambda: nn.Linear(4, 3), x_of(2, 4)),
    Row("cnn", CNN, x_of(4, 3, 9, 9)),
    Row(
        "conv1d",
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv1d(6, 3, 2, groups=3)),
        x_of(2, 4, 7),
    ),
    Row(
        "conv2d_modes",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, (3, 1), padding=(1, 0), padding_mode="circular"),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        ),
        x_of(2, 2, 5, 6),
    ),
    Row(
        "conv3d",
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), nn.Conv3d(4, 4, 2, groups=4, dilation=(1, 1, 2)), nn.BatchNorm3d(4)
        ),
        x_of(2, 2, 4, 5, 5),
    ),
    Row(
        "conv_transpose1d",
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), nn.ConvTranspose1d(6, 4, 2, groups=2)),
        x_of(2, 4, 5),
    ),
    Row(
        "conv_transpose2d",
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), nn.ConvTranspose2d(6, 4, 2, groups=2, dilation=2)
        ),
        x_of(2, 4, 4, 3),
    ),
    Row("conv_unbatched", lambda: nn.Conv2d(3, 4, 3), x_of(3, 5, 5)),
    Row("bilinear", TwoInputs, lambda: ((torch.randn(3, 4), torch.randn(3, 5)), {})),
    Row(
        "embedding",
        lambda: nn.Embedding.from_pretrained(torch.randn(9, 4), freeze=False, padding_idx=2),
        lambda: ((torch.tensor([[1, 2], [0, 8], [2, 1]]),), {}),
    ),
    Row("embedding_negative_padding", lambda: nn.Embedding(9, 4, padding_idx=-1), lambda: ((torch.tensor([1, 8, 8, 3]),), {})),
    Row(
        "embedding_by_freq",
        lambda: nn.Embedding(9, 4, scale_grad_by_freq=True),
        lambda: ((torch.tensor([1, 8, 8, 3]),), {}),
        vmaps=False,
    ),
    Row(
        "embedding_max_norm",
        lambda: nn.Embedding(9, 4, max_norm=1.0),
        lambda: ((torch.tensor([[1, 2], [0, 8]]),), {}),
        vmaps=False,
    ),
    Row("embedding_bag", BagModel, bags, vmaps=False),
    Row("mha", Attention, x_of(2, 4, 8)),
    Row("mha_weights", lambda: Attention(True), lambda: ((torch.randn(2, 4, 8),), {"key_padding_mask": padded(2, 4) == 0})),
    Row("mha_causal", Attention, lambda: ((torch.randn(2, 4, 8),), {"attn_mask": causal_mask(4), "is_causal": True})),
    Row("mha_float_mask", lambda: Attention(True), lambda: ((torch.randn(2, 4, 8),), {"attn_mask": torch.randn(4, 4)})),
    Row("mha_no_bias", lambda: Attention(bias=False), x_of(2, 4, 8)),
    Row("mha_cross", Attention, lambda: ((torch.randn(2, 4, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)), {})),
    Row("mha_dims", lambda: Attention(kdim=6, vdim=7), different),
    Row("mha_dims_weights", lambda: Attention(True, kdim=6, vdim=7), lambda: different({"attn_mask": torch.randn(4, 5)})),
    Row("mha_bias_kv", lambda: Attention(add_bias_kv=True), x_of(2, 4, 8)),
    Row("mha_zero_attn", lambda: Attention(add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=7), different),
    Row("encoder", encoder(), x_of(2, 6, 8)),
    Row("encoder_padded", encoder(), masked(2, 6, 8)),
    Row("encoder_second_layer", encoder(), masked(2, 6, 8), where=gf.select.name("layers.1.*")),
    Row("encoder_first_layer", encoder(), masked(2, 6, 8), where=gf.select.name("layers.0.*")),
    Row("encoder_one_matrix", encoder(), masked(2, 6, 8), where=gf.select.name("layers.1.linear2.weight")),
    Row("encoder_norm_first", encoder(norm_first=True, activation="gelu"), masked(2, 6, 8)),
    Row("transformer", Seq2Seq, lambda: ((torch.randn(2, 5, 8), torch.randn(2, 4, 8)), {})),
    Row(
        "lstm",
        lambda: First(nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)),
        x_of(2, 4, 5),
        vmaps=False,
    ),
    Row("lstm_cell", lambda: First(nn.LSTMCell(5, 6)), x_of(2, 5), vmaps=False),
    Row("gru", lambda: First(nn.GRU(5, 6, num_layers=2, bidirectional=True)), x_of(4, 2, 5), vmaps=False),
    Row("rnn", lambda: First(nn.RNN(5, 6, bias=False)), x_of(4, 2, 5), vmaps=False),
    Row("experts", Experts, x_of(4, 4)),
    Row("tied", Tied, lambda: ((torch.tensor([[1, 2, 0], [3, 10, 4]]),), {})),
    Row("shared", Shared, x_of(2, 6)),
    Row("named", Named, x_of(2, 6)),
    Row("entangled", Entangled, x_of(3, 6), pickles=False),
    Row("bert", bert, text),
    Row("llama", llama, causal),
    Row("llama_untied", lambda: llama(tie=False), causal),
    Row("gpt2", gpt2, causal),
    Row("t5", t5, seq2seq),
    Row("vit", vit, lambda: ((torch.randn(2, 3, 8, 8),), {})),
    Row("mixtral", mixtral, causal, vmaps=False),
    Row("mixtral_batched", lambda: mixtral("batched_mm"), causal, vmaps=False),
    Row("qwen2_moe", qwen2_moe, causal, vmaps=False),
]

BY_NAME: dict[str, Row] = {row.name: row for row in ROWS}


def rows(*names: str) -> pytest.MarkDecorator:
    """Parametrize a test by rows of the table: those named, or all."""
    chosen = [BY_NAME[name] for name in names] if names else ROWS
    return pytest.mark.parametrize("row", chosen, ids=[row.name for row in chosen])


def pairs(*names: str, brief: bool = False) -> pytest.MarkDecorator:
    """Parametrize a test by a row and a method that applies to it.

    Args:
        names: of the rows; all if none is named.
        brief: leave all methods but LoRA to the slow run, except on the smallest model.
    """
    chosen = [BY_NAME[name] for name in names] if names else ROWS
    table = []
    for row in chosen:
        for method in row.methods:
            marks = [pytest.mark.slow] if brief and method != "lora" and row.name != "mlp" else []
            table.append(pytest.param(row, method, id=f"{row.name}-{method}", marks=marks))
    return pytest.mark.parametrize(("row", "method"), table)


def dense_of(model: nn.Module, method: gf.Method, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense weights that adapter tensors make of a model's parameters, written out by hand.

    Follows the tables of the methods' docstrings and the contract's names, and uses nothing of gift_func's weights.

    Args:
        model: the unadapted model.
        method: the one method that all adapted parameters have.
        tensors: the adapter's, by global name.
    """
    modules = dict(model.named_modules())
    made = {}
    for name, parameter in model.named_parameters():
        module_name, _, param_name = name.rpartition(".")
        prefix = module_name if param_name == "weight" else name
        w = parameter.detach()
        get = functools.partial(_local, tensors, prefix)
        if get("lora_A") is not None:
            assert isinstance(method, gf.LoRA)
            made[name] = w + lora_scale(method) * _product(modules[module_name], param_name, w, get("lora_B"), get("lora_A"))
        elif get("spectral_shift") is not None:
            assert isinstance(method, gf.SVDiff)
            made[name] = _shifted(w, method.conv, get("spectral_shift"))
        elif name in tensors:
            made[name] = tensors[name]
    return made


def _local(tensors: dict[str, Tensor], prefix: str, tensor: str) -> Any:
    return tensors.get(f"{prefix}.{tensor}" if prefix else tensor)


def lora_scale(method: gf.LoRA) -> float:
    """alpha / rank."""
    alpha = method.rank if method.alpha is None else method.alpha
    return alpha / method.rank**0.5 if method.rslora else alpha / method.rank


def _product(module: nn.Module, param_name: str, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
    if type(module).__name__ == "Conv1D":
        return (b @ a).T
    if isinstance(module, nn.modules.conv._ConvNd) and param_name == "weight" and a.ndim == w.ndim > 2:
        return torch.einsum("or,rc->oc", b.flatten(1), a.flatten(1)).reshape(w.shape)
    return torch.einsum("...or,...ri->...oi", b, a).reshape(w.shape)


def _shifted(w: Tensor, conv: str, shift: Tensor) -> Tensor:
    lines = 1 if conv == "rows" or w.ndim <= 3 else w.shape[2]
    matrix = w.reshape(w.shape[0] * lines, -1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    made: Tensor = (u @ torch.diag(torch.relu(s + shift)) @ vh).reshape(w.shape)
    return made


def run_dense(row: Row, params: dict[str, Tensor], inputs: Inputs, training: bool = False) -> tuple[Any, nn.Module]:
    """Run a row's model on dense parameters, in their type.

    Returns:
        Its output, and the model that ran (for the buffers it wrote).
    """
    # A fresh model and not a deepcopy, which leaves closures and weak references behind at the original.
    model = row.model(next(iter(params.values())).dtype).train(training)
    args, kwargs = inputs
    return torch.func.functional_call(model, params, args, kwargs), model
