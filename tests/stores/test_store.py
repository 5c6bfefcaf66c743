"""The store: what it computes is what single adapters compute, however few fit into memory and whoever else is at it."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.census import unchanged
from helpers.models import MLP, assert_close, encoder, gpt2, llama, padded, shake, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gift_func as gf
from gift_func.network.copy_tree import copy_tree
from gift_func.stores import folder
from gift_func.stores.reader import Read, Reader

SMALL = gf.LoRA(rank=2, init="random")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """A store's adapters want none; those it is compared with would, and take other kernels then."""
    with torch.no_grad():
        yield


class Stumbling(nn.Module):
    """An MLP that fails on inputs that begin with infinity, and tells somebody whenever it runs."""

    told: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        type(self).told()
        if torch.isinf(x[0, 0]):
            raise ArithmeticError("stumbled")
        out: Tensor = self.last(hidden)
        return out


def made(model: nn.Module | gf.FrozenBase, strategy: Any = SMALL, seed: int = 0) -> gf.AdaptedModel:
    return shake(gf.adapt(model, strategy, generator=torch.Generator().manual_seed(seed)), seed=seed).eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP().double().eval()


def x_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: nn.Module, where: Path, count: int) -> dict[str, gf.AdaptedModel]:
    """Adapters a0, a1, ... in a folder, all of one size."""
    base = gf.FrozenBase.of(model)
    found = {f"a{i}": made(base, seed=i) for i in range(count)}
    for name, adapted in found.items():
        gf.save_adapter(adapted, where / f"{name}.safetensors")
    return found


def copies(model: nn.Module | gf.FrozenBase, strategy: Any, where: Path, count: int) -> None:
    """As `filled`, but for many: without waiting for the disk."""
    gf.save_adapter(made(model, strategy), where / "a0.safetensors")
    with safe_open(where / "a0.safetensors", "pt") as file:
        metadata, first = file.metadata(), load_file(where / "a0.safetensors")
    generator = torch.Generator().manual_seed(0)
    for i in range(1, count):
        state = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) / 10 for name, t in first.items()}
        save_file(state, where / f"a{i}.safetensors", metadata)


def size_of(adapted: gf.AdaptedModel) -> int:
    return sum(parameter.nbytes for parameter in adapted.parameters())


# --- what it computes


STRATEGIES: dict[str, Any] = {
    "lora": SMALL,
    "another rank": gf.LoRA(rank=3, alpha=5, init="random"),
    "scaled": gf.IA3(),
    "patterns": {"layers.0": gf.LoRA(rank=1, init="random"), "*.bias": gf.Full()},
    "rotated": gf.OFT(block_size=2),
    "spectral": gf.SVDiff(),
    "a module": {"layers.0": gf.Bottleneck(dim=2)},
}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("budget", [None, 0, 600])
def test_mixed_batches_equal_single_adapters_of_any_method(tmp_path: Path, budget: int | None, mapped: bool) -> None:
    model, x = mlp(), x_of(2 * len(STRATEGIES) + 2, 6)
    alone = {name: made(model, strategy, seed=i) for i, (name, strategy) in enumerate(STRATEGIES.items())}
    store = gf.AdapterStore(model, tmp_path, budget=budget, mapped=mapped)
    for name, adapted in alone.items():
        store.add(name, adapted)
    names = [None, *alone, None, *reversed(alone)]
    with unchanged(model):
        for _ in range(2):
            found = store(x, adapters=names)
            wanted = torch.cat([(model if n is None else alone[n])(x[i : i + 1]) for i, n in enumerate(names)])
            assert_close(found, wanted)
            for one in names:
                assert torch.equal(store(x[:3], adapters=[one] * 3), (model if one is None else alone[one])(x[:3])), one
    assert len(store(x[:0], adapters=[])) == 0
    if budget is not None:
        assert store.counters.bytes <= budget


