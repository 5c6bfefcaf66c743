"""The slot, operation by operation: every torch function gives on a slot what it gives on the dense weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.models import assert_close, flat, loss_of
from torch import Tensor, nn
from torch.nn import functional as F

import gift_func as gf
from gift_func.weights import Delta, Dense, LowRank, OnBase, Slot, Spectral, Transposed, Weight, as_weight, rule, weight_of
from gift_func.weights.slot import SLOT_RULES

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64)


def low_rank(*shape: int) -> tuple[Weight, list[Tensor], Tensor]:
    """A low-rank weight, its tensors, and its dense value."""
    *lead, rows, columns = shape
    left, right = rand(*lead, rows, 2, seed=1).requires_grad_(), rand(*lead, 2, columns, seed=2).requires_grad_()
    base = rand(*shape)
    return LowRank(base, left, right, 0.5), [left, right], base + 0.5 * left @ right


def flattened(*shape: int) -> tuple[Weight, list[Tensor], Tensor]:
    """A low-rank weight whose factors are those of another shape."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    left, right = rand(rows, 3, seed=1).requires_grad_(), rand(3, columns, seed=2).requires_grad_()
    base = rand(*shape)
    return LowRank(base, left, right), [left, right], base + (left @ right).reshape(shape)


def spectral(*shape: int) -> tuple[Weight, list[Tensor], Tensor]:
    matrix = rand(*shape).reshape(shape[0], -1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    shift = rand(s.numel(), seed=3).requires_grad_()
    dense = (u @ torch.diag(torch.relu(s + shift)) @ vh).reshape(shape)
    return Spectral(u, s, vh, shift, torch.Size(shape)), [shift], dense


def delta(*shape: int) -> tuple[Weight, list[Tensor], Tensor]:
    change, scale = rand(*shape, seed=4).requires_grad_(), torch.tensor(0.5, dtype=F64, requires_grad=True)
    base = rand(*shape)
    return Delta(base, change, scale), [change, scale], base + scale * change


def full(*shape: int) -> tuple[Weight, list[Tensor], Tensor]:
    tensor = rand(*shape).requires_grad_()
    return Dense(tensor), [tensor], tensor


def transposed(*shape: int) -> tuple[Weight, list[Tensor], Tensor]:
    *lead, rows, columns = shape
    inner, tensors, dense = spectral(*lead, columns, rows) if not lead else low_rank(*lead, columns, rows)
    return Transposed(inner), tensors, dense.mT


def stacked(*shape: int) -> tuple[Weight, list[Tensor], Tensor]:
    """A change on a change."""
    inner, tensors, dense = low_rank(*shape)
    change = rand(*shape, seed=9).requires_grad_()
    return Delta(inner, change), [*tensors, change], dense + change


Maker = Callable[..., tuple[Weight, list[Tensor], Tensor]]
KINDS: dict[str, Maker] = {
    "low_rank": low_rank, "flattened": flattened, "spectral": spectral, "delta": delta, "full": full, "transposed": transposed,
    "stacked": stacked,
}  # fmt: skip

X2, X3, V6, V4 = rand(3, 6), rand(2, 3, 6), rand(6), rand(4)
IDS = torch.tensor([[1, 0], [3, 3]])
OFFSETS = torch.tensor([0, 2])
FLAT_IDS = torch.tensor([1, 0, 3, 3])

# W is (4, 6). Every entry is a function of W alone; the others are constants.
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "F.linear": lambda w: F.linear(X3, w, V4),
    "F.linear without bias": lambda w: F.linear(X2, w),
    "F.linear of a vector": lambda w: F.linear(V6, w),
    "F.linear by keywords": lambda w: F.linear(input=X2, weight=w, bias=None),
    "F.linear, weight as input": lambda w: F.linear(w, rand(5, 6)),
    "F.linear, many tokens": lambda w: F.linear(rand(50, 6), w),
    "matmul right": lambda w: torch.matmul(rand(3, 4), w),
    "matmul right batched": lambda w: torch.matmul(rand(2, 3, 4), w),
    "matmul right of a vector": lambda w: V4 @ w,
    "matmul left": lambda w: torch.matmul(w, rand(6, 3)),
    "matmul left batched": lambda w: w @ rand(2, 6, 3),
    "matmul left of a vector": lambda w: w @ V6,
    "matmul with itself": lambda w: w @ w.T,
    "Tensor.matmul": lambda w: rand(3, 4).matmul(w),
    "@": lambda w: rand(3, 4) @ w,
    "mm": lambda w: torch.mm(X2, w.t()),
    "mm left": lambda w: w.mm(rand(6, 3)),
    "mv": lambda w: torch.mv(w, V6),
    "addmm": lambda w: torch.addmm(V6, rand(3, 4), w),
    "addmm, matrix added": lambda w: torch.addmm(rand(3, 6), rand(3, 4), w),
    "addmm with beta and alpha": lambda w: torch.addmm(rand(3, 6), rand(3, 4), w, beta=0.5, alpha=2),
    "addmm left": lambda w: torch.addmm(rand(3), w, rand(6, 3)),
    "addmm into a weight": lambda w: torch.addmm(w, rand(4, 3), rand(3, 6)),
    "addmm method": lambda w: rand(3, 4).addmm(X2, w.T),
    "addmv": lambda w: torch.addmv(V4, w, V6),
    "t": lambda w: X2 @ w.t(),
    "torch.t": lambda w: X2 @ torch.t(w),
    "T": lambda w: X2 @ w.T,
    "mT": lambda w: X3 @ w.mT,
    "transpose": lambda w: X3 @ w.transpose(0, 1),
    "transpose by negative": lambda w: X3 @ w.transpose(-1, -2),
    "transpose by keywords": lambda w: X3 @ w.transpose(dim0=0, dim1=1),
    "transpose with itself": lambda w: w.transpose(0, 0) @ V6,
    "swapaxes": lambda w: X3 @ torch.swapaxes(w, 0, 1),
    "transpose twice": lambda w: F.linear(X2, w.t().t()),
    "transpose in F.linear": lambda w: F.linear(rand(3, 4), w.T),
    "permute": lambda w: X2 @ w.permute(1, 0),
    "einsum": lambda w: torch.einsum("bi,oi->bo", X2, w),
    "einsum of two": lambda w: torch.einsum("oi,pi->op", w, w),
    "sum": lambda w: w.sum(),
    "mean of a dimension": lambda w: w.mean(0),
    "norm": lambda w: w.norm(dim=1),
    "F.normalize": lambda w: F.linear(F.normalize(X2), F.normalize(w)),
    "+": lambda w: w + 1,
    "1 -": lambda w: 1 - w,
    "* in the middle": lambda w: F.linear(X2, w * 2),
    "-": lambda w: -w,
    "abs": abs,
    "comparison": lambda w: (w > 0).to(F64) * w,
    "where": lambda w: torch.where(w > 0, w, torch.zeros(())),
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "chunk": lambda w: w.chunk(2)[1],
    "split": lambda w: torch.split(w, 3)[0],
    "unbind": lambda w: w.unbind()[2],
    "iteration": lambda w: torch.stack(list(w)),
    "reshape": lambda w: w.reshape(2, 12),
    "view": lambda w: w.view(-1),
    "view as": lambda w: w.view_as(torch.empty(4, 6)),
    "expand": lambda w: w.expand(2, 4, 6),
    "contiguous": lambda w: w.contiguous(),
    "to float32": lambda w: w.to(torch.float32).double(),
    "type_as": lambda w: w.type_as(X2),
    "float": lambda w: w.float().double(),
    "clone": lambda w: w.clone(),
    "index with a number": lambda w: w[1],
    "index with two": lambda w: w[1, 2],
    "index with a slice": lambda w: F.linear(X2, w[1:3]),
    "index with a step": lambda w: w[::2],
    "index with a negative": lambda w: w[-1],
    "index with slices": lambda w: w[:, 1:3],
    "index with None": lambda w: w[None],
    "index with an ellipsis": lambda w: w[..., 0],
    "index with a mask": lambda w: w[torch.tensor([True, False, True, False])],
    "index with ids": lambda w: w[IDS],
    "index with a list": lambda w: w[[0, 2]],
    "index with a tensor number": lambda w: w[torch.tensor(2)],
    "index_select": lambda w: torch.index_select(w, 0, FLAT_IDS),
    "gather": lambda w: w.gather(1, IDS),
    "F.embedding": lambda w: F.embedding(IDS, w),
    "F.embedding with padding": lambda w: F.embedding(IDS, w, padding_idx=0),
    "F.embedding with negative padding": lambda w: F.embedding(IDS, w, padding_idx=-1),
    "F.embedding by keywords": lambda w: F.embedding(input=IDS, weight=w, scale_grad_by_freq=True),
    "F.embedding_bag sum": lambda w: F.embedding_bag(IDS, w, mode="sum"),
    "F.embedding_bag mean": lambda w: F.embedding_bag(FLAT_IDS, w, OFFSETS),
    "F.embedding_bag max": lambda w: F.embedding_bag(IDS, w, mode="max"),
    "F.embedding_bag weighted": lambda w: F.embedding_bag(IDS, w, mode="sum", per_sample_weights=rand(2, 2)),
    "F.embedding_bag with padding": lambda w: F.embedding_bag(IDS, w, mode="mean", padding_idx=0),
    "F.bilinear": lambda w: F.bilinear(rand(3, 4), X2, w[None]),
    "F.cosine_similarity": lambda w: F.cosine_similarity(w, V6, dim=-1),
    "F.pad": lambda w: F.pad(w, (1, 1)),
    "F.dropout in eval": lambda w: F.dropout(w, 0.5, training=False),
    "outer": lambda w: torch.outer(w[0], w[1]),
    "softmax": lambda w: w.softmax(-1),
    "cdist": lambda w: torch.cdist(X2, w),
    "svdvals": lambda w: torch.linalg.svdvals(w),
    "vecdot": lambda w: torch.linalg.vecdot(w, V6),
    "tensordot": lambda w: torch.tensordot(X2, w, dims=([1], [1])),
    "kron": lambda w: torch.kron(w, torch.eye(2, dtype=F64)),
    "squeeze": lambda w: F.linear(X2, w.unsqueeze(0).squeeze(0)),
    "max over rows": lambda w: w.max(0).values,
    "a slot in a list in a dict": lambda w: torch.cat(tensors=[w, X2]),
}  # fmt: skip

