"""Many adapters in one pass: an ensemble whose members train together, and a batch in which every sample has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

from .measure import Calls, Case, Scale
from .pairs import check_moved, check_same, family, give, mini_lm, peft_family
from .step import LINEARS, backward, cotangents_of, floor, ids, training

PREFIX_TARGET = 0.5
TOP = gf.select.name("encoder.layer.[45].*") & LINEARS  # the last two of six


def stacked_step(members: int, sentences: int, targets: Mapping[str, float], scale: Scale) -> Case:
    """One training step of all members of an ensemble, each on its own sentences of 32 tokens: as one batch, and mapped."""
    if not scale.full:
        members, sentences = 4, min(sentences, 2)
    model = mini_lm()
    adapters = family(model, LINEARS, members)
    tokens = ids(members * sentences, 32)
    shares = tokens.reshape(members, sentences, 32)
    ens = gf.stack(adapters.values())
    theirs = peft_family(model, {"a0": adapters["a0"]})
    theirs.train()
    check_members(ens, adapters, theirs, shares)
    owners = [index for index in range(members) for _ in range(sentences)]
    check_mixed(ens, shares, owners)
    one_by_one = [training(theirs, share) for share in shares]

    def theirs_in_turn() -> None:
        for step in one_by_one:
            step()

    cotangents = [part.flatten(0, 1) for part in mapped_cotangents(ens, shares)]
    calls: Calls = {
        "ours": stepping(lambda: outputs_of(ens.mix, tokens, members=owners), ens.trainable_parameters(), cotangents),
        "ours, mapped": mapped_training(ens, shares),
        "PEFT": theirs_in_turn,
        "floor": training(floor(), tokens),
    }
    facts = {"adapters": len(adapters), "tokens": tokens.numel()}
    ratios = [(key, other) for key in ("ours", "ours, mapped") for other in ("PEFT", "floor")]
    return Case(calls, ratios, facts, note="PEFT: one after another, no switch counted", targets=targets)


def check_mixed(ens: gf.Ensemble, shares: Tensor, members: Sequence[int]) -> None:
    """One batch of all members' sentences is what each computes of its own, and trains it as much."""
    cotangents = mapped_cotangents(ens, shares)
    found = {}
    for key, made in (
        ("mapped", mapped_outputs(ens, shares)),
        ("mixed", outputs_of(ens.mix, shares.flatten(0, 1), members=members)),
    ):
        made = [part.view_as(like) for part, like in zip(made, cotangents, strict=True)]
        found[key] = made, torch.autograd.grad(made, list(ens.trainable_parameters()), cotangents)
    for what, a, b in zip(("outputs", "gradients"), found["mixed"], found["mapped"], strict=True):
        check_same(f"{what} of a mixed batch and of a mapped one", a, b)


def check_members(ens: gf.Ensemble, adapters: Mapping[str, gf.AdaptedModel], theirs: Any, shares: Tensor) -> None:
    """Each member computes what PEFT does with its numbers, and gets the gradient that it gets alone."""
    cotangents = mapped_cotangents(ens, shares)
    found = mapped_outputs(ens, shares)
    torch.autograd.backward(found, cotangents)
    gradients = {name: p.grad for name, p in ens.named_trainable_parameters()}
    ens.zero_grad()
    for index, (share, adapter) in enumerate(zip(shares, adapters.values(), strict=True)):
        give(theirs, "a0", adapter)
        with torch.no_grad():
            check_same(f"outputs of member {index} and PEFT's", [part[index] for part in found], outputs_of(theirs, share))
        if index in (0, len(shares) - 1):
            backward(adapter, share, [part[index] for part in cotangents])
            alone = dict(adapter.named_trainable_parameters())
            for name, stacked in gradients.items():
                grad = alone[name].grad
                assert stacked is not None
                assert grad is not None
                check_same(f"gradients of member {index} at {name}", [stacked[index]], [grad])
            adapter.zero_grad()
    with torch.no_grad():
        check_moved([part[0] for part in found], outputs_of(mini_lm(), shares[0]))


def mapped_training(ens: gf.Ensemble, shares: Tensor) -> Callable[[], object]:
    """A step of all members as a call; as `step.training`."""
    optimizer = torch.optim.SGD(ens.trainable_parameters(), lr=0.0)
    cotangents = mapped_cotangents(ens, shares)

    def run() -> None:
        torch.autograd.backward(mapped_outputs(ens, shares), cotangents)
        optimizer.step()
        optimizer.zero_grad()

    return run


def mapped_outputs(ens: gf.Ensemble, shares: Tensor) -> list[Tensor]:
    found = ens.map(input_ids=shares, attention_mask=torch.ones_like(shares))
    return [found.last_hidden_state, found.pooler_output]


def mapped_cotangents(ens: gf.Ensemble, shares: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return [torch.randn(tensor.shape, generator=generator) for tensor in mapped_outputs(ens, shares)]


def outputs_of(model: Any, tokens: Tensor, **extra: Any) -> list[Tensor]:
    """The outputs of a model, of a bank, or of PEFT's mixed batch."""
    found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **extra)
    return [found.last_hidden_state, found.pooler_output]


