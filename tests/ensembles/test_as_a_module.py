"""An ensemble as a module: state, randomness, transforms, copies, checkpoints, graphs, and the work it saves."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.census import census
from helpers.ensembles import X, members_of, nn_mlp, part, uneven
from helpers.models import BY_NAME, CNN, MLP, assert_close, loss_of, shake
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gift_func as gf

IMAGES = torch.linspace(0, 9, 3 * 4 * 3 * 81, dtype=torch.float64).sin().reshape(3, 4, 3, 9, 9)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return CNN().double()


def random_state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()


def dropping(p: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Dropout(p), nn.Linear(64, 2)).double()


# --- BatchNorm


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("mapped", [True, False])
def test_batch_norm_statistics_are_each_members_own(mapped: bool, chunk_size: int | None) -> None:
    members = members_of(cnn(), *[gf.LoRA(rank=2)] * 3)
    ens = gf.stack(members, chunk_size=chunk_size)
    for _ in range(2):
        found = ens.map(IMAGES) if mapped else ens(IMAGES[0])
        wanted = torch.stack([member(IMAGES[i if mapped else 0]) for i, member in enumerate(members)])
        assert_close(found, wanted)
    ens.eval()
    assert ens.training is False
    for index, member in enumerate(members):
        assert_close(ens(IMAGES[1])[index], member.eval()(IMAGES[1]))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            own, alone = getattr(ens[index].norm, name), getattr(member.norm, name)
            torch.testing.assert_close(own, alone, rtol=0, atol=1e-12)
    assert int(members[0].norm.num_batches_tracked) == 2
    assert not torch.equal(members[0].norm.running_mean, members[1].norm.running_mean)


def test_a_functional_call_writes_nothing() -> None:
    ens = gf.adapt_ensemble(cnn(), gf.LoRA(rank=2), 3)
    before = {name: tensor.clone() for name, tensor in ens.state_dict().items()}
    params = dict(ens.named_trainable_parameters())
    found = gf.functional_call(ens, params, (IMAGES[0],))
    for name, tensor in ens.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was written to"
    assert_close(found, ens(IMAGES[0]))
    with pytest.raises(gf.StateError, match=r"the adapter has no 'stem\.lora_C'"):
        gf.functional_call(ens, {"stem.lora_C": IMAGES}, (IMAGES[0],))


def test_a_state_dict_brings_the_statistics_along() -> None:
    trained = gf.adapt_ensemble(cnn(), gf.LoRA(rank=2, init="random"), 3)
    trained(IMAGES[0])
    fresh = gf.adapt_ensemble(cnn(), gf.LoRA(rank=2, init="random"), 3)
    assert not torch.equal(fresh.eval()(IMAGES[1]), trained.eval()(IMAGES[1]))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(IMAGES[1]), trained(IMAGES[1]))


# --- randomness


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dropout_is_different_for_each_member_or_the_same(chunk_size: int | None) -> None:
    one = gf.adapt(dropping(), gf.LoRA())
    x = torch.ones(5, 8, dtype=torch.float64)
    different = gf.stack([one] * 3, chunk_size=chunk_size)(x)
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[1], different[2])
    ens = gf.stack([one] * 3, chunk_size=chunk_size, randomness="same")
    same = ens(x)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    assert not torch.equal(ens(x), same), "every call draws anew"


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("host", ["vmap", "loop"])
def test_a_generator_repeats_the_draws_and_leaves_the_global_one_alone(randomness: Any, host: str) -> None:
    model = dropping() if host == "vmap" else nn.GRU(8, 8, num_layers=2, dropout=0.5).double()
    ens = gf.adapt_ensemble(model, gf.Full(), 2, randomness=randomness)
    x = torch.ones(5, 8, dtype=torch.float64)
    before = random_state()
    found = []
    for seed in (7, 7, 8):
        ens.generator = torch.Generator().manual_seed(seed)
        first, second = (ens(x) if host == "vmap" else ens(x)[0] for _ in range(2))
        assert not torch.equal(first, second), "the generator moves on from call to call"
        assert torch.equal(first[0], first[1]) == (randomness == "same")
        found.append(first)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert random_state() == before


def test_making_an_ensemble_from_a_generator_is_making_its_members() -> None:
    model = nn_mlp()
    before = random_state()
    ens = gf.adapt_ensemble(model, gf.LoRA(rank=2), 3, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for member in ens:
        alone = gf.adapt(model, gf.LoRA(rank=2), generator=generator)
        assert all(torch.equal(alone.adapter[name], tensor) for name, tensor in member.adapter.items())
    assert random_state() == before


# --- chunks


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_chunks_compute_the_same(chunk_size: int) -> None:
    members = uneven("LoRA in places")
    whole, chunked = gf.stack(members), gf.stack(members, chunk_size=chunk_size)
    for ens in (whole, chunked):
        ens.map(torch.stack([X, X + 1, X - 1])).square().sum().backward()
    assert_close(chunked(X), whole(X))
    for name, parameter in whole.named_trainable_parameters():
        grad = chunked.adapter[name].grad
        assert grad is not None
        assert parameter.grad is not None
        assert_close(grad, parameter.grad)


# --- the work it saves


def work(ens: gf.Ensemble, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        ens(x).square().sum().backward()
    return int(counter.get_total_flops())


def test_what_lies_below_the_first_adapted_layer_is_computed_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    x = torch.randn(16, 32)
    layer = 2 * 16 * 32 * 32
    members = 8
    thin = 6 * 16 * 1 * (32 + 32) * members  # forward and backward of a change of rank 1
    top = work(gf.adapt_ensemble(model, {"5": gf.LoRA(rank=1)}, members), x)
    # Five layers once, the adapted one for its change alone: the frozen product of the shared input is shared as well.
    assert top <= 5 * layer + members * layer + thin
    every = work(gf.adapt_ensemble(model, gf.LoRA(rank=1), members), x)
    assert every >= 2 * 5 * members * layer, "five frozen layers, forward and backward, for each member"
    two = work(gf.adapt_ensemble(model, {"4": gf.LoRA(rank=1), "5": gf.LoRA(rank=1)}, members), x)
    assert two <= 4 * layer + 3 * members * layer + 2 * thin, "no gradient goes below the first adapted layer"


# --- as a container


def test_members_by_index_slice_and_list() -> None:
    members = uneven("LoRA in places")
    ens = gf.stack(members, chunk_size=2)
    assert len(ens) == 3
    assert ens
    assert isinstance(ens[1], gf.AdaptedModel)
    assert torch.equal(ens[-1](X), members[2](X))
    assert [type(member) for member in ens] == [gf.AdaptedModel] * 3
    for chosen, wanted in ((slice(1, None), [1, 2]), ([2, 0], [2, 0]), ([-1], [2]), (slice(None, None, -1), [2, 1, 0])):
        some = ens[chosen]
        assert isinstance(some, gf.Ensemble)
        assert some.chunk_size == 2
        assert_close(some(X), torch.stack([members[index](X) for index in wanted]))
        assert torch.equal(some[0](X), members[wanted[0]](X))
    for bad in (3, -4):
        with pytest.raises(IndexError, match=f"there is no member {bad} in an ensemble of 3"):
            ens[bad]
    with pytest.raises(IndexError, match="none was chosen"):
        ens[3:]
    with torch.no_grad():
        for parameter in ens[0].parameters():
            parameter.add_(1)
    assert torch.equal(ens[0](X), members[0](X)), "members are copies"


def test_its_text() -> None:
    text = repr(gf.stack(uneven("LoRA")))
    assert text.startswith("Ensemble of 3, run at once\n")
    assert "LoRA(rank=4, alpha=3.0)" in text


@pytest.mark.parametrize("name", ["LoRA", "LoRA in places", "IA3 in places", "DoRA ranks in places"])
def test_copies_of_all_kinds(name: str) -> None:
    ens = gf.stack(uneven(name), randomness="same")
    wanted = ens(X)
    for other in (copy.deepcopy(ens), pickle.loads(pickle.dumps(ens))):
        assert torch.equal(other(X), wanted)
        assert other.randomness == "same"
        assert [list(m.adapter) for m in other] == [list(m.adapter) for m in ens]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert torch.equal(ens(X), wanted)
    single = copy.deepcopy(ens).to(torch.float32)
    assert single(X.float()).dtype == torch.float32
    assert_close(single(X.float()).double(), wanted, 1e-5)
    assert_close(single[0](X.float()), single(X.float())[0], 1e-5)
    assert single is single.to(torch.float64)
    assert_close(single(X), wanted, 1e-5)


def test_the_users_model_is_untouched() -> None:
    model = cnn()
    before = census(model)
    ens = gf.adapt_ensemble(model, gf.LoRA(rank=2), 3, generator=torch.Generator().manual_seed(0))
    ens.map(IMAGES).square().sum().backward()
    torch.optim.SGD(ens.trainable_parameters(), lr=0.1).step()
    ens.eval()(IMAGES[0])
    copy.deepcopy(ens).to(torch.float32)
    ens.unstack()
    after = census(model)
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert torch.equal(ens.base(IMAGES[0]), model.eval()(IMAGES[0]))


# --- torch.func


def test_torchs_own_functional_call_and_stack_module_state() -> None:
    first, second = (gf.stack(members_of(nn_mlp(), gf.LoRA(rank=2), gf.LoRA(rank=2))) for _ in range(2))
    shake(second)  # type: ignore[arg-type]  # which only asks for its trainable parameters
    assert torch.equal(torch.func.functional_call(first, dict(second.named_parameters()), X), second(X))
    params, buffers = torch.func.stack_module_state([first, second])
    run = torch.func.vmap(lambda params: torch.func.functional_call(first, (params, buffers), X))
    assert_close(run(params), torch.stack([first(X), second(X)]))


@pytest.mark.parametrize("name", ["LoRA", "DoRA ranks in places", "IA3 in places"])
def test_gradients_by_torch_func(name: str) -> None:
    members = uneven(name)
    ens = gf.stack(members)
    params = dict(ens.named_trainable_parameters())

    def loss(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = gf.functional_call(ens, params, (x,)).square().sum()
        return out

    found = torch.func.grad(loss)(params, X)
    wanted = torch.autograd.grad(ens(X).square().sum(), list(params.values()))
    for (key, got), want in zip(found.items(), wanted, strict=True):
        assert_close(got, want, what=key)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, X.unsqueeze(1))
    for key, got in per_sample.items():
        assert_close(got.sum(0), found[key], what=key)
        assert_close(got[1], torch.func.grad(loss)(params, X[1:2])[key], what=key)
    moved = {key: torch.ones_like(value) for key, value in params.items()}
    tangent = torch.func.jvp(lambda params: loss(params, X), (params,), (moved,))[1]
    assert_close(tangent, sum((found[key].sum() for key in found), torch.zeros((), dtype=torch.float64)))


# --- gradient checkpoints and graphs


class Checkpointed(nn.Module):
    """A network whose middle is run again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_let_the_members_run_one_after_another(reentrant: bool) -> None:
    torch.manual_seed(0)
    members = members_of(Checkpointed(reentrant).double(), gf.LoRA(rank=2), gf.LoRA(rank=2))
    ens = gf.stack(members)
    if not reentrant:  # which torch.vmap has no rule for
        with torch.no_grad():
            ens(X)
        assert ens.fallback is None, "without gradients nothing is run again"
    ens(X).square().sum().backward()
    assert ens.fallback is not None
    for index, member in enumerate(members):
        member(X).square().sum().backward()
        for name, parameter in member.named_trainable_parameters():
            stacked = ens.adapter[name].grad
            assert stacked is not None
            assert parameter.grad is not None
            assert_close(stacked[index], parameter.grad, what=name)


