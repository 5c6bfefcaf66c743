"""The laws: functions that test a method on a host."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from ..network.module_tree import NamedTensors
from .hosts import HOSTS, Around, Host

TOLERANCE = 1e-10


class Case:
    """A method on a host, with random values of the adapter's tensors."""

    def __init__(self, method: Method, host: Host, dtype: torch.dtype = torch.float64) -> None:
        self.method = method
        self.host = host
        self.model, self.x = host.make(dtype)
        self.rules = {f"inner.{host.parameter}": method}
        self.start = adapt(self.model, self.rules, generator=torch.Generator().manual_seed(1))
        self.states = [self.random(seed) for seed in range(2)]
        self.adapted = self.start.with_adapter(self.states[0])

    def random(self, seed: int) -> dict[str, Tensor]:
        """The initial tensors, with noise added to the trained ones."""
        generator = torch.Generator().manual_seed(seed + 2)
        state = self.start.adapter_state_dict()
        for name, parameter in self.start.named_trainable_parameters():
            noise = torch.empty(parameter.shape, dtype=torch.float64).normal_(std=0.3, generator=generator)
            state[name] = parameter.detach() + noise.to(parameter)
        return state

    def trained(self, state: NamedTensors) -> dict[str, Tensor]:
        """The state's trained tensors."""
        return {name: state[name] for name, _ in self.start.named_trainable_parameters()}

    def run(self, params: NamedTensors, x: Tensor | None = None) -> Tensor:
        """The adapted host as a function of its trained tensors."""
        out: Tensor = functional_call(self.adapted, params, (self.x if x is None else x,))
        return out

    def loss(self, params: NamedTensors, x: Tensor | None = None) -> Tensor:
        """A scalar to differentiate."""
        return self.run(params, x).square().sum()

    def dense(self, params: NamedTensors) -> Tensor:
        """The output of the host with the dense weight as its parameter, for reference."""
        tensors = {**self.adapted.adapter, **params}
        placed = {name: weight.dense() for name, weight in self.adapted.structured_weights(tensors).items()}
        out: Tensor = torch.func.functional_call(copy.deepcopy(self.model), placed, (self.x,))
        return out


Law = Callable[[Case], None]


def starts_as_base(case: Case) -> None:
    """A method with `starts_as_base` does not change the output at first."""
    if case.method.starts_as_base:
        _equal(case.start(case.x), case.model(case.x))


def rule_is_dense(case: Case) -> None:
    """The structured weight gives the outputs and gradients of the dense weight."""
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
    """Every trained tensor of the adapter gets a gradient from `backward`, and the base gets none."""
    case.adapted(case.x).square().sum().backward()
    for name, parameter in case.adapted.named_trainable_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
    assert all(parameter.grad is None for parameter in case.model.parameters()), "the base got a gradient"


def training_is_followed(case: Case) -> None:
    """The call after an optimizer's step uses the new values."""
    adapted = case.adapted
    adapted(case.x).square().sum().backward()
    torch.optim.SGD(adapted.trainable_parameters(), lr=0.05).step()
    _equal(adapted(case.x), case.dense(dict(adapted.adapter.items())))


def vmap_is_loop(case: Case) -> None:
    """`vmap` over several adapters gives the outputs of each."""
    states = [case.trained(state) for state in case.states]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    _equal(torch.func.vmap(case.run)(stacked), torch.stack([case.run(state) for state in states]))


def stacked_is_separate(case: Case) -> None:
    """Members of an ensemble have the outputs and gradients of separate models, and their tensors stay the same."""
    members = [case.start.with_adapter(case.random(seed)) for seed in range(3)]
    _same_as_members(stack(members), members, case.x)
    wider = _wider(case, 2)
    if wider is not None:
        _same_as_members(stack([*members[:2], wider]), [*members[:2], wider], case.x)


def per_sample_gradients_are_loop(case: Case) -> None:
    """`vmap(grad)` gives the gradient of each sample."""
    params = case.trained(case.states[0])
    found = torch.func.vmap(torch.func.grad(case.loss), (None, 0))(params, case.x.unsqueeze(1))
    singles = [torch.func.grad(case.loss)(params, sample.unsqueeze(0)) for sample in case.x]
    for name, got in found.items():
        _equal(got, torch.stack([single[name] for single in singles]), name)