def test_statistics_of_an_adapter_come_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    adapted = made(model, {"1": gf.Full()}).train()
    adapted(x_of(20, 6))
    store = gf.AdapterStore(model, tmp_path)
    store.add("a", adapted)
    x = x_of(4, 6)
    for _ in range(2):
        assert torch.equal(store(x, adapters=["a"] * 4), adapted.eval()(x))
        assert_close(store(x, adapters=["a", None, "a", None])[::2], adapted(x[::2]))
    own, bank = store["a"].train(), store.bank(["a"]).train()
    own(x)
    bank(x, adapters=["a"] * 4)
    assert torch.equal(store(x, adapters=["a"] * 4), adapted(x)), "a copy's statistics are the store's"
    assert store.counters.bytes == size_of(adapted) + 2 * 4 * 8 + 8


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_generate(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    alone = {name: made(model, seed=i) for i, name in enumerate("ab")}
    store = gf.AdapterStore(model, tmp_path, budget=1)
    for name, adapted in alone.items():
        store.add(name, adapted)
    ids, names = tokens(4, 5), ["a", None, "b", "a"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    found = store.generate(ids, attention_mask=mask, adapters=names, **options)
    for i, one in enumerate(names):
        single: Any = model if one is None else alone[one]
        wanted = single.generate(ids[i : i + 1], attention_mask=mask[:1], **options)
        assert torch.equal(found[i : i + 1], wanted)
        assert torch.equal(store.generate(ids[i : i + 1], attention_mask=mask[:1], adapters=[one], **options), wanted)


def test_torchs_fused_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = encoder()().double().eval()
    for name, strategy in {"all": SMALL, "last": {"layers.1.linear1": SMALL}}.items():
        adapted = made(model, strategy)
        store = gf.AdapterStore(model, tmp_path)
        store.add(name, adapted)
        x, mask = x_of(3, 4, 8), padded(3, 4) == 0
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                for wanted, given in ((adapted, name), (adapted.base, None)):
                    found = store(x, src_key_padding_mask=mask, adapters=[given] * 3)
                    assert_close(found, wanted(x, src_key_padding_mask=mask))


def test_on_top_of_an_adapted_model(tmp_path: Path) -> None:
    below = made(mlp(), {"layers.2": SMALL})
    above = made(below, {"layers.0": gf.LoRA(rank=1, init="random")}, seed=3)
    store, x = gf.AdapterStore(below, tmp_path), x_of(2, 6)
    store.add("above", above)
    assert_close(store(x, adapters=["above", None]), torch.cat([above(x[:1]), below(x[1:])]))
    assert torch.equal(store(x[:1], adapters=["above"]), above(x[:1]))
    assert torch.equal(store(x, adapters=[None, None]), below(x))


def test_a_network_without_generate_says_so(tmp_path: Path) -> None:
    store = gf.AdapterStore(mlp(), tmp_path)
    with pytest.raises(AttributeError, match="generate"):
        store.generate(x_of(1, 6), adapters=[None])


# --- names and files


def test_names_are_the_files_of_the_folder(tmp_path: Path) -> None:
    model = mlp()
    store = gf.AdapterStore(model, tmp_path)
    assert (len(store), list(store), store.names()) == (0, [], ())
    for name in ("fr", "group/sub/de", "group/it.v2"):
        store.add(name, made(model))
    for hidden in (".secret.safetensors", "group/.it.safetensors.1f.new", "notes.txt", ".hidden/x.safetensors"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "group" / "round").symlink_to(tmp_path)
    assert list(store) == ["fr", "group/it.v2", "group/sub/de"]
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")).count("fr.safetensors") == 1
    assert len(store) == 3
    assert "group/sub/de" in store
    for absent in ("de", "folder", "group", ".secret", "../fr", 3, "", "x" * 5000, "\0", "fr/it"):
        assert absent not in store
    assert store.get("de") is None
    gf.save_adapter(made(model), tmp_path / "new.safetensors")
    assert "new" in store
    assert store(x_of(1, 6), adapters=["new"]).shape == (1, 5)
    assert store.path("a/b") == tmp_path / "a" / "b.safetensors"
    store(x_of(1, 6), adapters=["fr"])
    resident = 2 * size_of(store["fr"])
    assert repr(store) == f"AdapterStore of 4 adapters on MLP in {tmp_path}: 2 in memory, {resident:,} bytes"


def test_a_pattern_says_where_the_name_stands(tmp_path: Path) -> None:
    model = mlp()
    store = gf.AdapterStore(model, tmp_path, pattern="lora/*/adapter.st")
    store.add("fr", made(model))
    store.add("a/b", made(model))
    gf.save_adapter(made(model), tmp_path / "lora" / "other.st")
    assert (tmp_path / "lora" / "a" / "b" / "adapter.st").is_file()
    assert store.names() == ("a/b", "fr")
    for pattern in ("x.safetensors", "*/*.st", "../*.st", "/tmp/*", "", ".*"):
        with pytest.raises(ValueError, match="a pattern is a path in the folder with one"):
            gf.AdapterStore(model, tmp_path, pattern=pattern)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", ".", "..", "a/.b", "", "a\\b", "a\0b", 3, None])
def test_names_that_would_leave_the_folder_are_refused(name: Any, tmp_path: Path) -> None:
    model, inside = mlp(), tmp_path / "inside"
    inside.mkdir()
    store = gf.AdapterStore(model, inside)
    gf.save_adapter(made(model), tmp_path / "x.safetensors")
    acts: list[Callable[[], object]] = [
        lambda: store[name], lambda: store.add(name, made(model)), lambda: store.remove(name), lambda: store.path(name),
        lambda: store.prefetch([name]), lambda: store.bank([name]),
    ]  # fmt: skip
    if name is not None:
        acts.append(lambda: store(x_of(1, 6), adapters=[name]))
    for act in acts:
        with pytest.raises(gf.AdaptError, match="names no adapter of a store"):
            act()
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["x.safetensors"]


def test_what_cannot_be_added_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = mlp()
    store = gf.AdapterStore(model, tmp_path)
    store.add("a", made(model))
    before = (tmp_path / "a.safetensors").read_bytes()
    other = copy.deepcopy(model)
    store.add("of a copy", made(other))
    store.remove("of a copy")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    protocol = [(lambda *a: a[3] == "Tanh", lambda *a: nn.PReLU(dtype=torch.float64))]
    for adapted, name, error, said in (
        (made(model, seed=1), "a", gf.AdaptError, "has an adapter 'a' already; remove it first, or .*replace=True"),
        (made(other), "b", gf.AdaptError, "'b' was adapted from another model than the store's"),
        (gf.adapt(model, protocol), "b", gf.AdaptError, "'b' was made by actions that replaced modules"),
        (model, "b", TypeError, "'b' is a MLP"),
        (made(model, gf.Strategy([(lambda s: s.parameter.ndim == 2, SMALL)])), "b", gf.AdaptError, "plain data"),
    ):
        with pytest.raises(error, match=said):
            store.add(name, adapted)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_what_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(gf.FileError, match=r"there is no folder .*nowhere"):
        gf.AdapterStore(mlp(), tmp_path / "nowhere")
    for budget in (-1, 1.5, True):
        with pytest.raises(ValueError, match="a budget is a whole number of bytes"):
            gf.AdapterStore(mlp(), tmp_path, budget=budget)  # type: ignore[arg-type]


def test_what_is_no_call(tmp_path: Path) -> None:
    model = mlp()
    filled(model, tmp_path, 2)
    store, x = gf.AdapterStore(model, tmp_path), x_of(2, 6)
    with pytest.raises(KeyError, match=r"no adapter 'b0': there is no file .*b0.safetensors; the nearest are 'a0'"):
        store(x, adapters=["a0", "b0"])
    for adapters in ("a0", torch.tensor([0, 1])):
        with pytest.raises(TypeError, match="one name for each sample"):
            store(x, adapters=adapters)  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="adapters names 1 samples"):
        store(x, adapters=["a0"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04" * 500)


def of_another_base(path: Path) -> None:
    other = mlp()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    gf.save_adapter(made(other), path)


def with_header(path: Path, **changes: object) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["gift_func"])
    save_file(load_file(path), path, {"gift_func": json.dumps({**header, **changes})})


def rule(select: object, **method: object) -> dict[str, object]:
    return {"rules": [{"select": select, "method": method}]}


def lost(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    del state["layers.0.lora_A"]
    save_file(state, path, metadata)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut": (cut, "damaged"),
    "garbage": (garbage, "damaged"),
    "another base": (of_another_base, "the values differ"),
    "foreign": (lambda path: save_file({"a": torch.zeros(2)}, path), "not one of save_adapter"),
    "a tensor lost": (lost, "lacks 1 of the adapter's"),
    "another method": (lambda path: with_header(path, strategy=rule(None, method="os")), "there is no method 'os'"),
    "another rank": (lambda path: with_header(path, strategy=rule(None, method="LoRA", rank=5)), "has shape"),
    "no such place": (lambda path: with_header(path, strategy=rule({"glob": "nope"}, method="LoRA")), ""),
    "from actions": (lambda path: with_header(path, strategy=None), "actions replaced modules"),
}


@pytest.mark.parametrize("was_resident", [False, True])
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_fails_its_calls_alone(
    damage: Callable[[Path], object], said: str, was_resident: bool, tmp_path: Path
) -> None:
    model, x = mlp(), x_of(2, 6)
    alone = filled(model, tmp_path, 3)
    store = gf.AdapterStore(model, tmp_path)
    path = store.path("a1")
    if was_resident:
        store.prefetch(["a0", "a1"])
    whole = path.read_bytes()
    beside = tmp_path / "beside"
    beside.write_bytes(whole)
    damage(beside)
    os.replace(beside, path)
    for _ in range(2):
        for act in (lambda: store(x, adapters=["a0", "a1"]), lambda: store["a1"], lambda: store.bank(["a1"])):
            with pytest.raises(gf.FileError, match=rf"a1\.safetensors.*{said}"):
                act()
    assert "a1" not in store.resident()
    assert_close(store(x, adapters=["a0", "a2"]), torch.cat([alone["a0"](x[:1]), alone["a2"](x[1:])]))
    path.write_bytes(whole)
    assert torch.equal(store(x, adapters=["a1", "a1"]), alone["a1"](x))


def test_another_base_is_read_if_told(tmp_path: Path) -> None:
    model = mlp()
    filled(model, tmp_path, 1)
    other = copy.deepcopy(model).float()
    store = gf.AdapterStore(other, tmp_path, check_base=False)
    single = gf.load_adapter(other, tmp_path / "a0.safetensors", check_base=False)
    x = x_of(3, 6).float()
    assert torch.equal(store(x, adapters=["a0"] * 3), single(x))
    assert next(store["a0"].parameters()).dtype == torch.float32


def test_a_file_that_changes_counts_from_the_next_use_on(tmp_path: Path) -> None:
    model, x = mlp(), x_of(2, 6)
    alone = filled(model, tmp_path, 4)
    store = gf.AdapterStore(model, tmp_path)
    assert torch.equal(store(x, adapters=["a0", "a0"]), alone["a0"](x))
    at = os.stat(store.path("a0"))

    def now(name: str) -> None:
        assert torch.equal(store(x, adapters=["a0", "a0"]), alone[name](x))
        assert store.counters.bytes == size_of(alone["a0"]), "the old one is still counted"

    gf.save_adapter(alone["a1"], store.path("a0"))
    os.utime(store.path("a0"), ns=(at.st_atime_ns, at.st_mtime_ns))  # another file of the same size and time
    now("a1")
    store.add("a0", alone["a2"], replace=True)
    now("a2")
    store.path("a0").write_bytes(store.path("a3").read_bytes())  # in place
    now("a3")
    store.path("a0").unlink()
    with pytest.raises(KeyError, match="there is no file"):
        store(x, adapters=["a0", "a0"])
    assert (store.resident(), store.counters.bytes) == ((), 0)
    gf.save_adapter(alone["a1"], store.path("a0"))
    now("a1")
    store.remove("a0")
    assert (store.resident(), "a0" in store) == ((), False)
    with pytest.raises(KeyError, match="'a0'"):
        store.remove("a0")


def test_a_reading_that_was_cut_in_two_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), x_of(2, 6)
    alone = filled(model, tmp_path, 3)
    store, read, turns = gf.AdapterStore(model, tmp_path), Reader.read, iter(["a1", "bad", "a2"])

    def replaced_meanwhile(self: Reader, path: str) -> Read:
        source = next(turns, None)
        if source == "bad":
            store.path("a0").write_bytes(b"half")
        elif source is not None:
            store.add("a0", alone[source], replace=True)
        return read(self, path)

    monkeypatch.setattr(Reader, "read", replaced_meanwhile)
    assert torch.equal(store(x, adapters=["a0", "a0"]), alone["a2"](x))
    turns = iter(["a1", "a2"] * 9)
    store.evict("a0")
    with pytest.raises(gf.FileError, match=r"a0\.safetensors changed each of the 5 times it was read"):
        store(x, adapters=["a0", "a0"])


# --- memory


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    model, x = mlp(), x_of(1, 6)
    alone = filled(model, tmp_path, 6)
    size = size_of(alone["a0"])
    store = gf.AdapterStore(model, tmp_path, budget=3 * size + size // 2)
    for name in ("a0", "a1", "a2", "a0", "a3"):
        store(x, adapters=[name])
    assert store.resident() == ("a2", "a0", "a3")
    assert store.counters == type(store.counters)(hits=1, misses=4, evictions=1, resident=3, bytes=3 * size)
    assert store.evict("a0")
    assert not store.evict("a0")
    assert store.resident() == ("a2", "a3")
    store.prefetch(["a5", "a2"])
    assert store.resident() == ("a3", "a5", "a2")
    assert repr(store).endswith(f"3 in memory, {3 * size:,} of {3 * size + size // 2:,} bytes")
    store.add("big", made(model, gf.Full()))
    assert size_of(store["big"]) > size
    small = gf.AdapterStore(model, tmp_path, budget=size)
    small(x, adapters=["a1"])
    assert torch.equal(small(x, adapters=["big"]), small["big"](x)), "larger than the budget: called all the same"
    assert small.resident() == ("a1",), "and no reason to drop others"


def test_what_a_call_uses_lives_until_it_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stumbling().double().eval(), x_of(2, 6)
    alone = filled(model, tmp_path, 2)
    wanted = torch.cat([alone["a0"](x[:1]), alone["a1"](x[1:])])
    store = gf.AdapterStore(model, tmp_path, budget=10 * size_of(alone["a0"]))

    def take_away() -> None:
        for name in ("a0", "a1"):
            store.evict(name)
            store.path(name).unlink(missing_ok=True)
        gc.collect()

    Stumbling.told = take_away
    try:
        assert_close(store(x, adapters=["a0", "a1"]), wanted)
    finally:
        Stumbling.told = staticmethod(lambda: None)
    assert store.resident() == ()


def test_what_is_dropped_is_freed_at_once(tmp_path: Path) -> None:
    model, x = mlp(), x_of(3, 6)
    filled(model, tmp_path, 3)
    store = gf.AdapterStore(model, tmp_path)
    store.add("own modules", made(model, {"layers.0": gf.Bottleneck(dim=2)}))
    for names in (["a0", "a1", None], ["a2"] * 3, ["own modules"] * 3):
        store(x, adapters=names)
    gc.disable()
    try:
        entries = [weakref.ref(store._read(name).adapter) for name in store.resident()]
        assert len(entries) == 4
        for name in store.resident():
            store.evict(name)
        assert [entry() for entry in entries] == [None] * 4, "something but the store keeps an adapter"
    finally:
        gc.enable()
    assert not store._runner._models


def test_neither_loading_nor_calling_copies_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, count = mlp(), x_of(3, 6), [0]
    filled(model, tmp_path, 20)
    store = gf.AdapterStore(model, tmp_path, budget=0)
    store(x, adapters=["a0", "a1", None])  # looks up the strategy

    def counted(*given: Any) -> Any:
        count[0] += 1
        return copy_tree(*given)

    monkeypatch.setattr("gift_func.network.module_tree.copy_tree", counted)
    for i in range(18):
        store(x, adapters=[f"a{i}", None, f"a{i + 1}"])
        store(x, adapters=[f"a{i}"] * 3)
        store(x, adapters=[None] * 3)
    one = store["a0"]
    assert count == [0]
    one(x)
    assert count == [1]


@torch.enable_grad()
def test_copies_train_and_the_store_does_not_feel_it(tmp_path: Path) -> None:
    model, x = mlp(), x_of(2, 6)
    alone = filled(model, tmp_path, 2)
    store = gf.AdapterStore(model, tmp_path)
    bytes_before = store.path("a0").read_bytes()
    assert not store(x, adapters=["a0", "a1"]).requires_grad
    one, bank = store["a0"], store.bank(["a0", "a1", "a0"])
    assert list(bank) == ["a0", "a1"]
    assert not one.training
    assert not bank.training
    before = one(x)
    assert_close(before, alone["a0"](x))
    assert_close(bank(x, adapters=["a0", "a1"]), store(x, adapters=["a0", "a1"]))
    optimizer = torch.optim.SGD([*one.trainable_parameters(), *bank.trainable_parameters()], lr=0.1)
    (one(x).square().sum() + bank(x, adapters=["a0", "a1"]).square().sum()).backward()
    optimizer.step()
    assert not torch.equal(one(x), before)
    assert not torch.equal(bank["a0"](x), before)
    assert_close(store(x, adapters=["a0", "a0"]), before)
    assert store.path("a0").read_bytes() == bytes_before
    for name, parameter in bank.named_trainable_parameters():
        assert name.startswith(("a0.", "a1."))
        assert parameter.grad is not None
    store.add("a0", one, replace=True)
    assert_close(store(x, adapters=["a0", "a0"]), one(x))


def test_frozen_tensors_of_a_method_stay_frozen_in_copies(tmp_path: Path) -> None:
    model = mlp()
    adapted = made(model, gf.LoRA(rank=2, init="pissa"))
    store = gf.AdapterStore(model, tmp_path)
    store.add("a", adapted)
    wanted = {name: parameter.requires_grad for name, parameter in adapted.adapter.items()}
    assert False in wanted.values()
    assert {name: p.requires_grad for name, p in store["a"].adapter.items()} == wanted
    assert {name: p.requires_grad for name, p in store.bank(["a"])["a"].adapter.items()} == wanted


def test_a_write_to_a_mapped_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    model = mlp()
    filled(model, tmp_path, 1)
    store = gf.AdapterStore(model, tmp_path)
    before = store.path("a0").read_bytes()
    with torch.no_grad():
        for tensor in store._read("a0").adapter.tensors.values():
            tensor.zero_()
    assert store.path("a0").read_bytes() == before


def mappings(path: Path) -> int:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system has no /proc to ask what is mapped")
    return maps.read_text().count(str(path))


def test_tensors_are_mapped_unless_told_and_unmapped_when_dropped(tmp_path: Path) -> None:
    model = mlp()
    filled(model, tmp_path, 1)
    store, copied = gf.AdapterStore(model, tmp_path), gf.AdapterStore(model, tmp_path, mapped=False)
    copied.prefetch(["a0"])
    assert mappings(store.path("a0")) == 0
    store.prefetch(["a0"])
    assert mappings(store.path("a0")) > 0
    store.evict("a0")
    assert mappings(store.path("a0")) == 0


# --- threads


def test_threads_that_want_the_same_file_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), x_of(1, 6)
    alone = filled(model, tmp_path, 2)
    garbage(tmp_path / "bad.safetensors")
    store, read, reads = gf.AdapterStore(model, tmp_path, budget=0), Reader.read, []
    gate, go = threading.Barrier(9), threading.Event()

    def slow(self: Reader, path: str) -> Read:
        reads.append(Path(path).stem)
        go.wait(10)
        return read(self, path)

    monkeypatch.setattr(Reader, "read", slow)

    def call(name: str) -> Any:
        gate.wait(10)
        try:
            return store(x, adapters=[name])
        except gf.FileError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        for name in ("a0", "bad"):
            go.clear()
            calls = [pool.submit(call, name) for _ in range(8)]
            gate.wait(10)
            time.sleep(0.2)
            assert reads.count(name) == 1
            go.set()
            found = [call.result(10) for call in calls]
            if name == "a0":
                assert all(torch.equal(out, alone[name](x)) for out in found)
                assert reads.count(name) == 1
            else:
                assert len({id(error) for error in found}) == 8, "an error that several threads raise is nobody's"
                assert all(isinstance(error, gf.FileError) for error in found)
    assert not store._cache._loading


def test_a_file_that_is_slow_to_read_holds_up_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), x_of(1, 6)
    filled(model, tmp_path, 3)
    store, read = gf.AdapterStore(model, tmp_path), Reader.read
    begun, go = threading.Event(), threading.Event()
    store.prefetch(["a1"])

    def slow(self: Reader, path: str) -> Read:
        if path.endswith("a0.safetensors"):
            begun.set()
            go.wait(10)
        return read(self, path)

    monkeypatch.setattr(Reader, "read", slow)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(store, x, adapters=["a0"])
        assert begun.wait(10)
        for name in ("a1", "a2"):
            store(x, adapters=[name])
        assert not store.evict("a0")  # while it is read: it is not kept then
        assert not call.done()
        go.set()
        call.result(10)
    assert store.resident() == ("a1", "a2")