# W is (2, 4, 6): a stack of experts.
STACKED: dict[str, Callable[[Any], Any]] = {
    "bmm": lambda w: torch.bmm(rand(2, 3, 4), w),
    "bmm of a transpose": lambda w: torch.bmm(rand(2, 3, 6), w.transpose(1, 2)),
    "bmm left": lambda w: w.bmm(rand(2, 6, 3)),
    "baddbmm": lambda w: torch.baddbmm(rand(2, 3, 6), rand(2, 3, 4), w, beta=0.5, alpha=3),
    "matmul": lambda w: rand(3, 4) @ w,
    "matmul left": lambda w: w @ rand(6, 3),
    "matmul of a vector": lambda w: w @ V6,
    "matmul, vector on the left": lambda w: V4 @ w,
    "matmul batched": lambda w: rand(5, 1, 3, 4) @ w,
    "mT": lambda w: rand(2, 3, 6) @ w.mT,
    "transpose of other dimensions": lambda w: w.transpose(0, 1) @ V6,
    "one expert": lambda w: F.linear(X2, w[1]),
    "the last expert": lambda w: X2 @ w[-1].T,
    "an expert by a tensor": lambda w: F.linear(X2, w[torch.tensor(1)]),
    "some experts": lambda w: rand(1, 3, 6) @ w[1:].mT,
    "experts by ids": lambda w: w[torch.tensor([0, 1, 1])],
    "einsum": lambda w: torch.einsum("bi,eoi->beo", X2, w),
    "iteration": lambda w: torch.stack([F.linear(X2, part) for part in w]),
    "unbind": lambda w: w.unbind(0)[1],
    "F.bilinear": lambda w: F.bilinear(rand(3, 4), X2, w),
    "addbmm": lambda w: torch.addbmm(rand(3, 6), rand(2, 3, 4), w),
}