def test_transformers_checkpoints() -> None:
    row = BY_NAME["bert"]
    model: Any = row.model()
    model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))
    members = members_of(model.train(), row.strategy("lora"), row.strategy("lora"))
    ens = gf.stack(members)
    args, kwargs = row.call()
    found = ens(*args, **kwargs)
    assert ens.fallback is not None
    assert "checkpoint" in ens.fallback
    sum(loss_of(part(found, index)) for index in range(2)).backward()  # type: ignore[union-attr]
    for index, member in enumerate(members):
        loss_of(member(*args, **kwargs)).backward()
        for name, parameter in member.named_trainable_parameters():
            stacked = ens.adapter[name].grad
            assert stacked is not None
            assert parameter.grad is not None
            assert_close(stacked[index], parameter.grad, what=name)


@pytest.mark.parametrize("name", ["LoRA", "LoRA in places", "IA3 in places", "DoRA"])
def test_one_graph_for_all_values(name: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    ens = gf.stack(uneven(name))
    compiled = torch.compile(ens, fullgraph=True, backend=counter, dynamic=False)
    for _ in range(2):
        assert_close(compiled(X), ens(X))
        shake(ens)  # type: ignore[arg-type]  # which only asks for its trainable parameters
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_compiled_by_inductor(model: str) -> None:
    torch._dynamo.reset()
    members = uneven("LoRA") if model == "mlp" else members_of(cnn().eval(), *[gf.LoRA(rank=2)] * 3)
    x = X if model == "mlp" else IMAGES[0]
    ens = gf.stack(members)
    compiled = torch.compile(ens, fullgraph=True)
    for _ in range(2):
        names, parameters = zip(*ens.named_trainable_parameters(), strict=True)
        found, wanted = compiled(x), ens(x)
        assert_close(found, wanted)
        grads = (torch.autograd.grad(out.square().sum(), parameters) for out in (found, wanted))
        for name, got, want in zip(names, *grads, strict=True):
            assert_close(got, want, what=name)
        shake(ens)  # type: ignore[arg-type]  # which only asks for its trainable parameters


def test_an_mlp_of_one_member() -> None:
    (member,) = members_of(MLP().double(), gf.LoRA())
    ens = gf.stack([member])
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_close(ens(x), member(x).unsqueeze(0))
    assert_close(ens.map(x.unsqueeze(0)), member(x).unsqueeze(0))


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "some", "all"])
def test_mini_lm_with_masks_on_one_batch_and_on_each_members_own(padding: str) -> None:
    from benchmarks.pairs import mini_lm

    members = members_of(copy.deepcopy(mini_lm()).double(), *[gf.LoRA(rank=4)] * 3)
    ens = gf.stack(members)
    ids = torch.arange(3 * 2 * 16).reshape(3, 2, 16) * 97 % 20000 + 1000
    mask = torch.ones_like(ids)
    mask[: {"none": 0, "some": 1, "all": 3}[padding], 1, 9:] = 0
    found = ens.map(input_ids=ids, attention_mask=mask).last_hidden_state
    shared = ens(input_ids=ids[0], attention_mask=mask[0]).last_hidden_state
    mixed = ens.mix(input_ids=ids[:, 1], attention_mask=mask[:, 1], members=[2, 0, 1]).last_hidden_state
    assert ens.fallback is None
    (found * mask.unsqueeze(-1)).square().mean((1, 2, 3)).sum().backward()
    for index, member in enumerate(members):
        wanted = member(input_ids=ids[index], attention_mask=mask[index]).last_hidden_state
        assert_close(found[index], wanted, 1e-9)
        assert_close(shared[index], member(input_ids=ids[0], attention_mask=mask[0]).last_hidden_state, 1e-9)
        row = [2, 0, 1].index(index)
        own = member(input_ids=ids[row : row + 1, 1], attention_mask=mask[row : row + 1, 1]).last_hidden_state
        assert_close(mixed[row], own[0], 1e-9)
        (wanted * mask[index].unsqueeze(-1)).square().mean().backward()
        for name, parameter in member.named_trainable_parameters():
            stacked = ens.adapter[name].grad
            assert (stacked is None) == (parameter.grad is None) == name.startswith("pooler")
            if stacked is not None and parameter.grad is not None:
                assert_close(stacked[index], parameter.grad, 1e-9, name)


