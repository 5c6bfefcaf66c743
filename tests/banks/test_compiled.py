"""Banks under `torch.compile`: one graph for every mix of adapters, with the eager results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.batches import gradients
from helpers.models import MLP, assert_close, bert, padded, shake, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import gift_func as gf

# The stacks are made of the adapters' parameters outside of the graph, which Dynamo warns of; gradients arrive all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bank_of(model: nn.Module, **methods: gf.Method) -> gf.AdapterBank:
    """Adapters of one model, far from their start."""
    models = {
        name: shake(gf.adapt(model, method, generator=torch.Generator().manual_seed(seed)).eval(), seed)
        for seed, (name, method) in enumerate(methods.items())
    }
    return gf.AdapterBank(models)


def mlp(**methods: gf.Method) -> gf.AdapterBank:
    torch.manual_seed(0)
    return bank_of(MLP().double(), **methods)


MIXES = [[0, 1, -1, 2], [-1, -1, -1, -1], [2, 2, 2, 2], [1, 0, 2, -1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    "methods",
    [
        {"a": gf.LoRA(rank=2), "b": gf.LoRA(rank=2), "c": gf.LoRA(rank=2)},
        {"a": gf.LoRA(rank=2), "b": gf.LoRA(rank=3, alpha=5.0), "c": gf.LoRA(rank=1)},
        {"a": gf.IA3(), "b": gf.IA3(), "c": gf.IA3()},
        {"a": gf.DoRA(rank=2), "b": gf.DoRA(rank=2), "c": gf.DoRA(rank=2)},
    ],
    ids=["LoRA", "LoRA of several ranks", "IA3", "DoRA"],
)
def test_one_graph_for_every_mix(methods: dict[str, gf.Method]) -> None:
    bank = mlp(**methods).prepare()
    counter = CompileCounter()
    step = torch.compile(lambda x, index: bank(x, adapters=index), fullgraph=True, backend=counter)
    models = {name: bank[name] for name in bank}
    for seed, mix in enumerate(MIXES):
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        index = torch.tensor(mix)
        ours, theirs = step(x, index), bank(x, adapters=index)
        assert_close(ours, theirs)
        if index.max() >= 0:
            wanted = gradients(theirs, models)
            for name, gradient in gradients(ours, models).items():
                assert_close(gradient, wanted[name], what=name)
    assert counter.frame_count == 1
    # What an optimizer does is seen without another graph.
    with torch.no_grad():
        for parameter in bank.trainable_parameters():
            parameter.add_(0.1)
    assert_close(step(x, index), bank(x, adapters=index))
    assert counter.frame_count == 1


def test_a_bank_that_grew() -> None:
    torch.manual_seed(0)
    model = MLP().double()
    bank = bank_of(model, a=gf.LoRA(rank=2), b=gf.LoRA(rank=2))
    more = bank.add("c", shake(gf.adapt(model, {"layers.0": gf.LoRA(rank=3)}), 5)).prepare()
    step = torch.compile(lambda x, index: more(x, adapters=index), fullgraph=True, backend="eager")
    x = torch.randn(5, 6, dtype=torch.float64)
    index = torch.tensor([2, 0, -1, 1, 2])
    ours, theirs, models = step(x, index), more(x, adapters=index), dict(more)
    assert_close(ours, theirs)
    wanted = gradients(theirs, models)
    for name, gradient in gradients(ours, models).items():
        assert_close(gradient, wanted[name], what=name)


def test_bert_with_a_mask() -> None:
    torch.manual_seed(0)
    model = bert().double().eval()
    bank = bank_of(model, a=gf.LoRA(rank=2), b=gf.LoRA(rank=1), c=gf.LoRA(rank=2)).prepare()
    counter = CompileCounter()

    def run(ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        out: Tensor = bank(adapters=index, input_ids=ids, attention_mask=mask).last_hidden_state
        return out

    step = torch.compile(run, fullgraph=True, backend=counter)
    ids, mask = tokens(4, 6), padded(4, 6)
    for mix in MIXES:
        index = torch.tensor(mix)
        assert_close(step(ids, mask, index), run(ids, mask, index))
    assert counter.frame_count == 1


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(gf.AdaptError, match=r"must share a stack.*by other tensors"):
        mlp(a=gf.LoRA(rank=1), b=gf.IA3()).prepare()
    with pytest.raises(gf.AdaptError, match="nothing to choose from"):
        gf.AdapterBank(base=MLP()).prepare()
    bank = mlp(a=gf.LoRA(rank=1))
    x, index = torch.randn(2, 6, dtype=torch.float64), torch.tensor([0, -1])
    unready = torch.compile(lambda x, index: bank(x, adapters=index), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="prepare"):
        unready(x, index)
    torch._dynamo.reset()
    bank.prepare()
    named = torch.compile(lambda x: bank(x, adapters=["a", None]), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="index tensor"):
        named(x)


@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp], ids=["mlp"])
def test_inductor(build: Callable[..., gf.AdapterBank]) -> None:
    bank = build(a=gf.LoRA(rank=2), b=gf.LoRA(rank=3), c=gf.LoRA(rank=2)).prepare()
    step = torch.compile(lambda x, index: bank(x, adapters=index), fullgraph=True)
    models = dict(bank)
    for mix in MIXES:
        x, index = torch.randn(4, 6, dtype=torch.float64), torch.tensor(mix)
        ours, theirs = step(x, index), bank(x, adapters=index)
        assert_close(ours, theirs)
        if index.max() >= 0:
            wanted = gradients(theirs, models)
            for name, gradient in gradients(ours, models).items():
                assert_close(gradient, wanted[name], what=name)