# W is (4, 3, 3, 3), or its first dimensions: a kernel.
KERNELS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "conv1d": ((4, 3, 3), lambda w: F.conv1d(rand(2, 3, 7), w, V4, stride=2, padding=1)),
    "conv1d unbatched": ((4, 3, 3), lambda w: F.conv1d(rand(3, 7), w, dilation=2)),
    "conv2d": ((4, 3, 3, 3), lambda w: F.conv2d(rand(2, 3, 7, 7), w, None, 1, "same")),
    "conv2d by keywords": ((4, 3, 3, 3), lambda w: F.conv2d(input=rand(2, 3, 7, 7), weight=w, bias=V4)),
    "conv2d grouped": ((4, 3, 3, 3), lambda w: F.conv2d(rand(2, 6, 5, 5), w, groups=2)),
    "conv3d": ((4, 3, 2, 1, 3), lambda w: F.conv3d(rand(2, 3, 4, 4, 5), w)),
    "conv_transpose1d": ((4, 3, 3), lambda w: F.conv_transpose1d(rand(2, 4, 5), w, stride=2, output_padding=1)),
    "conv_transpose2d": ((4, 3, 3, 3), lambda w: F.conv_transpose2d(rand(2, 4, 4, 4), w, groups=2)),
    "conv_transpose3d": ((4, 3, 1, 2, 2), lambda w: F.conv_transpose3d(rand(2, 4, 3, 3, 3), w)),
    "conv2d of a derived kernel": ((4, 3, 3, 3), lambda w: F.conv2d(rand(2, 3, 7, 7), w / w.sum((1, 2, 3), keepdim=True))),
    "unfold": ((4, 3, 3, 3), lambda w: w.flatten(1) @ F.unfold(rand(1, 3, 5, 5), 3)),
}  # fmt: skip


