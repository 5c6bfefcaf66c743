"""Banks on models of many kinds, on arguments that could be misread, and where adapters cannot share a pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from helpers.batches import assert_same, check, gradients, one_by_one, size_of
from helpers.census import unchanged
from helpers.models import BY_NAME, MLP, ROWS, Attention, Row, assert_close, encoder, flat, llama, loss_of, shake, tokens
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gift_func as gf

# Rows whose leading axis is no batch: channels, the words of all bags, or steps of time.
WITHOUT_BATCH = {"conv_unbatched", "embedding_bag", "gru", "rnn"}
STATES = {"lstm": {1: 1, 2: 1}}


def adapters(row: Row, model: nn.Module) -> dict[str, gf.AdaptedModel]:
    """An adapter of each method of a row, far from its start, and a LoRA of another rank."""
    models = {method: shake(row.adapt(model, method), seed) for seed, method in enumerate(row.methods)}
    models["wide"] = shake(row.adapt(model, "lora", rank=3, seed=9), 9)
    return {name: adapted.eval() for name, adapted in models.items()}


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in WITHOUT_BATCH], ids=lambda row: row.name)
def test_mixed_is_one_by_one(row: Row) -> None:
    model = row.model()
    models = adapters(row, model)
    bank = gf.AdapterBank(models)
    inputs = row.call()
    order = [*models, None]
    for start in (0, len(order) - 2):
        names = [order[(start + 2 * i) % len(order)] for i in range(size_of(inputs))]
        with unchanged(model):
            check(bank, models, names, inputs, axes=STATES.get(row.name))


@pytest.mark.parametrize("name", sorted(WITHOUT_BATCH))
def test_no_batch_is_an_error(name: str) -> None:
    row = BY_NAME[name]
    bank = gf.AdapterBank(adapters(row, row.model()))
    args, kwargs = row.call()
    names = (["lora", "wide"] * 9)[: size_of((args, kwargs))]
    with pytest.raises((gf.AdaptError, RuntimeError)):
        bank(*args, adapters=names, **kwargs)


# --- the batch found again


def lora(model: nn.Module, **options: Any) -> dict[str, gf.AdaptedModel]:
    """Two adapters of different rank, on all weights that a network has."""
    return {
        name: shake(
            gf.adapt(
                model,
                gf.Strategy([(gf.select.name("*") & (lambda site: site.parameter.ndim > 1), gf.LoRA(rank=rank, **options))]),
                generator=torch.Generator().manual_seed(rank),
            ).eval(),
            rank,
        )
        for rank, name in enumerate(["a", "b"], start=1)
    }


class TimeFirst(nn.Module):
    """Turns the batch to the second axis and back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.transpose(0, 1))
        out = out[0] if isinstance(out, tuple) else out
        made: Tensor = self.head(out.transpose(0, 1))
        return made


class Windows(nn.Module):
    """Cuts images into windows, which lie beside the batch, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        cut = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        cut = torch.tanh(self.mix(cut)) + self.mix(cut.transpose(1, 2)).transpose(1, 2)
        whole = cut.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h * w, c)
        out: Tensor = self.head(whole.mean(1))
        return out


class Ragged(nn.Module):
    """Drops padding and works on the words that are left, a different number of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        keep = ids > 0
        words = torch.tanh(self.body(self.embed(ids)[keep]))
        out = torch.zeros(*ids.shape, 4, dtype=words.dtype)
        out[keep] = words
        return out.sum(1)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: TimeFirst(nn.Linear(8, 8)), (4, 5, 8)),
        (lambda: TimeFirst(nn.Linear(8, 8)), (4, 4, 8)),
        (lambda: TimeFirst(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)), (4, 4, 8)),
        (lambda: TimeFirst(nn.GRU(8, 8)), (4, 5, 8)),
        (lambda: TimeFirst(nn.LSTM(8, 8)), (4, 4, 8)),
        (encoder(), (4, 4, 8)),
        (lambda: nn.Linear(4, 4), (4, 4)),
        (Windows, (4, 4, 6, 4)),
    ],
    ids=["time", "time=batch", "layer", "gru", "lstm", "encoder", "square", "windows"],
)  # fmt: skip
@pytest.mark.parametrize("equal", [False, True], ids=["", "equal"])
def test_turned_batches(build: Callable[[], nn.Module], shape: tuple[int, ...], equal: bool) -> None:
    torch.manual_seed(0)
    model = build().double()
    models = lora(model)
    x = torch.randn(shape, dtype=torch.float64)
    if equal:
        x = x[:1].expand(shape).contiguous()
    bank = gf.AdapterBank(models)
    for names in (["a", None, "b", "a"], ["b", "b", "a", None], [None, "a", None, "b"]):
        check(bank, models, names, ((x,), {}))


