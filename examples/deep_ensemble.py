"""A deep ensemble of adapters, trained at once, knows better than one adapter how sure it may be.

Lakshminarayanan et al., 2017 (arXiv:1612.01474). Real data: was an Italian sentence asked or answered? MiniLM embeds it, and
the frozen base is a network that learnt the question in English. Seventeen adapters learn Italian in one pass per step: one
on all the sentences, which is the rival, and sixteen on resampled ones, whose probabilities are averaged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _data import read
from _plots import Calibration, reliability
from quickstart import answers, pretrained
from torch import nn

import gift_func as gf

torch.set_num_threads(1)  # tensors this small leave a second thread nothing but waiting
torch.manual_seed(0)
encoder, encode = pretrained()
english, italian = read("english"), read("italian")
(x0, y0), (x, y), (x_test, y_test) = (
    answers(encoder.embed, rows, encode) for rows in (english.train, italian.train, italian.held_out)
)

# --- 1. The base, an ordinary network trained in an ordinary way

model = nn.Sequential(nn.Linear(384, 64), nn.Tanh(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(60):
    optimizer.zero_grad()
    F.cross_entropy(model(x0), y0).backward()
    optimizer.step()
model, x, x_test = model.double(), x.double(), x_test.double()  # so that what is equal below is equal to 1e-9

# --- 2. Seventeen adapters: other initial values, and but for the first other sentences, drawn with replacement

draw = torch.Generator().manual_seed(1)
ensemble = gf.adapt_ensemble(model, gf.LoRA(rank=8, train_bias=True), 17, generator=draw)
alone = ensemble[3]
rows = torch.randint(len(x), (17, len(x)), generator=draw)
rows[0] = torch.arange(len(x))
batches = [rows[:, torch.randperm(len(x), generator=draw)[:128]] for _ in range(100)]

# --- 3. One loop trains them all. The losses are added up, so that no member's gradient feels another

optimizer = torch.optim.AdamW(ensemble.trainable_parameters(), lr=2e-2)
for batch in batches:
    optimizer.zero_grad()
    logits = ensemble.map(x[batch])  # member i on x[batch[i]]: (17, 128, 2)
    (17 * F.cross_entropy(logits.flatten(0, 1), y[batch].flatten())).backward()
    optimizer.step()

# --- 4. It is what a loop over one member does

optimizer = torch.optim.AdamW(alone.trainable_parameters(), lr=2e-2)
for batch in batches:
    optimizer.zero_grad()
    F.cross_entropy(alone(x[batch[3]]), y[batch[3]]).backward()
    optimizer.step()
torch.testing.assert_close(alone(x_test), ensemble(x_test)[3], rtol=0, atol=1e-9)

# --- 5. Held-out sentences: accuracy, negative log-likelihood, expected calibration error

with torch.no_grad():
    single, *others = ensemble(x_test).softmax(-1)  # every member on the same x
found, losses = {}, []
for name, p in {"one adapter": single, "an ensemble of sixteen": torch.stack(others).mean(0)}.items():
    losses.append(F.nll_loss(p.log(), y_test).item())
    right, calibration = (p.argmax(-1) == y_test).double().mean(), Calibration.of(p, y_test, bins=5)
    note = f"right {right:.0%}, log-loss {losses[-1]:.2f}, calibration error {calibration.error:.3f}"
    print(f"{name}: {note}")
    found[name] = (calibration, note)
reliability("deep_ensemble", "Many adapters know what they do not know", "Asked or answered, in Italian", found, least=0.5)
assert losses[1] < losses[0] - 0.1
assert found["an ensemble of sixteen"][0].error < found["one adapter"][0].error