def table() -> Iterator[Any]:
    for kind, maker in KINDS.items():
        for name, operation in OPERATIONS.items():
            if kind == "transposed" and name in ("view", "kron"):
                continue  # torch itself has no view of a transposed matrix
            yield pytest.param(maker, (4, 6), operation, id=f"{kind}-{name}")
        if kind != "spectral":
            for name, operation in STACKED.items():
                yield pytest.param(maker, (2, 4, 6), operation, id=f"{kind}-stacked-{name}")
        if kind != "transposed":
            for name, (shape, operation) in KERNELS.items():
                yield pytest.param(maker, shape, operation, id=f"{kind}-{name}")


@pytest.mark.parametrize(("maker", "shape", "operation"), list(table()))
def test_an_operation_on_a_slot_is_the_operation_on_the_dense_weight(
    maker: Maker, shape: tuple[int, ...], operation: Callable[[Any], Any]
) -> None:
    weight, tensors, dense = maker(*shape)
    wanted = operation(dense)
    wanted_grads = torch.autograd.grad(loss_of(wanted), tensors, allow_unused=True, materialize_grads=True)
    found = operation(Slot.of(weight))
    plain = found.weight.dense() if isinstance(found, Slot) else found
    assert_close(plain, wanted)
    found_grads = torch.autograd.grad(loss_of(plain), tensors, allow_unused=True, materialize_grads=True)
    for found_grad, wanted_grad in zip(found_grads, wanted_grads, strict=True):
        assert_close(found_grad, wanted_grad)


STRUCTURED: dict[str, Callable[[Any], Any]] = {
    "F.linear": lambda w: F.linear(X2, w),
    "many tokens": lambda w: F.linear(rand(64, 6), w),
    "through a transpose": lambda w: X2 @ w.t(),
    "matmul": lambda w: rand(3, 4) @ w,
    "from the left": lambda w: w @ rand(6, 3),
    "addmm": lambda w: torch.addmm(V6, rand(3, 4), w),
    "a slice": lambda w: F.linear(X2, w[1:3]),
    "embedding": lambda w: F.embedding(IDS, w),
    "embedding_bag": lambda w: F.embedding_bag(IDS, w, mode="sum"),
}


