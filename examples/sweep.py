"""A sweep of 32 adapters as one run: four learning rates, two ranks, four seeds.

    python examples/sweep.py            # half a minute on two cores, no network

Real sentences, embedded by MiniLM. The frozen base tells English from Italian; the adapters learn Portuguese and Dutch as well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _data import read
from quickstart import LANGUAGES, answers, pretrained
from torch import Tensor, nn

import gift_func as gf

STEPS, BATCH = 200, 32
OUT = Path(__file__).parent / "out" / "sweep.png"

torch.manual_seed(0)
encoder, encode = pretrained()
halves = [[answers(encoder.embed, half, encode)[0] for half in read(language, 320, 200)] for language in LANGUAGES]
x, x_test = (
    torch.cat([rows[:size] for rows in side]) for side, size in zip(zip(*halves, strict=True), (300, 160), strict=True)
)
y, y_test = (torch.arange(4).repeat_interleave(len(rows) // 4) for rows in (x, x_test))

torch.set_num_threads(1)  # the tensors are small from here on: threads would only wait for each other
base = nn.Sequential(nn.Linear(384, 64), nn.Tanh(), nn.Linear(64, 4))
optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
for _ in range(100):
    optimizer.zero_grad()
    F.cross_entropy(base(x[:600]), y[:600]).backward()
    optimizer.step()


data = [(x[picked], y[picked]) for picked in torch.randperm(len(x)).split(BATCH)]


def strategy(trial: Any) -> dict[str, gf.Method]:
    return {"*.weight": gf.LoRA(rank=trial["rank"], alpha=16), "*.bias": gf.Full()}


def accuracy(ens: gf.Ensemble) -> Tensor:
    right: Tensor = (ens(x_test).argmax(-1) == y_test).float().mean(-1)
    return right


grid = {"lr": [1e-4, 1e-3, 1e-2, 1e-1], "rank": [2, 8], "seed": range(4)}
started = time.perf_counter()
result = gf.sweep(base, grid, strategy, data=data, loss=F.cross_entropy, steps=STEPS, evaluate=accuracy, maximize=True)
together = time.perf_counter() - started
print(result)
OUT.parent.mkdir(exist_ok=True)
result.plot(OUT, by="lr")

# The best trial by the usual loop: the same model, in 1/32 of the time that 32 such runs would take.
best = result.best_trial
adapted = gf.adapt(base, strategy(best), generator=torch.Generator().manual_seed(best["seed"]))
started = time.perf_counter()
optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=best["lr"])
for step in range(STEPS):
    inputs, kinds = data[step % len(data)]
    optimizer.zero_grad()
    F.cross_entropy(adapted(inputs), kinds).backward()
    optimizer.step()
apart = 32 * (time.perf_counter() - started)
torch.testing.assert_close(result.best(x_test), adapted(x_test), rtol=1e-3, atol=1e-3)
print(f"32 trials in {together:.1f} s; one after another {apart:.1f} s; {OUT} drawn")
assert together < apart / 1.5
assert result.score(result.best_index) > 0.8