def forward_mode_is_reverse_mode(case: Case) -> None:
    """`jvp` gives the product of the gradient with the direction."""
    params = case.trained(case.states[0])
    direction = case.trained(case.states[1])
    forward = torch.func.jvp(case.loss, (params,), (direction,))[1]
    gradient = torch.func.grad(case.loss)(params)
    _equal(forward, sum((gradient[name] * direction[name]).sum() for name in params))


def base_is_untouched(case: Case) -> None:
    """Nothing that is done with the adapted model changes the user's model."""
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
    """The merged module has no class of this package and gives the same outputs."""
    merged = case.adapted.merge()
    assert not any(type(p) not in (nn.Parameter, Tensor) for p in merged.parameters())
    _equal(merged(case.x), case.adapted(case.x))


def copies_are_equal(case: Case) -> None:
    """Copies by `deepcopy` and by state dict give the same outputs; the method is equal after `pickle` and `to_dict`."""
    wanted = case.adapted(case.x)
    assert torch.equal(copy.deepcopy(case.adapted)(case.x), wanted)
    assert torch.equal(case.start.with_adapter(case.adapted.adapter_state_dict())(case.x), wanted)
    again = pickle.loads(pickle.dumps(case.method))
    assert again == case.method
    assert hash(again) == hash(case.method)
    assert Method.from_dict(case.method.to_dict()) == case.method


def loaded_is_saved(case: Case) -> None:
    """The model that is loaded from a native file gives the same outputs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(case.adapted, path)
        assert torch.equal(load_adapter(case.model, path)(case.x), case.adapted(case.x))


def checkpoints_are_exact(case: Case) -> None:
    """Gradient checkpointing does not change the gradients."""
    call = case.model.call
    checkpointed = Around(case.model.inner, lambda module, x: checkpoint(call, module, x, use_reentrant=False))
    adapted = adapt(checkpointed, case.rules).with_adapter(case.adapted.adapter_state_dict())
    for (name, got), (_, want) in zip(_gradients(adapted, case.x), _gradients(case.adapted, case.x), strict=True):
        _equal(got, want, name)


def one_compile_for_all(case: Case) -> None:
    """The model compiles to one graph with the same outputs, which serves other adapters of the same shapes too."""
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
    """Outputs and merged weights have the dtype of the network."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(method, host, dtype)
        assert case.adapted(case.x).dtype == dtype
        assert all(parameter.dtype == dtype for parameter in case.adapted.merge().parameters())


def check(method: Method, hosts: Iterable[str] | None = None, laws: Iterable[str] | None = None) -> None:
    """Test a method by the laws on every host that it can adapt.

    Args:
        method: the method.
        hosts: names in `HOSTS`; all by default.
        laws: names in `LAWS`; all by default.

    Raises:
        AssertionError: for the first law that does not hold, with the law, the host and the method.
        AdaptError: if the method adapts none of the hosts.

    Example:
        >>> import gift_func as gf
        >>> from gift_func import testing
        >>> testing.check(gf.LoRA(rank=2), hosts=["linear"], laws=["starts_as_base", "rule_is_dense"])
    """
    given = list(HOSTS if hosts is None else hosts)
    adapted = [name for name in given if not refuses(method, name)]
    for name in adapted:
        for law in LAWS if laws is None else laws:
            try:
                LAWS[law](Case(method, HOSTS[name]))
            except AssertionError as error:
                raise AssertionError(f"{method} on {name!r} breaks {law}: {LAWS[law].__doc__} {error}") from error
        if laws is None:
            element_type_is_kept(method, HOSTS[name])
    if not adapted:
        raise AdaptError(f"{method} adapts none of the hosts {', '.join(given)}")


def refuses(method: Method, host: str) -> bool:
    """Whether the method raises `AdaptError` for the host; the message must name the parameter.

    Args:
        method: the method.
        host: a name in `HOSTS`.
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
    """A member of larger rank, if the method has rank axes."""
    parameter = case.start.adapted_parameters[0]
    if not parameter.method.rank_axes({local: case.start.adapter[full] for local, full in parameter.names.items()}):
        return None
    wide = Case(case.method.replace(rank=getattr(case.method, "rank", 0) + more), case.host)
    if [one.names for one in wide.start.adapted_parameters] != [one.names for one in case.start.adapted_parameters]:
        return None  # the method has other factors at that rank
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