@pytest.mark.parametrize("name", list(STRUCTURED))
def test_the_usual_operations_never_form_a_low_rank_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, dense = low_rank(4, 6)
    wanted = STRUCTURED[name](dense)

    def fail(self: LowRank) -> Tensor:
        raise AssertionError("formed")

    monkeypatch.setattr(LowRank, "dense", fail)
    assert_close(STRUCTURED[name](Slot.of(weight)), wanted)
    with pytest.raises(AssertionError, match="formed"):
        Slot.of(weight).sum()


def test_a_leak_is_loud() -> None:
    slot = Slot.of(low_rank(4, 6)[0])
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.isnan(F.linear(X2, slot)).all()


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros(4, 6)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1),
    "+=": lambda w: w.__iadd__(1),
    "*=": lambda w: w.__imul__(1),
    "[...] =": lambda w: w.__setitem__(0, 0),
    "[mask] =": lambda w: w.__setitem__(torch.ones(4, 6, dtype=torch.bool), 0),
    "out=": lambda w: torch.add(torch.ones(4, 6), 1, out=w),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "a detached write": lambda w: w.detach().zero_(),
    "a write to data": lambda w: w.data.mul_(0),
    ".data =": lambda w: setattr(w, "data", torch.zeros(4, 6)),
    ".grad =": lambda w: setattr(w, "grad", torch.zeros(4, 6)),
    "requires_grad_": lambda w: w.requires_grad_(),
    "a write through a transpose": lambda w: w.t().zero_(),
    "a write through a slice": lambda w: w[1:].zero_(),
    "torch.nn.utils.clip": lambda w: torch.clamp_(w, 0, 1),
    "register_hook": lambda w: w.register_hook(lambda g: g),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), torch.zeros(1, 6, dtype=F64)),
}


@pytest.mark.parametrize("name", list(WRITES))
def test_writes_are_refused(name: str) -> None:
    weight, _, dense = low_rank(4, 6)
    before = dense.detach().clone()
    with pytest.raises(gf.AdaptError, match=r"would write to an adapted weight of shape \(\d, \d\).*merge\(\)"):
        WRITES[name](Slot.of(weight))
    assert torch.equal(weight.dense(), before)


@pytest.mark.parametrize("name", ["a write through a row", "a write through a view"])
def test_writes_to_what_was_read_out_of_a_slot_do_not_reach_anyone(name: str) -> None:
    base = rand(4, 6)
    slot = Slot.of(LowRank(base, rand(4, 2), torch.zeros(2, 6, dtype=F64)))
    before = base.clone()
    (slot[0] if name.endswith("row") else slot.view(-1)).zero_()
    assert torch.equal(base, before)


@pytest.mark.parametrize("kind", list(KINDS))
def test_metadata_is_that_of_the_dense_weight(kind: str) -> None:
    weight, _, dense = KINDS[kind](4, 6)
    slot = Slot.of(weight)
    for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_meta", "is_sparse", "itemsize", "nbytes"):
        assert getattr(slot, name) == getattr(dense, name), name
    for method in ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device"):
        assert getattr(slot, method)() == getattr(dense, method)(), method
    assert len(slot) == 4
    assert slot.size(-1) == 6
    assert torch.numel(slot) == 24
    assert torch.is_floating_point(slot)
    assert isinstance(slot, Tensor)
    assert slot.is_leaf
    assert weight.ndim == 2
    assert weight.requires_grad
    assert not weight.detach().requires_grad
    assert slot.new_zeros(3).dtype == dense.dtype
    assert torch.zeros_like(slot).shape == dense.shape
    assert type(weight).__name__ in repr(slot)
    assert "nan" not in repr(slot)


