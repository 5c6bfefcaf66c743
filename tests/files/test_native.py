"""The native file: what is saved is what is loaded, and what does not fit is refused before anything changes."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gift_func as gf

STRATEGIES: dict[str, object] = {
    "method": gf.LoRA(rank=2, init="random", rank_pattern={"4": 3}, alpha_pattern={"0": 5.0}),
    "patterns": {"0": gf.LoRA(rank=2, init="random", conv="balanced"), "4.weight": gf.SVDiff(), "*.bias": gf.Full()},
    "selectors": gf.Strategy([(gf.select.type_(nn.Linear) & ~gf.select.parameter("bias"), gf.LoRA(rank=1, init="random"))]),
    "batch norm": {"1": gf.Full()},
    "wider adapter": gf.LoRA(rank=2, init="random", dtype=torch.float64),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, strategy: object, x: Tensor) -> gf.AdaptedModel:
    adapted = gf.adapt(model, strategy)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    adapted.train()(x).square().sum().backward()
    optimizer.step()
    return adapted.eval()


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_loaded_equals_saved(strategy: object, x: Tensor, tmp_path: Path) -> None:
    model = network()
    adapted = trained(model, strategy, x)
    path = tmp_path / "adapter.safetensors"
    gf.save_adapter(adapted, path)
    before = torch.get_rng_state()
    loaded = gf.load_adapter(model, path).eval()
    assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"
    assert torch.equal(loaded(x), adapted(x))
    assert loaded.strategy == adapted.strategy
    assert list(loaded.adapter) == list(adapted.adapter)
    assert sorted(loaded.adapter_state_dict()) == sorted(adapted.adapter_state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert any("running_mean" in name for name in load_file(path)), "statistics that changed are saved"


def test_saving_again_writes_the_same_bytes(x: Tensor, tmp_path: Path) -> None:
    model = network()
    gf.save_adapter(trained(model, STRATEGIES["method"], x), tmp_path / "a")
    gf.save_adapter(gf.load_adapter(model, tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_many_files_on_one_base_share_nothing_but_the_base(x: Tensor, tmp_path: Path) -> None:
    model, made = network(), {}
    for name in ("method", "patterns", "batch norm"):
        for turn in range(2):
            path = tmp_path / f"{name} {turn}"
            made[path] = trained(model, STRATEGIES[name], x * (turn + 1))
            gf.save_adapter(made[path], path)
    for base in (gf.FrozenBase.of(model), gf.adapt(model, gf.LoRA(rank=1)).base):
        loaded = {path: gf.load_adapter(base, path).eval() for path in made}
        for path, adapted in loaded.items():
            assert torch.equal(adapted(x), made[path](x)), path.name
            assert adapted.strategy == made[path].strategy
        first, second = list(loaded.values())[:2]
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.zero_()
        first.train()(x)
        assert torch.equal(second(x), list(made.values())[1](x)), "two adapters share a tensor or a statistic"
        with safe_open(path, "pt") as file:
            save_file({"1.weight": file.get_tensor("1.weight")}, tmp_path / "short", file.metadata())
        with pytest.raises(gf.FileError, match="lacks 1 of the adapter's"):
            gf.load_adapter(base, tmp_path / "short")


def test_a_function_as_selector_is_asked_every_time(x: Tensor, tmp_path: Path) -> None:
    base, wanted = gf.FrozenBase.of(network()), {"4"}

    def chosen(site: gf.Site) -> bool:
        return site.module_name in wanted and site.param_name == "weight"

    for name in ("4", "0"):
        gf.save_adapter(gf.adapt(base, {f"{name}.weight": gf.LoRA(rank=2)}), tmp_path / name)
        wanted.clear()
        wanted.add(name)
        loaded = gf.load_adapter(base, tmp_path / name, strategy=gf.Strategy([(chosen, gf.LoRA(rank=2))]))
        assert list(loaded.adapter) == [f"{name}.lora_B", f"{name}.lora_A"]


def test_an_adapter_on_top_is_loaded_on_top(x: Tensor, tmp_path: Path) -> None:
    first = trained(network(), STRATEGIES["method"], x)
    second = trained(first, gf.LoRA(rank=1, init="random"), x)
    gf.save_adapter(second, tmp_path / "second")
    assert torch.equal(gf.load_adapter(first, tmp_path / "second").eval()(x), second(x))
    with pytest.raises(gf.FileError, match="made for another base"):
        gf.load_adapter(network(), tmp_path / "second")


def test_a_layer_on_the_meta_device(tmp_path: Path) -> None:
    adapted = gf.adapt(nn.Linear(4, 2, device="meta"), gf.LoRA(rank=1))
    with pytest.raises(gf.AdaptError, match="meta device"):
        gf.save_adapter(adapted, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_replaced_modules_need_their_strategy_again(tmp_path: Path) -> None:
    def check(parent: nn.Module, name: str, global_name: str, class_name: str, layer: nn.Module) -> bool:
        return class_name == "ReLU"

    def action(parent: nn.Module, name: str, global_name: str, class_name: str, layer: nn.Module) -> nn.Module:
        return nn.PReLU()

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    adapted = gf.adapt(model, [(check, action)])
    with torch.no_grad():
        adapted.adapter["1.weight"].fill_(0.7)
    gf.save_adapter(adapted, tmp_path / "a")
    with pytest.raises(gf.FileError, match="strategy="):
        gf.load_adapter(model, tmp_path / "a")
    x = torch.randn(3, 4)
    assert torch.equal(gf.load_adapter(model, tmp_path / "a", strategy=[(check, action)])(x), adapted(x))


def test_a_function_as_selector_writes_nothing(tmp_path: Path) -> None:
    adapted = gf.adapt(network(), gf.Strategy([(lambda site: site.name == "4.weight", gf.LoRA(rank=1))]))
    with pytest.raises(gf.AdaptError, match="cannot be written as plain data"):
        gf.save_adapter(adapted, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def changed(path: Path, tensors: Callable[[dict[str, Tensor]], object], **header: object) -> None:
    state = load_file(path)
    tensors(state)
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["gift_func"])
    save_file(state, path, {"gift_func": json.dumps({**old, **header})})


def rules(**method: object) -> dict[str, object]:
    return {"rules": [{"select": None, "method": method}]}


def rename(state: dict[str, Tensor]) -> None:
    state["0.lora_X"] = state.pop("0.lora_A")


def drop(state: dict[str, Tensor]) -> None:
    del state["4.lora_B"]


def add(state: dict[str, Tensor]) -> None:
    state["9.lora_A"] = torch.zeros(1)


def reshape(state: dict[str, Tensor]) -> None:
    state["4.lora_A"] = torch.zeros(7, 7)


def keep(state: dict[str, Tensor]) -> None:
    pass


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "there is no file"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "header cut": (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged"),
    "data cut": (lambda path: path.write_bytes(path.read_bytes()[:-64]), "damaged"),
    "garbage": (lambda path: path.write_bytes(b"\x80\x04" * 500), "damaged"),
    "pickle": (lambda path: torch.save({"a": torch.zeros(2)}, path), "damaged"),
    "foreign": (lambda path: save_file({"a": torch.zeros(2)}, path), "not one of save_adapter"),
    "renamed tensor": (lambda path: changed(path, rename), r"lacks 1 of the adapter's .*'0.lora_A'.*nearest.*'0.lora_"),
    "tensor lost": (lambda path: changed(path, drop), "'4.lora_B' first"),
    "tensor added": (lambda path: changed(path, add), "has no '9.lora_A'; the nearest are"),
    "other shape": (lambda path: changed(path, reshape), r"'4.lora_A' has shape .* and \(7, 7\) in the state"),
    "newer version": (lambda path: changed(path, keep, version=99), "format version 99"),
    "no base": (lambda path: changed(path, keep, base=None), "unreadable header"),
    "unreadable header": (lambda path: save_file(load_file(path), path, {"gift_func": "{"}), "unreadable header"),
    "unknown method": (lambda path: changed(path, keep, strategy=rules(method="os")), "there is no method 'os'"),
    "unknown field": (
        lambda path: changed(path, keep, strategy=rules(method="LoRA", rnak=2)),
        "LoRA has no field 'rnak'; the nearest are 'rank'",
    ),
    "no rules": (lambda path: changed(path, keep, strategy=[]), "not a strategy"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_say_what_is_wrong(damage: Callable[[Path], object], said: str, x: Tensor, tmp_path: Path) -> None:
    model = network()
    path = tmp_path / "adapter.safetensors"
    gf.save_adapter(trained(model, STRATEGIES["method"], x), path)
    damage(path)
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        gf.load_adapter(model, path)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_another_base_is_refused_unless_told(x: Tensor, tmp_path: Path) -> None:
    model = network()
    gf.save_adapter(trained(model, STRATEGIES["method"], x), tmp_path / "a")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("4.weight").add_(0.1)
    with pytest.raises(gf.FileError, match=r"the values differ.*check_base=False"):
        gf.load_adapter(other, tmp_path / "a")
    gf.load_adapter(other, tmp_path / "a", check_base=False)
    other.get_buffer("1.running_mean").add_(1)
    with pytest.raises(gf.FileError, match="the values differ"):
        gf.load_adapter(other, tmp_path / "a")
    with pytest.raises(gf.FileError, match="names, shapes or element types differ"):
        gf.load_adapter(network().half(), tmp_path / "a")


def test_a_reader_never_sees_a_part(x: Tensor, tmp_path: Path) -> None:
    """Saving over a file while others read it: each read is whole."""
    model = network()
    adapted = trained(model, STRATEGIES["method"], x)
    path = tmp_path / "a"
    gf.save_adapter(adapted, path)
    done = threading.Event()

    def write() -> None:
        for _ in range(30):
            gf.save_adapter(adapted, path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or reads < 3:
        gf.load_adapter(model, path)
        reads += 1
    writer.join()


def test_a_failed_save_leaves_the_old_file(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = trained(network(), STRATEGIES["method"], x)
    path = tmp_path / "a"
    gf.save_adapter(adapted, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        gf.save_adapter(trained(network(), STRATEGIES["patterns"], x), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_no_adapted_model(tmp_path: Path) -> None:
    ens = gf.adapt_ensemble(nn.Linear(2, 2), gf.LoRA(rank=1), 2)
    wrong: list[Any] = [ens, gf.AdapterBank({"a": ens[0]})]
    for several in wrong:
        with pytest.raises(TypeError, match=r"takes an adapted model, got a \w+; of an ensemble save each ens\[i\]"):
            gf.save_adapter(several, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