def mixed_batch(scale: Scale) -> Case:
    """Inference on a batch whose samples all use different adapters, in an order that is not the bank's."""
    model, adapters, tokens, names = mixture(scale)
    bank = gf.AdapterBank(adapters).eval()
    base = bank.base
    theirs = peft_family(model, adapters).eval()
    with torch.no_grad():
        wanted = outputs_of(theirs, tokens, adapter_names=names)
        check_same("outputs of the mixed batch and PEFT's", outputs_of(bank, tokens, adapters=names), wanted)
        check_moved(wanted, outputs_of(base, tokens))

    def quietly(forward: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                forward()

        return run

    calls: Calls = {
        "ours": quietly(lambda: outputs_of(bank, tokens, adapters=names)),
        "PEFT": quietly(lambda: outputs_of(theirs, tokens, adapter_names=names)),
        "base": quietly(lambda: outputs_of(base, tokens)),
    }
    return Case(
        calls, (("ours", "PEFT"), ("ours", "base")), {"adapters": len(adapters), "tokens": tokens.numel()},
        targets={"ours/PEFT": 0.5, "ours/base": 1.1},
    )  # fmt: skip


def mixed_training(scale: Scale) -> Case:
    """A training step on such a batch, which PEFT refuses: by an ensemble's stacked tensors, and by a bank's separate ones."""
    model, adapters, tokens, names = mixture(scale)
    bank, ens = gf.AdapterBank(adapters).train(), gf.stack(adapters.values()).train()
    members = [list(adapters).index(name) for name in names]
    cotangents = cotangents_of(model, tokens)
    torch.autograd.backward(outputs_of(bank, tokens, adapters=names), cotangents)
    torch.autograd.backward(outputs_of(ens.mix, tokens, members=members), cotangents)
    gradients = {name: p.grad for name, p in bank.named_trainable_parameters()}
    stacked = {name: p.grad for name, p in ens.named_trainable_parameters()}
    for parameter in (*bank.trainable_parameters(), *ens.trainable_parameters()):
        parameter.grad = None
    for row, name in enumerate(names):
        adapter = adapters[name]
        backward(adapter, tokens[row : row + 1], [part[row : row + 1] for part in cotangents])
        for place, parameter in adapter.named_trainable_parameters():
            found, share = gradients[f"{name}.{place}"], stacked[place]
            assert found is not None
            assert share is not None
            assert parameter.grad is not None
            check_same(f"gradients of {name} at {place}", [found, share[members[row]]], [parameter.grad] * 2)
        adapter.zero_grad()
    calls: Calls = {
        "ours": stepping(lambda: outputs_of(ens.mix, tokens, members=members), ens.trainable_parameters(), cotangents),
        "ours, a bank": mixed_step(bank, tokens, names),
        "floor": training(floor(), tokens),
    }
    facts = {"adapters": len(adapters), "tokens": tokens.numel()}
    pairs = (("ours", "floor"), ("ours, a bank", "floor"))
    return Case(calls, pairs, facts, note="PEFT: refuses to train a mixed batch", targets={"ours/floor": 1.15})


def mixed_step(bank: gf.AdapterBank, tokens: Tensor, names: Sequence[str]) -> Callable[[], object]:
    """A bank's training step on a mixed batch as a call; as `step.training`."""
    cotangents = cotangents_of(mini_lm(), tokens)
    return stepping(lambda: outputs_of(bank, tokens, adapters=names), bank.trainable_parameters(), cotangents)


def stepping(
    forward: Callable[[], list[Tensor]], parameters: Iterable[nn.Parameter], cotangents: Sequence[Tensor]
) -> Callable[[], object]:
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def run() -> None:
        torch.autograd.backward(forward(), cotangents)
        optimizer.step()
        optimizer.zero_grad()

    return run


def mixture(scale: Scale) -> tuple[nn.Module, dict[str, gf.AdaptedModel], Tensor, list[str]]:
    """The model, its adapters, one sentence for each of them, and the names in the order of the sentences."""
    size = 32 if scale.full else 4
    model = mini_lm()
    adapters = family(model, LINEARS, size)
    return model, adapters, ids(size, 32), shuffled(adapters)


def shuffled(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    known = list(names)
    return [known[i] for i in torch.randperm(len(known), generator=torch.Generator().manual_seed(5))]


def prefix(scale: Scale) -> Case:
    """Eight members on the same sentences: adapted in the top two of six layers, and in all of them."""
    members = 8 if scale.full else 2
    model, tokens = mini_lm(), ids(4, 32) if scale.full else ids(1, 16)
    top, everywhere = (gf.stack(family(model, sites, members).values()) for sites in (TOP, LINEARS))
    with torch.no_grad():
        for ens in (top, everywhere):
            for index, member in enumerate(ens):
                check_same(
                    f"outputs of member {index} alone",
                    [part[index] for part in outputs_of(ens, tokens)],
                    outputs_of(member, tokens),
                )
    calls: Calls = {"top 2": shared_training(top, tokens), "all 6": shared_training(everywhere, tokens)}
    facts = {"adapters": members, "tokens": tokens.numel()}
    return Case(calls, (("top 2", "all 6"),), facts, targets={"top 2/all 6": PREFIX_TARGET})


def shared_training(ens: gf.Ensemble, tokens: Tensor) -> Callable[[], object]:
    """A step of all members on the same sentences."""
    optimizer = torch.optim.SGD(ens.trainable_parameters(), lr=0.0)

    def run() -> None:
        sum(part.sum() for part in outputs_of(ens, tokens)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    return run