@pytest.mark.parametrize("ask", ["shape", "dtype", "requires_grad", "is_leaf", "grad_fn", "_version", "grad"])
def test_metadata_does_not_form_the_weight(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("formed"))
    getattr(Slot.of(low_rank(4, 6)[0]), ask)


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_copy_pickle_and_map(kind: str) -> None:
    weight, tensors, dense = KINDS[kind](4, 6)
    slot = Slot.of(weight)
    for copied in (copy.deepcopy(slot), pickle.loads(pickle.dumps(Slot.of(weight.detach())))):
        assert_close(weight_of(copied).dense(), dense)
        assert not weight_of(copied).requires_grad
    assert weight.map(lambda tensor: tensor.to(torch.float32)).dense().dtype == torch.float32
    for made in (weight.detach(), weight.mT.mT, weight.eval()):
        assert_close(made.dense(), dense)
    assert not weight.needs_input
    assert all(tensor.requires_grad for tensor in tensors)


def test_weight_of_and_as_weight() -> None:
    weight = low_rank(4, 6)[0]
    assert weight_of(Slot.of(weight)) is weight
    assert as_weight(weight) is weight
    assert isinstance(as_weight(X2), Dense)
    with pytest.raises(TypeError, match=r"expected a slot, got a Tensor of shape \(3, 6\)"):
        weight_of(X2)


def test_a_parameter_of_whole_numbers_has_a_placeholder_too() -> None:
    slot = Slot.of(Dense(torch.arange(6).reshape(2, 3)))
    assert slot.dtype == torch.int64
    assert torch.equal(slot.sum(0), torch.tensor([3, 5, 7]))


# Dropout.


def test_dropout_acts_on_the_input_of_the_change_only() -> None:
    base, left, right = rand(4, 6), rand(4, 2), rand(2, 6)
    slot = Slot.of(LowRank(base, left, right, 0.5, dropout=0.5))
    torch.manual_seed(0)
    found = F.linear(X2, slot)
    torch.manual_seed(0)
    wanted = F.linear(X2, base) + 0.5 * F.dropout(X2, 0.5) @ right.T @ left.T
    assert_close(found, wanted)
    assert weight_of(slot).needs_input
    assert not weight_of(slot).eval().needs_input
    torch.manual_seed(0)
    kernel = LowRank(rand(4, 3, 3, 3), rand(4, 2), rand(2, 27), 1.0, dropout=0.5)
    image = rand(2, 3, 5, 5)
    found = F.conv2d(image, Slot.of(kernel), V4)
    torch.manual_seed(0)
    change = (rand(4, 2) @ rand(2, 27)).reshape(4, 3, 3, 3)
    assert_close(found, F.conv2d(image, rand(4, 3, 3, 3), V4) + F.conv2d(F.dropout(image, 0.5), change))


@pytest.mark.parametrize("name", ["sum", "einsum", "F.normalize"])
def test_dropout_on_an_operation_without_input_is_refused(name: str) -> None:
    slot = Slot.of(LowRank(rand(4, 6), rand(4, 2), rand(2, 6), dropout=0.5))
    with pytest.raises(gf.AdaptError, match=r"dropout=0.5 acts on an operation's input.*eval\(\)"):
        OPERATIONS[name](slot)


def test_looking_rows_up_has_no_input_to_drop() -> None:
    weight = LowRank(rand(4, 6), rand(4, 2), rand(2, 6), dropout=0.5)
    assert_close(F.embedding(IDS, Slot.of(weight)), F.embedding(IDS, weight.eval().dense()))


# Element types.


