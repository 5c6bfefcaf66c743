"""MAML on adapters: learn the adapter from which a few steps on a few points fit a new task.

The toy of Finn et al., 2017 (arXiv:1703.03400): sine waves of random amplitude and phase, ten points each. The frozen base is
a random network. Inner steps are `grad` through `gf.functional_call`, and the outer gradient goes through those steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

import gift_func as gf

torch.set_num_threads(1)  # tensors this small leave a second thread nothing but waiting
torch.manual_seed(0)
draw = torch.Generator().manual_seed(1)
base = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
adapted = gf.adapt(base, gf.LoRA(rank=8, train_bias=True), generator=draw)
Params = dict[str, Tensor]
start: Params = {name: p.detach().clone() for name, p in adapted.named_trainable_parameters()}


def waves(tasks: int) -> tuple[Tensor, Tensor]:
    """Points and values, each (tasks, 20, 1)."""
    amplitude, phase, x = (torch.rand(tasks, n, 1, generator=draw) for n in (1, 1, 20))
    x = 10 * x - 5
    return x, (0.1 + 4.9 * amplitude) * (x + math.pi * phase).sin()


# --- 1. Gradient descent on a task's first ten points writes nothing, so it can be differentiated


def error(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(gf.functional_call(adapted, params, (x,)), y)


def descend(params: Params, x: Tensor, y: Tensor, steps: int) -> Params:
    for _ in range(steps):
        slopes = grad(error)(params, x[:10], y[:10])
        params = {name: p - 0.02 * slopes[name] for name, p in params.items()}
    return params


# --- 2. MAML minimises the error on a task's other points after one step, on average over tasks


def later_error(params: Params, x: Tensor, y: Tensor, steps: int = 1) -> Tensor:
    return error(descend(params, x, y, steps), x[10:], y[10:])


optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=3e-3)
for _ in range(500):
    optimizer.zero_grad()
    vmap(later_error, (None, 0, 0))(dict(adapted.named_trainable_parameters()), *waves(25)).mean().backward()
    optimizer.step()
meta: Params = {name: p.detach() for name, p in adapted.named_trainable_parameters()}

# --- 3. On new tasks one step from there does what ten from a fresh adapter do not

x, y = waves(500)
errors = {}
for steps in (0, 1, 2, 10):
    errors[steps] = [vmap(lambda x, y, p=p, s=steps: later_error(p, x, y, s))(x, y).mean().item() for p in (start, meta)]
    print(f"squared error after {steps:2} steps: fresh adapter {errors[steps][0]:.2f}, MAML {errors[steps][1]:.2f}")
assert errors[1][1] < 0.3 * min(errors[1][0], errors[10][0], errors[0][1])

# --- 4. The gradient is of second order: (I - rate * H) g, with H the Hessian before the step and g the gradient after it

adapted.double()
meta, x, y = {name: p.double() for name, p in meta.items()}, x[0].double(), y[0].double()
before, after = hessian(error)(meta, x[:10], y[:10]), grad(error)(descend(meta, x, y, 1), x[10:], y[10:])
found = grad(later_error)(meta, x, y)
for name in meta:
    through = sum(torch.tensordot(before[name][other], after[other], after[other].ndim) for other in meta)
    torch.testing.assert_close(found[name], after[name] - 0.02 * through)
    assert not torch.allclose(found[name], after[name], rtol=0.1)  # what a first-order method would take
