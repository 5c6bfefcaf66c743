"""Per-sample gradients in one line of torch.func: private training, and the labels that do harm.

Real sentences, embedded by MiniLM. The frozen base tells English from Italian; an adapter learns Portuguese and Dutch as well.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from _data import read
from quickstart import LANGUAGES, answers, pretrained
from torch import Tensor, nn
from torch.func import grad, vmap

import gift_func as gf


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


torch.set_num_threads(1)  # tensors this small leave a second thread nothing but waiting
torch.manual_seed(0)
encoder, encode = pretrained()
halves = [[answers(encoder.embed, half, encode)[0] for half in read(language, held_out=160)] for language in LANGUAGES]
train, held_out = ([half[torch.randperm(len(half))] for half in side] for side in zip(*halves, strict=True))
x, y = torch.cat([rows[:350] for rows in train]), torch.arange(4).repeat_interleave(350)
x_test, y_test = torch.cat(list(held_out)), torch.arange(4).repeat_interleave(160)
public, known = torch.cat([rows[350:640] for rows in train[:2]]), torch.arange(2).repeat_interleave(290)
base = fit(nn.Sequential(nn.Linear(384, 64), nn.Tanh(), nn.Linear(64, 4)), public, known, 100, 1e-3)
adapted = gf.adapt(base, gf.LoRA(rank=4, train_bias=True), generator=torch.Generator().manual_seed(1))
Params = dict[str, Tensor]
params: Params = {name: p.detach().clone() for name, p in adapted.named_trainable_parameters()}

# --- 1. The gradient of one sentence, and by vmap that of each, as the rows of a matrix


def gradient(params: Params, x: Tensor, y: Tensor) -> Tensor:
    found = grad(lambda p: F.cross_entropy(gf.functional_call(adapted, p, (x,)), y))(params)
    return torch.cat([g.flatten() for g in found.values()])


per_sample = vmap(gradient, (None, 0, 0))
one_by_one = [gradient(params, x[i], y[i]) for i in range(0, 1400, 100)]
torch.testing.assert_close(per_sample(params, x, y)[::100], torch.stack(one_by_one))

# --- 2. DP-SGD (Abadi et al., 2016, arXiv:1607.00133) on full batches: clip each gradient, add noise to their sum

clip, sigma, steps, noise = 0.5, 10.0, 30, torch.Generator().manual_seed(2)
for _ in range(steps):
    gradients = per_sample(params, x, y)
    clipped = gradients * (clip / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
    assert clipped.norm(dim=1).max() <= clip * 1.0001  # so far, and no further, can one sentence move the sum
    step = 3 / len(x) * (clipped.sum(0) + sigma * clip * torch.randn(clipped.shape[1], generator=noise))
    pieces = step.split([p.numel() for p in params.values()])
    params = {name: p - piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}
# The steps compose to rho-zCDP, and that implies (epsilon, delta)-privacy: Bun and Steinke, 2016 (arXiv:1605.02065).
rho = steps / (2 * sigma**2)
before, private = ((net(x_test).argmax(1) == y_test).float().mean() for net in (base, adapted.with_adapter(params)))
print(f"accuracy {before:.1%} -> {private:.1%} at epsilon {rho + 2 * math.sqrt(rho * math.log(1e5)):.1f}, delta 1e-5")
assert private > before + 0.15

# --- 3. Influence (TracIn: Pruthi et al., 2020, arXiv:2002.08484): whose gradient speaks against the held-out data?

wrong = torch.randperm(1400)[:140]  # one label in ten is false
labels = y.index_add(0, wrong, torch.randint(1, 4, (140,))) % 4
fit(adapted, x, labels, 60, 1e-2)
learnt = {name: p.detach() for name, p in adapted.named_trainable_parameters()}
suspects = (per_sample(learnt, x, labels) @ per_sample(learnt, x_test, y_test).mean(0)).argsort()[:70]
precision = torch.isin(suspects, wrong).float().mean()
print(f"of the 70 most harmful labels {precision:.0%} are false; of all, 10%")
assert precision > 0.7
