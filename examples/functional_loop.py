"""A training loop in which nothing is mutated: parameters in, parameters out.

`torch.optim` writes into parameters. With `gf.functional_call` the adapted network is a function of a dict of tensors, so a
step can be a function too, from parameters, gradients and the optimizer's state to new ones; and what is pure can be
transformed: section 4 trains at four learning rates at once, by a `vmap` over the whole loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

import gift_func as gf

torch.set_num_threads(1)  # tensors this small leave a second thread nothing but waiting
torch.manual_seed(0)
x = 4 * torch.rand(256, 2, dtype=torch.float64) - 2
y = (x.norm(dim=1) > 1.4).long()  # inside or outside of a circle
model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).double()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

adapted = gf.adapt(model, gf.LoRA(rank=4, train_bias=True), generator=torch.Generator().manual_seed(1))
Params = dict[str, Tensor]
start: Params = {name: p.detach().clone() for name, p in adapted.named_trainable_parameters()}

# --- 1. The loss is a function of the adapter's tensors


def loss_of(params: Params) -> Tensor:
    return nn.functional.cross_entropy(gf.functional_call(adapted, params, (x,)), y)


# --- 2. So is the optimizer: Loshchilov and Hutter's AdamW (2019, arXiv:1711.05101) with torch's defaults

State = tuple[Params, Params]  # running means of the gradient and of its square


def adamw(params: Params, grads: Params, state: State, step: int, lr: float | Tensor) -> tuple[Params, State]:
    mean = {name: 0.9 * m + 0.1 * grads[name] for name, m in state[0].items()}
    square = {name: 0.999 * s + 0.001 * grads[name] ** 2 for name, s in state[1].items()}
    moves = {n: mean[n] / (1 - 0.9**step) / ((square[n] / (1 - 0.999**step)).sqrt() + 1e-8) for n in params}
    return {n: p * (1 - 0.01 * lr) - lr * moves[n] for n, p in params.items()}, (mean, square)


# --- 3. The loop rebinds names and writes to no tensor; what it returns makes a new model on the same base


def train(lr: float | Tensor) -> tuple[Params, Tensor]:
    params, zeros = start, {name: torch.zeros_like(p) for name, p in start.items()}
    state, losses = (zeros, zeros), []
    for step in range(1, 101):
        grads, loss = grad_and_value(loss_of)(params)
        params, state = adamw(params, grads, state, step, lr)
        losses.append(loss)
    return params, torch.stack(losses)


params, losses = train(1e-2)
trained = adapted.with_adapter(params)
assert losses[-1] < 0.05 < losses[0]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {(trained(x).argmax(1) == y).float().mean():.1%}")

# --- 4. Four learning rates in one loop

many, curves = vmap(train)(torch.tensor([1e-3, 3e-3, 1e-2, 3e-2], dtype=torch.float64))
print("last loss by learning rate:", curves[:, -1])

# --- 5. torch.optim, which writes in place, comes to the same; the user's model is bit for bit what it was

optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(adapted(x), y).backward()
    optimizer.step()
for name, p in adapted.named_trainable_parameters():
    torch.testing.assert_close([params[name], many[name][2]], [p.detach()] * 2, rtol=0, atol=1e-9)
torch.testing.assert_close(trained(x), adapted(x), rtol=0, atol=1e-9)
assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