def test_samples_expanded_from_one() -> None:
    torch.manual_seed(0)
    model = MLP().double()
    models = lora(model)
    x = torch.randn(1, 6, dtype=torch.float64).expand(4, 6)
    check(gf.AdapterBank(models), models, ["a", None, "b", "a"], ((x,), {}))


def test_ragged_words() -> None:
    torch.manual_seed(0)
    models = lora(Ragged().double())
    ids = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 7], [8, 0, 9, 0]])
    check(gf.AdapterBank(models), models, ["b", None, "a", "b"], ((ids,), {}))


def test_a_network_that_branches_on_its_input() -> None:
    """What was learnt of one call is not taken for true of the next one."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x, deep = torch.tanh(self.first(x)), bool(x[0, 0] > 0)
            return self.second(torch.sin(self.second(x))) if deep else x

    torch.manual_seed(0)
    models = lora(Branching().double())
    bank = gf.AdapterBank(models)
    for shift in (5.0, -5.0, 5.0, -5.0, -5.0, 5.0):
        x = torch.randn(3, 4, dtype=torch.float64) + shift
        check(bank, models, ["b", None, "a"], ((x,), {}))


# --- arguments


def test_a_mask_as_long_as_the_batch() -> None:
    torch.manual_seed(0)
    models = lora(encoder()().double())
    bank = gf.AdapterBank(models)
    x = torch.randn(4, 4, 8, dtype=torch.float64)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    names = ["b", None, "a", "b"]
    found = bank(x, adapters=names, mask=mask)
    wanted = torch.cat([(bank.base if n is None else models[n])(x[i : i + 1], mask=mask) for i, n in enumerate(names)])
    assert_same(found, wanted)


def test_a_padding_mask_as_wide_as_the_batch() -> None:
    torch.manual_seed(0)
    models = lora(Attention().double())
    bank = gf.AdapterBank(models)
    x = torch.randn(4, 4, 8, dtype=torch.float64)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1:, 3] = padding[2, 2] = True
    check(bank, models, ["b", None, "a", "b"], ((x,), {"key_padding_mask": padding}))


def test_bert_with_as_many_tokens_as_samples() -> None:
    row = BY_NAME["bert"]
    models = adapters(row, row.model())
    ids = tokens(4, 4)
    mask = torch.ones(4, 4, dtype=torch.long)
    mask[1:, 3] = mask[2, 2] = 0
    check(gf.AdapterBank(models), models, ["full", None, "lora", "wide"], ((), {"input_ids": ids, "attention_mask": mask}))


def test_states_that_could_be_a_batch() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(5, 6, num_layers=2, batch_first=True).double()
    models = lora(model)
    bank = gf.AdapterBank(models)
    states = torch.zeros(2, 2, 6, dtype=torch.float64), torch.zeros(2, 2, 6, dtype=torch.float64)
    with pytest.raises(gf.AdaptError, match="two axes of length 2"):
        bank(torch.randn(2, 3, 5, dtype=torch.float64), states, adapters=["a", "b"])


def test_states_of_another_axis_are_no_guess() -> None:
    torch.manual_seed(0)
    bank = gf.AdapterBank(lora(nn.LSTM(5, 6, num_layers=2, batch_first=True).double()))
    states = torch.zeros(2, 3, 6, dtype=torch.float64), torch.zeros(2, 3, 6, dtype=torch.float64)
    with pytest.raises((gf.AdaptError, RuntimeError), match=r"hidden|axis|axes"):
        bank(torch.randn(3, 4, 5, dtype=torch.float64), states, adapters=["a", "b", None])


# --- outputs


def test_outputs_of_many_forms() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.linear(x)
            hidden = {"turned": y.T, "flat": torch.cat([y, y], 1).reshape(-1), "rows": y.repeat_interleave(2, 0)}
            steps = torch.stack([y, 2 * y]).reshape(-1, 4)
            states: Any = (hidden, [steps], None)
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=y, hidden_states=states), 7

    torch.manual_seed(0)
    models = lora(Many().double())
    bank = gf.AdapterBank(models)
    x = torch.randn(4, 4, dtype=torch.float64)
    names = ["b", None, "a", "b"]
    out, number = bank(x, adapters=names)
    y = one_by_one(models, bank.base, names, ((x,), {}))[0].last_hidden_state
    assert number == 7
    assert isinstance(out, transformers.modeling_outputs.BaseModelOutput)
    states: Any = out.hidden_states
    hidden, (steps,), nothing = states
    assert nothing is None
    for found, wanted in [
        (out.last_hidden_state, y),
        (hidden["turned"], y.T),
        (hidden["flat"], torch.cat([y, y], 1).reshape(-1)),
        (hidden["rows"], y.repeat_interleave(2, 0)),
        (steps, torch.stack([y, 2 * y]).reshape(-1, 4)),
    ]:
        assert_close(found, wanted)


def test_losses_of_the_batch() -> None:
    row = BY_NAME["llama"]
    models = adapters(row, row.model())
    bank = gf.AdapterBank(models)
    ids = tokens(3, 6)
    names = ["full", None, "wide"]
    out = bank(adapters=names, input_ids=ids, labels=ids, use_cache=False)
    singles = [
        (bank.base if name is None else models[name])(input_ids=ids[i : i + 1], labels=ids[i : i + 1], use_cache=False).loss
        for i, name in enumerate(names)
    ]
    assert_close(out.loss, torch.stack(singles).mean())
    out.loss.backward()
    assert all(p.grad is not None for name, p in bank.named_trainable_parameters() if not name.startswith(("lora.", "svdiff.")))


def test_caches_come_out_in_the_callers_order() -> None:
    row = BY_NAME["llama"]
    models = adapters(row, row.model())
    bank = gf.AdapterBank(models)
    ids, more = tokens(3, 5), tokens(3, 2)
    names = ["wide", None, "lora"]
    with torch.no_grad():
        first = bank(adapters=names, input_ids=ids, use_cache=True)
        # The argument is called `cache` from transformers 5.24 on.
        given = "cache" if "cache" in inspect.signature(row.model().forward).parameters else "past_key_values"
        second = bank(adapters=names, input_ids=more, **{given: first[given]}, use_cache=True)
        whole = bank(adapters=names, input_ids=torch.cat([ids, more], 1), use_cache=False)
    assert_close(second.logits, whole.logits[:, 5:])
    assert_same(whole.logits, one_by_one(models, bank.base, names, ((), {"input_ids": torch.cat([ids, more], 1)})).logits)


def test_a_forward_that_is_a_generator() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Iterator[Tensor]:
            for _ in range(4):
                x = torch.tanh(self.linear(x))
                yield x

    torch.manual_seed(0)
    models = lora(Steps().double())
    bank = gf.AdapterBank(models)
    x = torch.randn(3, 4, dtype=torch.float64)
    mixes: list[list[str | None]] = [["b", None, "a"], ["a", "a", "b"], ["a", "a", "a"], [None, None, None], ["b", None, "a"]]
    wanted = [
        [
            torch.cat(parts)
            for parts in zip(*((bank.base if n is None else models[n])(x[i : i + 1]) for i, n in enumerate(mix)), strict=True)
        ]
        for mix in mixes
    ]
    under_way = [bank(x, adapters=mix) for mix in mixes]
    moved = {name: tensor.detach() + 1 for name, tensor in models["a"].adapter.items()}
    pure, other = gf.functional_call(models["a"], moved, (x,)), models["a"].with_adapter(moved)
    for step in range(4):
        for stream, steps in zip(under_way, wanted, strict=True):
            found = next(stream)
            assert_close(found, steps[step])
            bank(x, adapters=["a", "b", None])  # another call in between
        assert_close(next(pure), list(other(x))[step])
    assert all(next(stream, None) is None for stream in under_way)


# --- where adapters cannot share a pass


def test_batch_norm_in_training() -> None:
    row = BY_NAME["cnn"]
    model = row.model()
    models = {name: shake(row.adapt(model, "lora", seed=seed), seed) for seed, name in enumerate("ab")}
    bank = gf.AdapterBank(models)
    x = torch.randn(6, 3, 9, 9, dtype=torch.float64)
    names = ["a", "b", "a", "b", "b", "a"]
    mine = {name: [i for i, n in enumerate(names) if n == name] for name in "ab"}
    with unchanged(model):
        for _ in range(3):
            out = bank(x, adapters=names)
            for name, model_of in models.items():
                assert_close(out[mine[name]], model_of(x[mine[name]]))
    # The statistics are the adapter's own, in whatever mode and bank it runs.
    evaluated = bank.eval().rename("a", "c")
    out = evaluated(x, adapters=["c" if n == "a" else n for n in names])
    for name, model_of in models.items():
        assert_close(out[mine[name]], model_of.eval()(x[mine[name]]))
    base = evaluated(x, adapters=["c", None, None, "b", None, "c"])
    assert_close(base[[1, 2, 4]], bank.eval().base(x[[1, 2, 4]]))


def test_statistics_that_nobody_wrote_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    row = BY_NAME["cnn"]
    models = {name: shake(row.adapt(row.model(), "lora", seed=1), 1) for name in "a"}
    bank = gf.AdapterBank(models)
    assert bank["a"] is not None
    calls = []
    forward = type(bank._runner.pool.module).forward

    def counted(self: nn.Module, x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return forward(self, x)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(bank._runner.pool.module), "forward", counted)
    bank.eval()(torch.randn(3, 3, 9, 9, dtype=torch.float64), adapters=["a", None, "a"])
    assert calls == [3]


class Checkpointed(nn.Module):
    """Two layers, run again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def inner(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    torch.manual_seed(0)
    models = lora(Checkpointed(reentrant).double())
    bank = gf.AdapterBank(models)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    names = ["b", None, "a", "b"]
    for _ in range(2):
        bank_out, wanted = bank(x, adapters=names), one_by_one(models, bank.base, names, ((x,), {}))
        assert_close(bank_out, wanted)
        runs: list[tuple[Tensor, Any]] = [(bank_out, bank), (wanted, models)]
        for out, held in runs:
            for p in (p for m in held.values() for p in m.parameters()):
                p.grad = None
            loss_of(out).backward()
        for name in models:
            for key, p in bank[name].named_trainable_parameters():
                theirs = models[name].adapter[key].grad
                assert p.grad is not None
                assert theirs is not None
                assert_close(p.grad, theirs, what=f"{name}.{key}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_transformers(reentrant: bool) -> None:
    model = llama(tie=False).double()
    enable: Any = model.activation_checkpointing_enable
    enable({"use_reentrant": reentrant})
    models = {name: shake(gf.adapt(model, gf.LoRA(rank=rank)).train(), rank) for rank, name in enumerate("ab", start=1)}
    bank = gf.AdapterBank(models)
    ids = tokens(3, 5)
    names = ["b", None, "a"]
    out = bank(adapters=names, input_ids=ids, use_cache=False).logits
    loss_of(out).backward()
    plain = llama(tie=False).double()
    plain.load_state_dict(model.state_dict())
    fresh = {name: gf.adapt(plain, m.strategy or {}).with_adapter(m.adapter_state_dict()) for name, m in models.items()}
    wanted = one_by_one(fresh, gf.AdapterBank(fresh).base, names, ((), {"input_ids": ids, "use_cache": False})).logits
    assert_close(out, wanted)
    loss_of(wanted).backward()
    for name, m in fresh.items():
        for key, p in m.named_trainable_parameters():
            found = bank[name].adapter[key].grad
            assert found is not None
            assert p.grad is not None
            assert_close(found, p.grad, what=f"{name}.{key}")


class Twice(torch.autograd.Function):
    """Hides where its output comes from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Hidden(nn.Module):
    """A layer behind a custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = Twice.apply(self.first(x))  # type: ignore[no-untyped-call]
        out: Tensor = self.linear(hidden)
        return out


class ByNumpy(nn.Module):
    """A layer behind numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.from_numpy(x.numpy() * 2))
        return out


class Mixing(nn.Module):
    """Mixes samples before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x - x.mean(0))
        return out


def test_custom_functions_are_seen_through() -> None:
    torch.manual_seed(0)
    models = lora(Hidden().double())
    x = torch.randn(3, 4, dtype=torch.float64)
    check(gf.AdapterBank(models), models, ["a", "b", None], ((x,), {}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (ByNumpy, "'linear.weight' differs by sample.*numpy or a scripted function"),
        (Mixing, "cannot be told apart since torch.*mean"),
    ],
)
def test_batches_out_of_sight(build: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    models = lora(build().double())
    bank = gf.AdapterBank(models)
    x = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(gf.AdaptError, match=message):
            bank(x, adapters=["a", "b", None])
    assert torch.equal(bank(x, adapters=["a", "a", "a"]), models["a"](x))


def test_outputs_of_the_whole_batch_cannot_be_put_together() -> None:
    row = BY_NAME["llama"]
    model = row.model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {
            "neck": shake(gf.adapt(model, {"*.mlp": gf.Bottleneck(3)})).eval(),
            "lora": shake(row.adapt(model, "lora")).eval(),
        }
    bank = gf.AdapterBank(models)
    ids = tokens(3, 4)
    names = ["neck", None, "lora"]
    check(bank, models, names, ((), {"input_ids": ids, "use_cache": False}))
    with pytest.raises(gf.AdaptError, match=r"shape \(\) cannot be told apart"):
        bank(adapters=names, input_ids=ids, labels=ids, use_cache=False)
    with pytest.raises(gf.AdaptError, match=r"DynamicCache.*use_cache=False"):
        bank(adapters=names, input_ids=ids, use_cache=True)


def test_parameters_as_outputs() -> None:
    class Leaky(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input), self.weight

    torch.manual_seed(0)
    bank = gf.AdapterBank(lora(Leaky(4, 4)))
    with pytest.raises(gf.AdaptError, match="returns its parameter 'weight'"):
        bank(torch.randn(2, 4), adapters=["a", "b"])


def test_nothing_is_left_on_tensors() -> None:
    models = lora(MLP().double())
    bank = gf.AdapterBank(models)
    x = torch.randn(3, 6, dtype=torch.float64)
    for names in (["a", "b", None], ["b", "a", "b"], ["a", "a", "a"]):
        out = bank(x, adapters=names)
        assert not vars(x)
        assert not vars(out)
    assert math.isfinite(flat(gradients(out, dict(bank))).sum().item())
    assert all(not vars(leaf) for leaf in tree_leaves(dict(bank.base.named_parameters())))
