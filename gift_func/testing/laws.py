"""The laws, and the case of a method on a host that each of them looks at."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapt import adapt
from ..adapted_model import AdaptedModel
from ..ensembles.ensemble import Ensemble
from ..ensembles.stack import stack
from ..errors import AdaptError
from ..files import load_adapter, save_adapter
from ..functional import functional_call
from ..methods import Method
from .hosts import HOSTS, Around, Host

Tensors = Mapping[str, Tensor]
TOLERANCE = 1e-10


class Case:
    """A method on a host, with random tensors in the adapter's places."""

    def __init__(self, method: Method, host: Host, dtype: torch.dtype = torch.float64) -> None:
        self.method = method
        self.host = host
        self.model, self.x = host.make(dtype)
        self.rules = {f"inner.{host.parameter}": method}
        self.start = adapt(self.model, self.rules, generator=torch.Generator().manual_seed(1))
        self.states = [self.random(seed) for seed in range(2)]
        self.adapted = self.start.with_adapter(self.states[0])

    def random(self, seed: int) -> dict[str, Tensor]:
        """The initial tensors, the trained ones moved away from where they start."""
        generator = torch.Generator().manual_seed(seed + 2)
        state = self.start.adapter_state_dict()
        for name, parameter in self.start.named_trainable_parameters():
            noise = torch.empty(parameter.shape, dtype=torch.float64).normal_(std=0.3, generator=generator)
            state[name] = parameter.detach() + noise.to(parameter)
        return state

    def trained(self, state: Tensors) -> dict[str, Tensor]:
        """The state's trained tensors."""
        return {name: state[name] for name, _ in self.start.named_trainable_parameters()}

    def run(self, params: Tensors, x: Tensor | None = None) -> Tensor:
        """The adapted host as a function of its trained tensors."""
        out: Tensor = functional_call(self.adapted, params, (self.x if x is None else x,))
        return out

    def loss(self, params: Tensors, x: Tensor | None = None) -> Tensor:
        """Something to differentiate."""
        return self.run(params, x).square().sum()

    def dense(self, params: Tensors) -> Tensor:
        """The host with its adapted parameter replaced by the dense weight: the reference."""
        tensors = {**self.adapted.adapter, **params}
        placed = {name: weight.dense() for name, weight in self.adapted.structured_weights(tensors).items()}
        out: Tensor = torch.func.functional_call(copy.deepcopy(self.model), placed, (self.x,))
        return out


Law = Callable[[Case], None]


def starts_as_base(case: Case) -> None:
    """A method that says it starts as the identity does."""
    if case.method.starts_as_base:
        _equal(case.start(case.x), case.model(case.x))


