"""What a model needs only to run is made when it is first used, and nobody can tell when that was."""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.census import bits, unchanged
from helpers.models import CNN, assert_close, gpt2, shake
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gift_func as gf
from gift_func import safetensors_io
from gift_func._torch import is_transformed
from gift_func.network.copy_tree import copy_tree

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def model() -> CNN:
    torch.manual_seed(0)
    return CNN().eval()


def adapted_of(base: Any, strategy: Any = None) -> gf.AdaptedModel:
    made = gf.adapt(base, strategy or gf.LoRA(rank=2, init="random"), generator=torch.Generator().manual_seed(0))
    assert not made.copy_pool.is_made, "nothing has used it"
    return made


def used(adapted: gf.AdaptedModel) -> gf.AdaptedModel:
    """The same, its copy of the network made."""
    adapted.copy_pool.ready()
    return adapted


def all_bits(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors}


def norm_of(found: Any) -> nn.BatchNorm2d:
    assert isinstance(found.norm, nn.BatchNorm2d)
    return found.norm


# What happens to the user's model meanwhile.

CHANGES: dict[str, Callable[[CNN], object]] = {
    "another child": lambda m: setattr(m, "head", nn.Linear(4, 3)),
    "no child": lambda m: delattr(m, "head"),
    "another parameter": lambda m: setattr(m.head, "bias", nn.Parameter(m.head.bias.detach() + 1)),
    "training": lambda m: m.train(),
    "a hook": lambda m: m.head.register_forward_hook(lambda *_: None),
    "a hook that counts": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "another forward": lambda m: setattr(m, "forward", lambda x: x),
    "statistics": lambda m: norm_of(m).running_mean.add_(1),  # type: ignore[union-attr]
    "an attribute": lambda m: setattr(norm_of(m), "eps", 1.0),
    "a type": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [None, True, False])
def test_what_becomes_of_the_users_model_makes_no_difference(change: Callable[[CNN], object], mode: bool | None) -> None:
    theirs = model()
    early, late = used(adapted_of(theirs)), adapted_of(theirs)
    if mode is not None:
        early.train(mode), late.train(mode)
    change(theirs)
    assert not late.copy_pool.is_made
    assert bits(late(X)) == bits(early(X))
    assert [(n, type(m), m.training) for n, m in late.copy_pool.module.named_modules()] == [
        (n, type(m), m.training) for n, m in early.copy_pool.module.named_modules()
    ]
    assert all_bits(late.named_buffers()) == all_bits(early.named_buffers())


@pytest.mark.parametrize("strategy", [gf.LoRA(rank=2, init="random"), gf.DoRA(rank=2, init="random")], ids=str)
def test_a_write_to_the_users_weights_is_told_of_and_followed(strategy: gf.LoRA | gf.DoRA) -> None:
    theirs = model()
    early, late = used(adapted_of(theirs, strategy)), adapted_of(theirs, strategy)
    before = early(X)
    with torch.no_grad():
        theirs.head.weight.mul_(2)
    with pytest.warns(gf.BaseChangedWarning, match=r"head\.weight"):
        after = late(X)
    with pytest.warns(gf.BaseChangedWarning, match=r"head\.weight"):
        assert bits(after) == bits(early(X))
    assert not torch.allclose(before, after)


def test_a_write_that_leaves_no_trace_does_not_reach_what_was_derived() -> None:
    theirs = model()
    early, late = (adapted_of(theirs, gf.DoRA(rank=2, init="random")) for _ in range(2))
    used(early)
    theirs.head.weight.data.mul_(2)
    assert bits(late(X)) == bits(early(X))


# What is done to the adapted model before its first use.