@pytest.mark.parametrize("name", ["F.linear", "matmul", "conv2d", "embedding", "sum"])
@pytest.mark.parametrize(("base", "own"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_result_has_the_type_of_the_base(name: str, base: torch.dtype, own: torch.dtype) -> None:
    w, left, right = rand(4, 6).to(base), rand(4, 2).to(own).requires_grad_(), rand(2, 6).to(own).requires_grad_()
    dense = w.double() + left.double() @ right.double()
    x = X2.to(base)
    operations: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "F.linear": lambda w, x: F.linear(x, w),
        "matmul": lambda w, x: x @ w.T,
        "conv2d": lambda w, x: F.conv2d(x.reshape(1, 1, 3, 6), w.reshape(4, 1, 2, 3)),
        "embedding": lambda w, x: F.embedding(IDS, w),
        "sum": lambda w, x: w.sum(),
    }
    found = operations[name](Slot.of(LowRank(w, left, right)), x)
    assert found.dtype == base
    assert_close(found.double(), operations[name](dense, x.double()), tolerance=0.03)
    left_grad, right_grad = torch.autograd.grad(found.double().sum(), [left, right])
    assert left_grad.dtype == right_grad.dtype == own
    assert left_grad.isfinite().all()


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_autocast_runs_the_change_in_its_type(own: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))
    adapted = gf.adapt(model, {"0": gf.LoRA(rank=2, init="random", dtype=own), "2": gf.Full()})
    x = torch.randn(5, 6)
    wanted = adapted.merge()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(x).dtype == model(x).dtype
        hidden = adapted.copy_pool.module[0](x)  # type: ignore[index]
        assert hidden.dtype == torch.bfloat16
        loss = adapted(x).float().square().sum()
        pure = gf.functional_call(adapted, dict(adapted.adapter.items()), (x,))
    assert_close(pure.detach().float(), wanted.detach(), tolerance=0.05)
    loss.backward()
    assert adapted.adapter["0.lora_A"].grad.dtype == own
    assert adapted.adapter["2.weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_adapter_dtype_of_a_whole_model(adapter: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(5, 5, 3), nn.Linear(6, 3)).to(torch.bfloat16)
    adapted = gf.adapt(model, gf.LoRA(rank=2, init="random", dtype=adapter))
    assert {p.dtype for p in adapted.parameters()} == {adapter}
    out = adapted(torch.randn(5, 6, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.grad.dtype for p in adapted.parameters() if p.grad is not None} == {adapter}
    assert {p.dtype for p in adapted.merge().parameters()} == {torch.bfloat16}


# Rules and weights of a user's own.


class Scaled(OnBase):
    """`g·W`, a user's weight with nothing but `dense`."""

    def __init__(self, base: Weight | Tensor, g: Tensor) -> None:
        self.base = as_weight(base)
        self.g = g

    def dense(self) -> Tensor:
        return self.base.dense() * self.g


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_users_own_weight_needs_dense_only(name: str) -> None:
    base, g = rand(4, 6), rand(4, 1).requires_grad_()
    wanted = OPERATIONS[name](base * g)
    found = OPERATIONS[name](Slot.of(Scaled(base, g)))
    assert_close(flat(weight_of(found).dense() if isinstance(found, Slot) else found), flat(wanted))


@pytest.fixture
def clean_rules() -> Iterator[None]:
    before = dict(SLOT_RULES)
    yield
    SLOT_RULES.clear()
    SLOT_RULES.update(before)


@pytest.mark.usefixtures("clean_rules")
def test_a_users_own_rule() -> None:
    seen: list[Weight] = []

    @rule(torch.trace, Tensor.trace)
    def trace(weight: Tensor) -> Any:
        seen.append(weight_of(weight))
        return NotImplemented if weight.shape[0] > 4 else torch.tensor(42.0)

    weight, _, _ = low_rank(4, 4)
    assert torch.trace(Slot.of(weight)) == 42
    assert Slot.of(weight).trace() == 42
    assert seen == [weight, weight]
    larger, _, dense = low_rank(5, 5)
    assert_close(torch.trace(Slot.of(larger)), dense.trace())


@pytest.mark.usefixtures("clean_rules")
def test_a_users_own_rule_inside_a_model() -> None:
    class Tracer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(rand(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.trace(self.w)

    adapted = gf.adapt(Tracer(), {"w": gf.LoRA(rank=2, init="random")})
    wanted = adapted.merge()(X2)
    assert_close(adapted(X2).detach(), wanted.detach())

    @rule(torch.trace)
    def trace(weight: Tensor) -> Tensor:
        return weight_of(weight).dense().diagonal().sum() * 2

    assert_close(adapted(X2).detach(), 2 * wanted.detach())
