"""One base serves many threads at once: every output has the bits of the serial one, and the user's model is left alone."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import transformers
from helpers.census import bits, unchanged
from helpers.models import CNN, gpt2, llama, shake
from torch import Tensor, nn
from torch.nn import functional as F

import gift_func as gf

THREADS, CALLS = 16, 500


class OddError(Exception):
    """What a network throws at random."""


class Fragile(nn.Module):
    """A network that throws, before or after its adapted layers, if its input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == 100).any()):
            raise OddError("early")
        y = torch.tanh(self.first(x))
        # Not nn.MultiheadAttention, whose fused kernel rounds otherwise where torch runs it.
        y = y + F.scaled_dot_product_attention(self.query(y), y, self.value(y))
        if bool((x == 200).any()):
            raise OddError("late")
        out: Tensor = self.last(y)
        return out


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_all(work: Callable[[int], None], threads: int = THREADS) -> None:
    """Run a function in threads that start together; raise what the first of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def one(index: int) -> None:
        start.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=one, args=(index,)) for index in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def adapters(model: nn.Module) -> dict[str, gf.AdaptedModel]:
    """Adapters of several methods on one model."""
    methods = {"a": gf.LoRA(rank=1), "b": gf.LoRA(rank=2), "c": gf.IA3(), "d": gf.SVDiff(), "e": gf.DoRA(rank=2)}
    return {
        name: shake(
            gf.adapt(
                model, {"first": method, "query": gf.LoRA(rank=1), "last": method}, generator=torch.Generator().manual_seed(1)
            ),
            seed,
        ).eval()
        for seed, (name, method) in enumerate(methods.items())
    }


def test_calls_of_every_kind_at_once() -> None:
    torch.manual_seed(0)
    model = Fragile().eval()
    models = adapters(model)
    bank = gf.AdapterBank(models)
    ensemble = gf.stack([models["a"], models["b"]])
    names = list(models)
    other = {name: {key: t + 0.1 for key, t in m.adapter_state_dict().items()} for name, m in models.items()}
    xs = [torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    mixes: list[list[str | None]] = [["a", None, "b", "c"], ["d", "a", "a", None], ["e", "d", "c", "b"], ["b", "b", "a", "a"]]
    jobs: dict[tuple[str, int, int], Callable[[Tensor], Tensor]] = {}

    def pure(name: str, x: Tensor) -> Tensor:
        out: Tensor = gf.functional_call(models[name], other[name], (x,))
        return out

    def held(name: str, x: Tensor) -> Tensor:
        out: Tensor = bank[name](x)
        return out

    def mixed(mix: list[str | None], x: Tensor) -> Tensor:
        out: Tensor = bank(x, adapters=mix)
        return out

    def remade(mix: list[str | None], x: Tensor) -> Tensor:
        out: Tensor = bank.add("z", models["e"]).remove("z")(x, adapters=mix)
        return out

    for place, name in enumerate(names):
        jobs["model", place, 0] = models[name]
        jobs["pure", place, 0] = partial(pure, name)
        jobs["of the bank", place, 0] = partial(held, name)
    for place, mix in enumerate(mixes):
        jobs["bank", place, 0] = partial(mixed, mix)
        # Banks that are made while others run: the old one is as it was.
        jobs["another bank", place, 0] = partial(remade, mix)
    jobs["base", 0, 0] = bank.base
    jobs["bank of base", 0, 0] = lambda x: bank(x, adapters=[None] * 4)
    jobs["ensemble", 0, 0] = ensemble
    own_mixes: list[list[int | None]] = [[0, 1, 1, 0], [None, 1, 0, 0]]
    for place, members in enumerate(own_mixes):
        jobs["ensemble's mix", place, 0] = partial(ensemble.mix, members=members)
    rare = {"another bank": 20, "ensemble": 20}

    def run(key: tuple[str, int, int], place: int, grad: bool) -> bytes:
        with torch.set_grad_enabled(grad):
            return bits(jobs[key](xs[place]))

    # Kernels that keep what a backward needs may round otherwise.
    wanted = {(key, place, grad): run(key, place, grad) for key in jobs for place in range(len(xs)) for grad in (False, True)}
    counts = dict.fromkeys({key[0] for key in jobs}, 0)

    def work(index: int) -> None:
        draw = random.Random(index)
        keys = list(jobs)
        for _ in range(CALLS):
            key = draw.choice(keys)
            if draw.random() * rare.get(key[0], 1) > 1:
                continue
            place = draw.randrange(len(xs))
            if draw.random() < 0.15:
                broken = xs[place].clone()
                broken[draw.randrange(4), 0, 0] = draw.choice([100.0, 200.0])
                with pytest.raises(OddError, match=r"early|late"):
                    jobs[key](broken)
            else:
                grad = draw.random() < 0.5
                assert run(key, place, grad) == wanted[key, place, grad], key
            counts[key[0]] += 1

    with unchanged(model):
        run_all(work)
    assert min(counts.values()) > 10, counts
    for (key, place, grad), known in wanted.items():
        assert run(key, place, grad) == known, key


def test_backward_at_once() -> None:
    torch.manual_seed(0)
    model = Fragile().double().eval()
    models = adapters(model)
    bank = gf.AdapterBank(models)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    mixes: list[list[str | None]] = [["a", None, "b", "c"], ["d", "a", "a", None], ["e", "d", "c", "b"]]

    def gradients(mix: list[str | None]) -> list[bytes | None]:
        loss = bank(x, adapters=mix).square().sum()
        found = torch.autograd.grad(loss, list(bank.trainable_parameters()), allow_unused=True)
        return [None if gradient is None else bits(gradient) for gradient in found]

    wanted = [gradients(mix) for mix in mixes]

    def work(index: int) -> None:
        for step in range(20):
            place = (index + step) % len(mixes)
            assert gradients(mixes[place]) == wanted[place]

    with unchanged(model):
        run_all(work, 8)


def test_training_apart_at_once() -> None:
    """Each thread trains an adapter in a bank of its own, all on one base, as it would alone."""
    torch.manual_seed(0)
    model = Fragile().double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)

    def train(bank: gf.AdapterBank, name: str) -> None:
        optimizer = torch.optim.Adam(bank[name].trainable_parameters(), lr=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            bank(x, adapters=[name, None, None, name])[[0, 3]].square().sum().backward()
            optimizer.step()

    def state(bank: gf.AdapterBank) -> dict[str, bytes]:
        return {name: bits(parameter) for name, parameter in bank.named_trainable_parameters()}

    models = adapters(model)
    names = list(models)
    serial, parallel = ([gf.AdapterBank(models) for _ in names] for _ in range(2))
    before = [state(bank) for bank in serial]
    for bank, name in zip(serial, names, strict=True):
        train(bank, name)
    run_all(lambda index: train(parallel[index], names[index]), len(names))
    assert [state(bank) for bank in parallel] == [state(bank) for bank in serial]
    assert all(state(bank) != was for bank, was in zip(serial, before, strict=True))


def test_statistics_at_once() -> None:
    """BatchNorm in training: outputs depend on the batch alone, and the user's statistics stay."""
    torch.manual_seed(0)
    model = CNN()
    models = {
        name: shake(gf.adapt(model, {"head": gf.LoRA(rank=1)}, generator=torch.Generator().manual_seed(seed)), seed)
        for seed, name in enumerate("ab")
    }
    bank = gf.AdapterBank(models)
    x = torch.randn(4, 3, 9, 9)
    mixes: list[list[str | None]] = [["a", "b", "a", "b"], ["b", None, "b", None]]
    wanted = [bits(bank(x, adapters=mix)) for mix in mixes]
    pure = bits(gf.functional_call(models["a"], {}, (x,)))

    def work(index: int) -> None:
        for step in range(10):
            place = (index + step) % 2
            assert bits(bank(x, adapters=mixes[place])) == wanted[place]
            assert bits(gf.functional_call(models["a"], {}, (x,))) == pure

    with unchanged(model):
        run_all(work, 4)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_generation_at_once(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    models = {
        name: shake(gf.adapt(model, gf.LoRA(rank=rank), generator=torch.Generator().manual_seed(rank)), rank).eval()
        for rank, name in enumerate("ab", start=1)
    }
    bank = gf.AdapterBank(models)
    ids = torch.randint(1, 32, (3, 4))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    jobs: list[Callable[[], Tensor]] = [
        lambda: bank.generate(ids, adapters=["b", None, "a"], **options),
        lambda: bank.generate(ids, adapters=["a", "a", "b"], **options),
        lambda: bank["a"].generate(ids, **options),
        lambda: models["b"].generate(ids, **options),
    ]
    with torch.no_grad():
        jobs.append(lambda: bank(adapters=["b", None, "a"], input_ids=ids).logits)
        wanted = [bits(job()) for job in jobs]

    def work(index: int) -> None:
        for step in range(4):
            place = (index + step) % len(jobs)
            with torch.no_grad():
                assert bits(jobs[place]()) == wanted[place], place

    with unchanged(model):
        run_all(work, 6)


class Alternating(transformers.generation.streamers.BaseStreamer):
    """Lets another stream take a step after each of its tokens."""

    def __init__(self, turns: threading.Barrier) -> None:
        self.turns = turns
        self.tokens: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten().tolist())
        self.turns.wait()

    def end(self) -> None:
        """Nothing is left to do."""