def rule_is_dense(case: Case) -> None:
    """Acting through the structure is acting through the dense weight, forward and backward."""
    params = {name: tensor.clone().requires_grad_() for name, tensor in case.trained(case.states[0]).items()}
    found, wanted = case.run(params), case.dense(params)
    _equal(found, wanted)
    tensors = list(params.values())
    for name, got, want in zip(
        params,
        torch.autograd.grad(found.square().sum(), tensors, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(wanted.square().sum(), tensors, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        _equal(got, want, name)


def gradients_arrive(case: Case) -> None:
    """Every trained tensor of the adapter gets a gradient from an ordinary backward, and nothing else does."""
    case.adapted(case.x).square().sum().backward()
    for name, parameter in case.adapted.named_trainable_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
    assert all(parameter.grad is None for parameter in case.model.parameters()), "the base got a gradient"


def training_is_followed(case: Case) -> None:
    """A step of an optimizer shows at the next call: nothing of the weight was computed ahead."""
    adapted = case.adapted
    adapted(case.x).square().sum().backward()
    torch.optim.SGD(adapted.trainable_parameters(), lr=0.05).step()
    _equal(adapted(case.x), case.dense(dict(adapted.adapter.items())))


def vmap_is_loop(case: Case) -> None:
    """Several adapters at once are the adapters one by one."""
    states = [case.trained(state) for state in case.states]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    _equal(torch.func.vmap(case.run)(stacked), torch.stack([case.run(state) for state in states]))


def stacked_is_separate(case: Case) -> None:
    """Members of an ensemble compute, and are differentiated, as each alone, and come out of it bit by bit."""
    members = [case.start.with_adapter(case.random(seed)) for seed in range(3)]
    _same_as_members(stack(members), members, case.x)
    wider = _wider(case, 2)
    if wider is not None:
        _same_as_members(stack([*members[:2], wider]), [*members[:2], wider], case.x)


def per_sample_gradients_are_loop(case: Case) -> None:
    """`vmap(grad)` gives every sample's own gradient."""
    params = case.trained(case.states[0])
    found = torch.func.vmap(torch.func.grad(case.loss), (None, 0))(params, case.x.unsqueeze(1))
    singles = [torch.func.grad(case.loss)(params, sample.unsqueeze(0)) for sample in case.x]
    for name, got in found.items():
        _equal(got, torch.stack([single[name] for single in singles]), name)


def forward_mode_is_reverse_mode(case: Case) -> None:
    """`jvp` along a direction is the gradient's product with it."""
    params = case.trained(case.states[0])
    direction = case.trained(case.states[1])
    forward = torch.func.jvp(case.loss, (params,), (direction,))[1]
    gradient = torch.func.grad(case.loss)(params)
    _equal(forward, sum((gradient[name] * direction[name]).sum() for name in params))


def base_is_untouched(case: Case) -> None:
    """Nothing of the user's model changes, whatever is done with the adapted one."""
    parameters = dict(case.model.named_parameters())
    before = {name: (parameter, parameter.detach().clone(), parameter._version) for name, parameter in parameters.items()}
    case.adapted.train()(case.x).square().sum().backward()
    torch.optim.SGD(case.adapted.trainable_parameters(), lr=0.1).step()
    case.adapted.eval()(case.x)
    case.adapted.merge()
    copy.deepcopy(case.adapted).to(torch.float32)
    for name, parameter in case.model.named_parameters():
        same, value, version = before[name]
        assert parameter is same, f"{name} was replaced"
        assert torch.equal(parameter, value), f"{name} changed"
        assert parameter._version == version, f"{name} was written to"
        assert parameter.requires_grad, f"{name} was frozen"
        assert parameter.grad is None, f"{name} got a gradient"


def merged_is_adapted(case: Case) -> None:
    """The merged module, which holds no class of ours, computes the same."""
    merged = case.adapted.merge()
    assert not any(type(p) not in (nn.Parameter, Tensor) for p in merged.parameters())
    _equal(merged(case.x), case.adapted(case.x))


def copies_are_equal(case: Case) -> None:
    """The adapted model survives `deepcopy` and a state dict, the method `pickle` and `to_dict`."""
    wanted = case.adapted(case.x)
    assert torch.equal(copy.deepcopy(case.adapted)(case.x), wanted)
    assert torch.equal(case.start.with_adapter(case.adapted.adapter_state_dict())(case.x), wanted)
    again = pickle.loads(pickle.dumps(case.method))
    assert again == case.method
    assert hash(again) == hash(case.method)
    assert Method.from_dict(case.method.to_dict()) == case.method


def loaded_is_saved(case: Case) -> None:
    """The native file gives back the same outputs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(case.adapted, path)
        assert torch.equal(load_adapter(case.model, path)(case.x), case.adapted(case.x))


def checkpoints_are_exact(case: Case) -> None:
    """Under gradient checkpointing every gradient is the same."""
    call = case.model.call
    checkpointed = Around(case.model.inner, lambda module, x: checkpoint(call, module, x, use_reentrant=False))
    adapted = adapt(checkpointed, case.rules).with_adapter(case.adapted.adapter_state_dict())
    for (name, got), (_, want) in zip(_gradients(adapted, case.x), _gradients(case.adapted, case.x), strict=True):
        _equal(got, want, name)


def one_compile_for_all(case: Case) -> None:
    """Compiled as one graph, it computes the same, and another adapter of the same shapes compiles nothing new."""
    from torch._dynamo.testing import CompileCounter  # importing Dynamo takes seconds

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(case.run, fullgraph=True, backend=counter, dynamic=False)
    for state in case.states:
        params = case.trained(state)
        _equal(compiled(params, case.x), case.run(params))
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for {len(case.states)} adapters of one shape"


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        starts_as_base,
        rule_is_dense,
        gradients_arrive,
        training_is_followed,
        vmap_is_loop,
        stacked_is_separate,
        per_sample_gradients_are_loop,
        forward_mode_is_reverse_mode,
        base_is_untouched,
        merged_is_adapted,
        copies_are_equal,
        loaded_is_saved,
        checkpoints_are_exact,
        one_compile_for_all,
    )
}


def element_type_is_kept(method: Method, host: Host) -> None:
    """A half-precision network stays one: its outputs, its merged weights."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(method, host, dtype)
        assert case.adapted(case.x).dtype == dtype
        assert all(parameter.dtype == dtype for parameter in case.adapted.merge().parameters())


def check(method: Method, hosts: Iterable[str] | None = None, laws: Iterable[str] | None = None) -> None:
    """Check a method against the laws on every host that it can adapt.

    Args:
        method: an instance; several configurations are several calls.
        hosts: names out of `HOSTS`; all by default.
        laws: names out of `LAWS`; all by default.

    Raises:
        AssertionError: naming the law, the host and the method, at the first law that does not hold.
        AdaptError: if the method adapts none of the hosts.

    Example:
        >>> import gift_func as gf
        >>> from gift_func import testing
        >>> testing.check(gf.LoRA(rank=2), hosts=["linear"], laws=["starts_as_base", "rule_is_dense"])
    """
    adapted = 0
    for name in HOSTS if hosts is None else hosts:
        adapted += sum(1 for _ in _checked(method, name, LAWS if laws is None else laws))
        if laws is None and not refuses(method, name):
            element_type_is_kept(method, HOSTS[name])
    if not adapted:
        raise AdaptError(f"{method} adapts none of the hosts {', '.join(HOSTS if hosts is None else hosts)}")


def _checked(method: Method, host: str, laws: Iterable[str]) -> Iterator[str]:
    if refuses(method, host):
        return
    for law in laws:
        try:
            LAWS[law](Case(method, HOSTS[host]))
        except AssertionError as error:
            raise AssertionError(f"{method} on {host!r} breaks {law}: {LAWS[law].__doc__} {error}") from error
        yield law


def refuses(method: Method, host: str) -> bool:
    """Whether the method says that it cannot adapt the host; adapting it must then say so, and where.

    Args:
        host: a name out of `HOSTS`.
    """
    module, _ = HOSTS[host].make(torch.float64)
    name = f"inner.{HOSTS[host].parameter}"
    said = ""
    try:
        adapt(module, {name: method})
    except AdaptError as error:
        said = str(error)
    assert not said or name in said, f"{method} refuses without naming {name!r}: {said}"
    return bool(said)


def _same_as_members(ensemble: Ensemble, members: Sequence[AdaptedModel], x: Tensor) -> None:
    xs = torch.stack([x.roll(index, 0) for index in range(len(members))])
    _equal(ensemble.map(xs), torch.stack([member(own) for member, own in zip(members, xs, strict=True)]), "map")
    found = ensemble(x)
    _equal(found, torch.stack([member(x) for member in members]))
    found.square().sum().backward()
    for index, (member, alone) in enumerate(zip(members, ensemble.unstack(), strict=True)):
        assert list(alone.adapter) == list(member.adapter), f"member {index} has other tensors than it came with"
        for name, want in _gradients(member, x):
            got = ensemble.adapter[name].grad[index]
            _equal(got[tuple(slice(n) for n in want.shape)], want, f"gradient of {name} of member {index}")
            assert got.count_nonzero() <= want.numel(), f"the padding of {name} of member {index} has a gradient"
        for name, tensor in member.adapter.items():
            assert torch.equal(alone.adapter[name], tensor), f"{name} of member {index} came out changed"


def _wider(case: Case, more: int) -> AdaptedModel | None:
    """A member of larger rank, for a method that says where its rank is."""
    part = case.start.adapted_parameters[0]
    if not part.method.rank_axes({local: case.start.adapter[full] for local, full in part.names.items()}):
        return None
    wide = Case(case.method.replace(rank=getattr(case.method, "rank", 0) + more), case.host)
    if [part.names for part in wide.start.adapted_parameters] != [part.names for part in case.start.adapted_parameters]:
        return None  # a factor that is not decomposed at that rank
    return adapt(case.model, wide.rules).with_adapter(wide.random(5))


def _gradients(adapted: AdaptedModel, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    names, parameters = zip(*adapted.named_trainable_parameters(), strict=True)
    loss = adapted(x).square().sum()
    yield from zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True), strict=True)


def _equal(found: Tensor, wanted: Tensor, what: str = "output") -> None:
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    off = (found - wanted).abs().max().item() if found.numel() else 0.0
    size = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
    assert off <= TOLERANCE * size, f"{what} is off by {off:.1e}, where sizes go up to {size:.1e}"
