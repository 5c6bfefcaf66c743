"""Eight tasks in every batch: eight adapters, of five methods, on one frozen network, trained by one optimizer.

Real sentences in four languages, embedded by MiniLM. Four tasks ask whether a sentence was asked or answered, one task for
each language; four ask whether it is of that language. Every sample goes through its task's own adapter, all in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from _data import read
from quickstart import LANGUAGES, answers, pretrained
from torch import Tensor, nn

import gift_func as gf

EACH = 16  # samples of each task in a batch
Batch = tuple[Callable[[Tensor], Tensor], Tensor, Tensor]  # what runs it, the samples, their labels
torch.set_num_threads(1)  # tensors this small leave a second thread nothing but waiting
torch.manual_seed(0)
encoder, encode = pretrained()


def tasks(half: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The eight tasks' sentences and labels, of one half of the corpus: 0 what is trained on, 1 what is held out."""
    asked = {name: answers(encoder.embed, read(name, 160, 120)[half], encode) for name in LANGUAGES}
    found = {f"asked or answered, {name}": (x.double(), y) for name, (x, y) in asked.items()}
    for name in LANGUAGES:
        own, others = asked[name][0], torch.cat([x[::3] for other, (x, _) in asked.items() if other != name])
        is_own = torch.arange(len(own) + len(others)) < len(own)
        found[f"{name} or another language"] = torch.cat([own, others]).double(), is_own.long()
    return found


def fit(parameters: Iterable[nn.Parameter], batches: Iterable[Batch]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for network, x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y, reduction="sum").div(EACH).backward()
        optimizer.step()


# --- 1. One frozen network, which knows questions in French; for each task an adapter by whatever method, and a head
learn, test = tasks(0), tasks(1)
base = nn.Sequential(nn.Linear(384, 64), nn.Tanh(), nn.Linear(64, 2)).double()
x, y = answers(encoder.embed, read("french", 160)[0], encode)
fit(base.parameters(), [(base, x.double(), y)] * 30)
methods = [gf.LoRA(rank=4), gf.DoRA(rank=2), gf.LoHa(rank=2), gf.IA3(), gf.LoRA(), gf.DoRA(rank=4), gf.OFT(), gf.LoRA(rank=2)]
alone = {task: gf.adapt(base, {"0": method, "2.*": gf.Full()}) for task, method in zip(learn, methods, strict=True)}
bank = gf.AdapterBank(alone)  # it holds copies: those alone stay at the start

# --- 2. Samples of all tasks in every batch, in any order: one pass forward, one backward, one optimizer
mixed: list[Batch] = []
own: dict[str, list[Batch]] = {task: [] for task in learn}
for _ in range(80):
    names, order = [task for task in learn for _ in range(EACH)], torch.randperm(8 * EACH)
    for task, (x, y) in learn.items():
        rows = torch.randint(len(y), (EACH,))
        own[task].append((alone[task], x[rows], y[rows]))
    x, y = (torch.cat(parts)[order] for parts in zip(*(own[task][-1][1:] for task in learn), strict=True))
    mixed.append((partial(bank, adapters=[names[i] for i in order]), x, y))
fit(bank.trainable_parameters(), mixed)

# --- 3. Trained alone on its own samples, each adapter ends where it did in the bank; who is in no batch gets no gradient
for task, adapted in alone.items():
    fit(adapted.trainable_parameters(), own[task])
    torch.testing.assert_close(dict(bank[task].adapter), dict(adapted.adapter), rtol=0, atol=1e-9)
again, first = gf.AdapterBank(alone), next(iter(alone))
again(test[first][0][:3], adapters=[first, None, first]).sum().backward()
assert {name.split(".")[0] for name, p in again.named_trainable_parameters() if p.grad is not None} == {first}

# --- 4. All eight tasks are learned
for (task, (x, y)), method in zip(test.items(), methods, strict=True):
    chance = y.bincount().max().item() / len(y)
    before, after = ((network(x).argmax(1) == y).double().mean().item() for network in (base, bank[task]))
    print(f"{task:30} chance {chance:.0%}, base {before:.0%} -> {after:.0%} by {method}")
    assert after > max(chance, before) + 0.05
