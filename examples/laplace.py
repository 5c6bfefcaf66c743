"""A Laplace approximation over an adapter: how sure is the network, and where does it only guess?

The adapter's posterior is taken for a Gaussian whose precision is the Gauss-Newton matrix; an adapter is small, so that is
small too (Daxberger et al., 2021, arXiv:2106.14806). `jvp` and `vjp` multiply by such matrices without forming them.
"""

from __future__ import annotations

import torch
from _plots import bands
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import gift_func as gf

torch.set_num_threads(1)  # tensors this small leave a second thread nothing but waiting
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
NOISE, PRIOR = 0.1, 1.0  # standard deviation of the noise; precision of the adapter's prior, which is around its start


def fit(model: nn.Module, x: Tensor, y: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(1000):
        optimizer.zero_grad()
        moved = nn.utils.parameters_to_vector(model.parameters()) - start
        ((model(x) - y).square().sum() / NOISE**2 + prior * moved.square().sum()).backward()
        optimizer.step()
    return start, nn.utils.parameters_to_vector(model.parameters()).detach()


# --- 1. The base learns a sine from plenty of data, an adapter another curve from forty points in two places

places = torch.linspace(-5, 5, 201).unsqueeze(1)
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
fit(model, places, places.sin(), prior=0.0)
adapted = gf.adapt(model, gf.LoRA(rank=2))
truth = places.add(0.5).sin() + 0.1 * places
x = torch.cat([torch.rand(20, 1) - 3, 1.5 * torch.rand(20, 1) + 1])
y = (x + 0.5).sin() + 0.1 * x + NOISE * torch.randn_like(x)
start, best = fit(adapted, x, y, PRIOR)

# --- 2. Functions of one vector: network, negative log posterior, product with the Gauss-Newton matrix (never negative)


def network(vector: Tensor, x: Tensor) -> Tensor:
    pieces = vector.split([p.numel() for p in adapted.parameters()])
    params = {name: v.view_as(p) for (name, p), v in zip(adapted.named_trainable_parameters(), pieces, strict=True)}
    return torch.squeeze(gf.functional_call(adapted, params, (x,)), 1)


def energy(vector: Tensor) -> Tensor:
    return (network(vector, x) - y[:, 0]).square().sum() / (2 * NOISE**2) + PRIOR * (vector - start).square().sum() / 2


def gauss_newton(vector: Tensor) -> Tensor:
    change = jvp(lambda v: network(v, x), (best,), (vector,))[1]
    return torch.add(PRIOR * vector, vjp(lambda v: network(v, x), best)[1](change)[0] / NOISE**2)


# --- 3. The products agree with the matrices

some, seen = torch.randn_like(best), jacrev(network)(best, x)
torch.testing.assert_close(jvp(grad(energy), (best,), (some,))[1], hessian(energy)(best) @ some)
torch.testing.assert_close(gauss_newton(some), seen.T @ (seen @ some) / NOISE**2 + PRIOR * some)

# --- 4. The prediction's uncertainty, and the same from the other side: a Gaussian process with the kernel J Jᵀ / prior

J = jacrev(network)(best, places)
variance = (J * torch.linalg.solve(vmap(gauss_newton)(torch.eye(len(best))), J.T).T).sum(1)
cross, kernel = J @ seen.T / PRIOR, seen @ seen.T / PRIOR + NOISE**2 * torch.eye(len(x))
torch.testing.assert_close(variance, J.square().sum(1) / PRIOR - (cross * torch.linalg.solve(kernel, cross.T).T).sum(1))

mean, deviation, distance = network(best, places), variance.sqrt(), (places - x.T).abs().amin(1)
near, far = deviation[distance < 0.1], deviation[distance > 1]
print(f"{len(best)} parameters; deviation {near.mean():.3f} near the data, {far.mean():.3f} far from it")
assert near.max() < far.min()
bands("laplace", "Sure where there is data", "Laplace over a LoRA adapter", (places, mean, deviation, truth), (x, y))