# --- the verbs of a model


def test_states_of_an_ensemble() -> None:
    ens = gf.stack(uneven("LoRA ranks in places"))
    wanted = ens(X).detach()
    state = {name: tensor.clone() for name, tensor in ens.adapter_state_dict().items()}
    assert state.keys() == dict(ens.adapter.items()).keys()
    assert all(tensor is not None and not tensor.requires_grad for tensor in ens.adapter_state_dict().values())
    optimizer = torch.optim.SGD(ens.trainable_parameters(), lr=0.1)
    ens(X).square().sum().backward()
    optimizer.step()
    assert (ens(X) - wanted).abs().max() > 1e-3
    before = dict(ens.adapter.items())
    assert ens.load_adapter_state_dict(state) == ([], [])
    assert all(parameter is before[name] for name, parameter in ens.adapter.items()), "an optimizer would have lost them"
    assert torch.equal(ens(X), wanted)
    name = next(iter(state))
    with pytest.raises(gf.StateError, match="the state lacks 1 of the adapter's"):
        ens.load_adapter_state_dict({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(gf.StateError, match="has shape"):
        ens.load_adapter_state_dict({**state, name: state[name][:1]})
    assert ens.load_adapter_state_dict({"no": X}, strict=False) == (list(state), ["no"])


def test_statistics_in_the_state_of_an_ensemble() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    ens = gf.stack(members_of(model, gf.LoRA(rank=1), gf.LoRA(rank=2)))
    assert "1.running_mean" not in ens.adapter_state_dict(), "nobody has trained yet"
    ens.train()(X)
    state = {name: tensor.clone() for name, tensor in ens.adapter_state_dict().items()}
    assert state["1.running_mean"].shape == (2, 6)
    wanted = ens.eval()(X)
    ens.train()(X + 1)
    assert (ens.eval()(X) - wanted).abs().max() > 1e-3
    ens.load_adapter_state_dict(state)
    assert torch.equal(ens(X), wanted)
    ens.load_adapter_state_dict({name: tensor for name, tensor in state.items() if name in ens.adapter})
    assert "1.running_mean" not in ens.adapter_state_dict(), "buffers that a state does not name become the base's"


def test_merging_a_member_and_the_summary() -> None:
    ens = gf.stack(uneven("LoRA ranks in places"))
    for index in (0, 1, -1):
        merged = ens.merge(index)
        assert type(merged) is type(nn_mlp())
        assert_close(merged(X), ens(X)[index], 1e-10)
    with pytest.raises(IndexError, match="there is no member 7"):
        ens.merge(7)
    text = ens.summary()
    trained = sum(parameter.numel() for parameter in ens.trainable_parameters())
    assert f"{len(ens)} members" in text
    assert f"trained: {trained:,} parameters" in text