@pytest.mark.parametrize("turns", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_sixteen_threads_on_a_tenth_of_the_adapters(turns: int, tmp_path: Path) -> None:
    """Every output is bit for bit the serial one, whatever is added, removed, evicted, missing, damaged or raised meanwhile."""
    torch.manual_seed(0)
    model = Stumbling().double().eval()
    alone = filled(model, tmp_path, 50)
    size = size_of(alone["a0"])
    garbage(tmp_path / "bad.safetensors")
    names = [*alone, None]
    draw = random.Random(0)
    work = []
    for seed in range(120):
        batch = draw.choice([1, 3, 6])
        work.append((x_of(batch, 6, seed=seed), [draw.choice(names) for _ in range(batch)]))
    serial = gf.AdapterStore(model, tmp_path)
    wanted = [serial(x, adapters=adapters) for x, adapters in work]
    for (x, adapters), out in zip(work, wanted, strict=True):
        for i, name in enumerate(adapters):
            assert_close(out[i : i + 1], (model if name is None else alone[name])(x[i : i + 1]))
    infinite = torch.full((2, 6), torch.inf, dtype=torch.float64)
    store, most, done = gf.AdapterStore(model, tmp_path, budget=5 * size), [0], threading.Event()

    def call(thread: int) -> None:
        own = random.Random(thread)
        for _ in range(turns):
            job = own.randrange(len(work))
            chance = own.random()
            if chance < 0.05:
                with pytest.raises(ArithmeticError, match="stumbled"):
                    store(infinite, adapters=[own.choice(names), own.choice(names)])
            elif chance < 0.1:
                with pytest.raises(gf.FileError, match=r"bad\.safetensors"):
                    store(infinite, adapters=["bad", own.choice(names)])
            elif chance < 0.15:
                with pytest.raises(KeyError, match="'none'"):
                    store(infinite, adapters=[own.choice(names), "none"])
            elif chance < 0.2:
                store.evict(own.choice([*alone]))
            elif chance < 0.25:
                name = f"new {thread}"
                store.add(name, alone[f"a{thread}"])
                assert_close(store(work[0][0], adapters=[name] * len(work[0][0])), alone[f"a{thread}"](work[0][0]))
                store.remove(name)
            elif chance < 0.3:
                store.add(f"a{thread}", alone[f"a{thread}"], replace=True)
            x, adapters = work[job]
            assert torch.equal(store(x, adapters=adapters), wanted[job])

    def look() -> None:
        while not done.wait(0.001):
            counted = store.counters
            most[0] = max(most[0], counted.bytes)
            assert counted.bytes == counted.resident * size

    with unchanged(model), ThreadPoolExecutor(17) as pool:
        looking = pool.submit(look)
        try:
            for future in [pool.submit(call, thread) for thread in range(16)]:
                future.result(300)
        finally:
            done.set()
        looking.result(10)
    assert 0 < most[0] <= 5 * size
    assert store.names() == tuple(sorted([*alone, "bad"]))
    assert not list(tmp_path.glob(".*")), "a file was left half written"
    counted = store.counters
    assert counted.evictions > 100
    assert counted.hits > 0


# --- many


def median_of(act: Callable[[], object], times: int = 30) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def cycle(store: gf.AdapterStore, x: Tensor, count: int) -> Callable[[], object]:
    """Calls with four adapters each, in an order that meets every one of a number of adapters."""

    def names() -> Iterator[list[str]]:
        i = 0
        while True:
            yield [f"a{(i + k * 37) % count}" for k in range(len(x))]
            i += 1

    turns = names()
    return lambda: store(x, adapters=next(turns))


def test_a_thousand_files_cost_a_call_no_more_than_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), x_of(4, 6)
    stores = {}
    for count in (10, 1000):
        (tmp_path / str(count)).mkdir()
        copies(model, SMALL, tmp_path / str(count), count)
        size = size_of(made(model))
        stores[count] = gf.AdapterStore(model, tmp_path / str(count), budget=5 * size)
    calls = {count: cycle(store, x, count) for count, store in stores.items()}
    asked = {"stamp": 0, "list": 0}
    plain = {"stamp": folder.stamp, "list": folder._files}

    def counted(what: str, path: str) -> Any:
        asked[what] += 1
        return plain[what](path)

    monkeypatch.setattr("gift_func.stores.store.stamp", partial(counted, "stamp"))
    monkeypatch.setattr(folder, "_files", partial(counted, "list"))
    assert len(stores[1000]) == 1000
    assert asked["list"] == 1
    found = {}
    for count, call in calls.items():
        asked.update(stamp=0, list=0)
        for _ in range(count // 4):
            call()
        uses = stores[count].counters.misses + stores[count].counters.hits
        found[count] = asked["list"], asked["stamp"] <= 3 * uses
        assert stores[count].counters.bytes <= 5 * size
    assert found == {10: (0, True), 1000: (0, True)}, "a call looks at more than its own files"
    assert stores[1000].counters.evictions > 900
    times = {count: median_of(call) for count, call in calls.items()}
    assert times[1000] < 4 * times[10], times


@pytest.mark.slow
def test_a_thousand_adapters_of_a_real_model_and_a_hundred_in_memory(tmp_path: Path) -> None:
    """MiniLM's shapes, LoRA of rank 4 on every linear layer: 0.7 MB each."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.BertModel(config)
    base = gf.FrozenBase.of(model.eval())
    copies(base, {"encoder.*": gf.LoRA(rank=4, init="random")}, tmp_path, 1000)
    size = size_of(gf.load_adapter(base, tmp_path / "a0.safetensors"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**30
    store = gf.AdapterStore(base, tmp_path, budget=100 * size)
    few = gf.AdapterStore(base, tmp_path, budget=100 * size)
    ids = tokens(4, 8, high=1000)

    def resident_memory() -> int:
        pages = Path("/proc/self/statm")
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if pages.exists() else 0

    start = time.perf_counter()
    assert len(store) == 1000
    assert time.perf_counter() - start < 1, "listing"
    with torch.no_grad():
        calls = {10: cycle(few, ids, 10), 1000: cycle(store, ids, 1000)}
        for call in calls.values():
            call()
        before, highest = resident_memory(), 0
        for i in range(0, 1000, 4):
            store(ids, adapters=[f"a{i + k}" for k in range(4)])
            highest = max(highest, resident_memory() - before)
            assert store.counters.bytes <= 100 * size
        assert store.counters.resident == 100
        assert store.counters.evictions >= 900
        assert highest < 2 * 100 * size, f"memory grew by {highest:,} bytes for a budget of {100 * size:,}"
        times = {count: median_of(call, 20) for count, call in calls.items()}
        assert times[1000] < 2 * times[10], times
        for name in ("a3", "a996"):
            single = gf.load_adapter(base, store.path(name))
            found = store(ids, adapters=[name] * 4).last_hidden_state
            assert torch.equal(found, single(ids).last_hidden_state)
        hot, cold = iter(range(1000)), iter(range(1000))
        reading = median_of(lambda: {n: t.clone() for n, t in load_file(tmp_path / f"a{next(hot)}.safetensors").items()}, 100)
        loading = median_of(lambda: store.prefetch([f"a{next(cold)}"]), 100)
        assert loading < 4 * reading, (loading, reading)


@pytest.mark.parametrize("name", ["train", "eval", "to", "parameters", "adapter_state_dict", "summary"])
def test_the_verbs_of_a_module_say_what_to_use(name: str, tmp_path: Path) -> None:
    store = gf.AdapterStore(nn.Linear(2, 2), tmp_path)
    with pytest.raises(AttributeError, match=rf"a store has no {name}\(\).*store.bank\(names\) is a module"):
        getattr(store, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such'"):
        store.no_such  # noqa: B018