def test_streams_in_step() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    models = {
        name: shake(gf.adapt(model, gf.LoRA(rank=rank), generator=torch.Generator().manual_seed(rank)), rank).eval()
        for rank, name in enumerate("ab", start=1)
    }
    bank = gf.AdapterBank(models)
    ids = torch.randint(1, 32, (3, 4))
    mixes: list[list[str | None]] = [["b", None, "a"], ["a", "b", "b"]]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = [bank.generate(ids, adapters=mix, **options) for mix in mixes]
    turns = threading.Barrier(2, timeout=30)
    streams = [Alternating(turns) for _ in mixes]

    def work(index: int) -> None:
        found = bank.generate(ids, adapters=mixes[index], streamer=streams[index], **options)
        assert torch.equal(found, wanted[index])

    run_all(work, 2)
    for stream, whole in zip(streams, wanted, strict=True):
        assert stream.tokens[1:] == [column.tolist() for column in whole[:, 4:].T]


class Steps(nn.Module):
    """A network that yields."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(5):
            x = torch.tanh(self.linear(x))
            yield x


def test_generators_in_one_thread() -> None:
    torch.manual_seed(0)
    model = Steps()
    models = {
        name: shake(gf.adapt(model, method, generator=torch.Generator().manual_seed(0)), seed)
        for seed, (name, method) in enumerate({"a": gf.LoRA(rank=1), "b": gf.IA3(), "c": gf.DoRA(rank=1)}.items())
    }
    bank = gf.AdapterBank(models)
    other = {key: t.detach() + 0.5 for key, t in models["a"].adapter.items()}
    x = torch.randn(4, 4)
    jobs: list[Callable[[], Iterator[Tensor]]] = [
        lambda: bank(x, adapters=["a", "b", None, "c"]),
        lambda: bank(x, adapters=["c", "a", "a", None]),
        lambda: bank(x, adapters=[None] * 4),
        lambda: bank["b"](x),
        lambda: models["c"](x),
        lambda: gf.functional_call(models["a"], other, (x,)),
        lambda: bank.base(x),
    ]
    wanted = [[bits(step) for step in job()] for job in jobs]

    def work(index: int) -> None:
        draw = random.Random(index)
        under_way = [(place, job(), 0) for place, job in enumerate(jobs)]
        while under_way:
            which = draw.randrange(len(under_way))
            place, stream, step = under_way.pop(which)
            found = next(stream, None)
            if found is None:
                assert step == 5
                continue
            assert bits(found) == wanted[place][step], (place, step)
            under_way.append((place, stream, step + 1))
            if draw.random() < 0.2:
                next(jobs[draw.randrange(len(jobs))]())  # one that is given up

    with unchanged(model):
        work(0)
        run_all(work, 4)


class Noting(nn.Module):
    """A network that writes a buffer and an attribute in its forward, and reads them later in the same call."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = x.mean()
        self.total += x.sum()
        out: Tensor = self.head(self.inner(x)) * self.scale + self.total
        return out