class Stubborn(nn.Module):
    """A network whose normalisation stays in eval mode, and which remembers its modes."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> Stubborn:
        super().train(mode)
        self.norm.eval()
        self.modes.append(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.linear(x))
        return found


MOVES: dict[str, Callable[[gf.AdaptedModel], object]] = {
    "train": lambda a: a.train(),
    "eval": lambda a: a.eval(),
    "eval, train": lambda a: a.eval().train(),
    "train, eval, eval": lambda a: a.train().eval().eval(),
    "double": lambda a: a.double(),
    "train, to": lambda a: a.train().to(torch.float64),
    "half and back": lambda a: a.half().float(),
    "requires_grad_": lambda a: a.requires_grad_(False),
    "a state": lambda a: a.load_adapter_state_dict({n: t + 1 for n, t in a.adapter_state_dict().items()}),
    "another tensor": lambda a: a.adapter.update({n: p.detach() + 1 for n, p in a.adapter.items()}),
    "deepcopy": copy.deepcopy,
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
    "with_adapter": lambda a: a.with_adapter({n: t + 1 for n, t in a.adapter_state_dict().items()}),
    "eval, with_adapter": lambda a: a.eval().with_adapter(a.adapter_state_dict()),
    "train, deepcopy": lambda a: copy.deepcopy(a.train()),
    "merge": lambda a: a.merge(),
    "adapt on top": lambda a: gf.adapt(a.train(), gf.LoRA(rank=1), generator=torch.Generator().manual_seed(1)),
    "base": lambda a: a.train().base,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("build", [model, Stubborn])
def test_before_the_first_use_is_as_after_it(move: Callable[[gf.AdaptedModel], Any], build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    theirs = build()
    x = X if isinstance(theirs, CNN) else X.flatten()[:20].view(5, 4)
    with unchanged(theirs):
        early, late = used(adapted_of(theirs)), adapted_of(theirs)
        found: list[tuple[object, ...]] = []
        for adapted in (early, late):
            moved = move(adapted)
            made = moved if callable(moved) else adapted
            inner = made.copy_pool.module if isinstance(made, gf.AdaptedModel) else getattr(made, "_copy", made)
            inner = getattr(inner, "module", inner)
            wide = x.double() if any(p.dtype == torch.float64 for p in adapted.parameters()) else x
            out = bits(made(wide))
            modes = [m.training for m in inner.modules()], getattr(inner, "modes", None), getattr(made, "training", None)
            held = all_bits(made.named_buffers()), [p.requires_grad for p in made.parameters()]
            found.append((out, modes, held))
        assert found[0] == found[1]


def test_what_needs_no_network_makes_none() -> None:
    theirs = gpt2()
    adapted = adapted_of(theirs)
    repr(adapted), repr(adapted.adapter), adapted.summary(), adapted.adapter_state_dict(), list(adapted.named_buffers())
    others = [
        copy.deepcopy(adapted),
        adapted.eval().with_adapter(adapted.adapter_state_dict()),
        copy.deepcopy(adapted).double(),
    ]
    ens = gf.stack([adapted, others[1]])
    members = [ens[0], *ens.eval().unstack(), *ens[:1].unstack()]
    bank = gf.AdapterBank({"a": adapted})
    members.append(bank["a"])
    assert not any(made.copy_pool.is_made for made in (adapted, *others, *members))
    ids = torch.tensor([[1, 2, 3]])
    wanted = bits(used(adapted)(ids).logits)
    assert [bits(member(ids).logits) for member in members] == [wanted] * len(members)
    config: Any = theirs.config
    assert adapted.config is not config
    assert adapted.config.n_embd == config.n_embd


def test_an_attribute_is_reached_with_the_adapter_bound() -> None:
    theirs = model()
    adapted = shake(adapted_of(theirs))
    assert not adapted.copy_pool.is_made
    features = torch.randn(2, adapted.head.in_features)
    assert adapted.copy_pool.is_made
    dense = dict(adapted.merge().named_parameters())["head.weight"]
    assert_close(adapted.head(features), nn.functional.linear(features, dense, theirs.head.bias))
    with pytest.raises(AttributeError, match="neither AdaptedModel nor the adapted CNN has 'get_such'"):
        adapted_of(theirs).get_such()


def test_buffers_are_one_in_the_tree_and_in_the_network() -> None:
    theirs = model()
    adapted = adapted_of(theirs).train()
    before = dict(adapted.named_buffers())
    adapted(X)
    held = dict(adapted.copy_pool.module.named_buffers())
    assert all(held[name.removeprefix("adapter.")] is tensor for name, tensor in before.items())
    assert norm_of(adapted).num_batches_tracked == 1
    assert norm_of(theirs).num_batches_tracked == 0
    moved = dict(adapted.double().named_buffers())
    held = dict(adapted.copy_pool.module.named_buffers())
    assert all(held[name.removeprefix("adapter.")] is tensor for name, tensor in moved.items())
    assert moved["adapter.norm.running_mean"].dtype == torch.float64
    changed = {name for name in adapted.adapter_state_dict() if name not in adapted.adapter}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


# Where the first use may be.


def one(adapted: gf.AdaptedModel, x: Tensor) -> Tensor:
    found: Tensor = adapted(x[None]).sum()
    return found


def under_vmap_of_grad(adapted: gf.AdaptedModel) -> None:
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(adapted, params, (x[None],)).sum()  # type: ignore[no-any-return]

    torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(adapted.named_parameters()), X)


def under_fakes(adapted: gf.AdaptedModel) -> None:
    with FakeTensorMode():
        assert isinstance(adapted.head, nn.Linear)


class Scaled(CNN):
    """A network with a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((3,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def compiled(adapted: gf.AdaptedModel) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x: adapted(x) + 1, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [run(X) for _ in range(3)]
    assert_close(found[-1], adapted(X) + 1)
    torch._dynamo.reset()


def with_grad_mode(mode: Any) -> Callable[[gf.AdaptedModel], None]:
    def first(adapted: gf.AdaptedModel) -> None:
        with mode:
            adapted(X)

    return first


PLACES: dict[str, Callable[[gf.AdaptedModel], object]] = {
    "vmap of grad": under_vmap_of_grad,
    "grad": lambda a: torch.func.grad(lambda x: one(a, x))(X[0]),
    "jvp": lambda a: torch.func.jvp(lambda x: one(a, x), (X[0],), (X[0],)),
    "no_grad": with_grad_mode(torch.no_grad()),
    "inference mode": with_grad_mode(torch.inference_mode()),
    "autocast": with_grad_mode(torch.autocast("cpu", torch.bfloat16)),
    "a default device": with_grad_mode(torch.device("cpu")),
    "fake tensors": under_fakes,
    "a compiled function": compiled,
}


@pytest.mark.parametrize("method", [gf.LoRA(rank=2, init="random"), gf.OFT(block_size=2)], ids=str)
@pytest.mark.parametrize("first", PLACES.values(), ids=PLACES)
def test_nothing_of_where_the_first_use_was_stays(first: Callable[[gf.AdaptedModel], object], method: gf.LoRA | gf.OFT) -> None:
    torch.manual_seed(0)
    theirs = Scaled().eval()
    plain, adapted = used(adapted_of(theirs, {"head": method})), adapted_of(theirs, {"head": method})
    first(adapted)
    for tensor in (adapted.scale, *adapted.copy_pool._bound.values()):
        assert not torch.is_inference(tensor)
        assert not is_transformed(tensor)
    for found in (plain, adapted):
        found(X).square().sum().backward()
    assert bits(adapted(X)) == bits(plain(X))
    for name, parameter in adapted.named_parameters():
        wanted = plain.get_parameter(name).grad
        assert parameter.grad is not None
        assert wanted is not None
        assert_close(parameter.grad, wanted)


Use = Callable[[gf.AdaptedModel], object]
USES: list[Use] = [
    lambda a: bits(a(X)),
    lambda a: bits(a(X)),
    lambda a: bits(copy.deepcopy(a)(X)),
    lambda a: bits(a.with_adapter(a.adapter_state_dict())(X)),
    lambda a: bits(gf.functional_call(a, {}, (X,))),
    lambda a: id(a.head),
    lambda a: id(a.copy_pool.tree),
    repr,
]


def at_once(adapted: gf.AdaptedModel, uses: Sequence[Use]) -> list[object]:
    """What uses of a model in threads that start together give."""
    found: list[object] = [None] * len(uses)
    together = threading.Barrier(len(uses), timeout=30)

    def work(place: int) -> None:
        together.wait()
        found[place] = uses[place](adapted)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(uses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_that_race_to_the_first_use_get_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, count = model(), [0]
    wanted = bits(adapted_of(theirs)(X))

    def counted(*given: Any) -> Any:
        count[0] += 1
        time.sleep(0.02)  # so that the others come meanwhile
        return copy_tree(*given)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for turn in range(20):
            adapted = adapted_of(theirs)
            found = at_once(adapted, USES)
            assert found[:5] == [wanted] * 5, turn
            assert found[5:7] == [id(adapted.head), id(adapted.copy_pool.tree)]
        adapted = adapted_of(theirs)
        monkeypatch.setattr("gift_func.network.module_tree.copy_tree", counted)
        at_once(adapted, [lambda a: a.copy_pool.ready()] * 8)
        assert count == [1]
    finally:
        sys.setswitchinterval(interval)


# What must not wait for the first use.


class Refusing(gf.IA3):
    """A method that cannot make its weight."""

    def weight(self, base: Any, tensors: Any) -> Any:
        raise gf.AdaptError("no such weight")


class Uncopiable:
    """What a private copy stops at."""

    def __deepcopy__(self, memo: object) -> Uncopiable:
        raise RuntimeError("not me")


def test_errors_come_at_once() -> None:
    theirs = model()
    with unchanged(theirs), pytest.raises(gf.AdaptError, match="no such weight"):
        gf.adapt(theirs, {"head": Refusing()})
    theirs.extra = Uncopiable()  # type: ignore[assignment]
    with pytest.raises(gf.AdaptError, match=r"'extra' of the model .* cannot be copied \(not me\)"):
        gf.adapt(theirs, gf.LoRA())


def test_a_dropped_adapter_is_gone_at_once(tmp_path: Path) -> None:
    theirs = gpt2()
    gf.save_adapter(adapted_of(theirs), tmp_path / "a")
    gc.collect()
    gc.disable()
    try:
        for use in (False, True):
            adapted = gf.load_adapter(theirs, tmp_path / "a")
            if use:
                adapted(torch.tensor([[1, 2]]))
            body, base = adapted._runner, adapted.frozen_base
            parts = [
                adapted,
                adapted.adapter,
                body,
                body.pool,
                body.pool.base,
                body.pool.base.tree.module,
                next(adapted.parameters()),
            ]
            left = [weakref.ref(part) for part in parts]
            del adapted, base, body, parts
            assert [ref() for ref in left] == [None] * len(left), use
    finally:
        gc.enable()


# Reading, and knowing the base.


@pytest.mark.parametrize("fallback", [False, True])
def test_read_tensors_are_the_files_and_have_memory_of_their_own(tmp_path: Path, fallback: bool) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
             torch.uint8, torch.bool]  # fmt: skip
    if fallback:
        kinds.append(torch.float8_e4m3fn)
    tensors = {f"t{i}": (torch.randn(3, i + 1) * 4).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "none": torch.zeros(2, 0, 4)}
    path = tmp_path / "tensors"
    save_file(tensors, path, {"note": "ü"})
    assert (safetensors_io._read_directly(path) is None) == fallback
    (found, note), (mapped, _) = safetensors_io.read(path, copy=True), safetensors_io.read(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert note == {"note": "ü"}
    assert found.keys() == mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert bits(found[name].float()) == bits(tensor.float())


def naive_fingerprint(theirs: nn.Module) -> dict[str, str]:
    structure, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(theirs.named_parameters()):
        structure.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        flat = tensor.detach().flatten()
        values.update(bytes(flat[:: max(1, len(flat) // 1024)].contiguous().view(torch.uint8).tolist()))
    for name, buffer in theirs.named_buffers():
        if name in theirs.state_dict():
            flat = buffer.flatten()
            values.update(name.encode() + bytes(flat[:: max(1, len(flat) // 1024)].contiguous().view(torch.uint8).tolist()))
    return {"structure": structure.hexdigest(), "values": values.hexdigest()}


def test_the_fingerprint_is_that_of_files_written_before() -> None:
    theirs = nn.Sequential(nn.Linear(70, 40), nn.BatchNorm1d(40), nn.Linear(40, 2).to(torch.bfloat16), nn.Linear(33, 47))
    theirs[3].register_parameter("weight", nn.Parameter(torch.randn(33, 47).T))  # lies otherwise in memory
    theirs.append(nn.ParameterList([nn.Parameter(torch.zeros(0, 2)), nn.Parameter(torch.tensor(3.0))]))
    assert gf.FrozenBase.of(theirs).fingerprint() == naive_fingerprint(theirs)