@pytest.mark.parametrize("on_top", [False, True], ids=["on the model", "on top of another adapter"])
@pytest.mark.parametrize("holder", ["model", "ensemble", "bank"])
def test_the_base_at_once(holder: str, on_top: bool) -> None:
    """`x.base(input)` of every holder: no call sees what another one writes, be it a buffer, an attribute or a fused weight."""
    torch.manual_seed(0)
    model: nn.Module = Noting().double().eval()
    if on_top:
        model = shake(gf.adapt(model, {"inner.linear1": gf.LoRA(rank=2), "head": gf.IA3()})).eval()
    adapted = shake(gf.adapt(model, gf.LoRA(rank=2))).eval()
    base = {
        "model": lambda: adapted.base,
        "ensemble": lambda: gf.stack([adapted, adapted]).eval().base,
        "bank": lambda: gf.AdapterBank({"a": adapted}).eval().base,
    }[holder]()
    inputs = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(8)]
    wanted = {}
    for grad in (False, True):  # without gradients torch's fused kernels run, on dense weights
        with torch.set_grad_enabled(grad):
            wanted[grad] = [bits(base(x)) for x in inputs]

    def work(index: int) -> None:
        for call in range(60):
            place, grad = (index + call) % len(inputs), bool(call % 2)
            with torch.set_grad_enabled(grad):
                found = (base if call % 3 else base.forward)(inputs[place])
            assert bits(found) == wanted[grad][place], (place, grad)

    run_all(work)
    assert not bool(base.total.any()), "a frozen base keeps the buffers it came with"
