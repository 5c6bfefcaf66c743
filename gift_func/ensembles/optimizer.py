"""One optimizer for the members of an ensemble, each with hyper-parameters of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from ..errors import AdaptError, StateError
from .ensemble import Ensemble
from .member_blocks import Rows, Views

# Each number's update depends on that number's gradients only, so a member's tensors may be seen as one row.
ELEMENT_WISE = frozenset({SGD, ASGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop})
Kind = Callable[..., Optimizer]


def per_member(kind: Kind, ensemble: Ensemble, /, **settings: Any) -> PerMember:
    """An optimizer of an ensemble whose hyper-parameters may differ by member, equal to one optimizer for each.

    `θ_i ← kind(θ_i, g_i; settings_i)` for i = 1 ... N: the class is torch's own or anybody's, and runs on each member's
    tensors as it would on a model's. Member i is `optimizer.param_groups[i]`, so learning-rate schedulers work, `LambdaLR`
    with a list of N functions by member. What fills up a smaller rank has no part in it.

    Args:
        kind: an optimizer class, such as `torch.optim.AdamW`, or a function that makes one from a list of parameters.
        ensemble: whose trainable parameters are trained.
        settings: the optimizer's arguments. A list, a range or a tensor of one dimension has one value for each of the N
            members; anything else (a tuple of betas too) is shared.

    Returns:
        The optimizer.

    Raises:
        AdaptError: if a list has another length than N, or nothing is trainable.
        TypeError, ValueError: the optimizer's own, for an argument that it does not know or take.

    Example:
        >>> import torch, gift_func as gf
        >>> ens = gf.adapt_ensemble(torch.nn.Linear(4, 2), gf.LoRA(rank=1), 3)
        >>> optimizer = gf.optim.per_member(torch.optim.AdamW, ens, lr=[1e-3, 1e-2, 1e-1], weight_decay=0.01)
        >>> ens(torch.randn(5, 4)).square().mean((1, 2)).sum().backward()  # a sum: no member feels another's loss
        >>> optimizer.step()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.01, 0.1]
    """
    size = len(ensemble)
    each = {name: _spread(name, value, size) for name, value in settings.items()}
    return PerMember(kind, ensemble, [{name: values[i] for name, values in each.items()} for i in range(size)])


class PerMember(Optimizer):
    """N optimizers, one for each member of an ensemble, as one. `per_member` makes it.

    As in any optimizer, a parameter without a gradient is left out. `step(closure)` calls the closure once. An optimizer
    that evaluates it again and again (LBFGS) does so for one member after another; the closure then returns the members'
    losses, `(N,)`. A `GradScaler` that finds an infinite gradient leaves out the step for all members.

    Args:
        kind: an optimizer class.
        ensemble: the ensemble.
        settings: each member's arguments of the class.

    Attributes:
        ensemble: the ensemble that is trained.
    """

    def __init__(self, kind: Kind, ensemble: Ensemble, settings: Sequence[Mapping[str, Any]]) -> None:
        self.kind, self.ensemble = kind, ensemble
        self._settings = [dict(own) for own in settings]
        self._parameters = dict(ensemble.named_trainable_parameters())
        self._check()
        self._groups: list[dict[str, Any]] = []
        self._inner: list[Optimizer] = []
        rows = (kind.func if isinstance(kind, partial) else kind) in ELEMENT_WISE
        self._blocks: list[Rows | Views] = self._laid(self._alike()) if rows else self._viewed()
        inner = [kind(self._leaves(index), **own) for index, own in enumerate(self._settings)]
        if any(len(one.param_groups) != 1 for one in inner):
            raise AdaptError("per_member needs an optimizer of one parameter group, and this one makes several for a member")
        groups = [one.param_groups[0] for one in inner]
        # Such an optimizer may as well have all members as groups, which saves N - 1 calls of its step.
        self._inner = inner[:1] if rows else inner
        step = inspect.signature(type(inner[0]).step)
        self._repeats = step.parameters["closure"].default is inspect.Parameter.empty
        super().__init__([{"params": group["params"]} for group in groups], inner[0].defaults)
        self._share(self.state, groups)

    def _check(self) -> None:
        if not self._parameters:
            raise AdaptError("no parameter of the ensemble requires grad, so there is nothing for an optimizer to train")
        for name in self._parameters:
            if name in self.ensemble.layout.once:
                raise AdaptError(f"{name!r} is frozen and one for all members, so no member can train it. Freeze it again.")
        if any(own.get("differentiable") for own in self._settings):
            raise AdaptError("differentiable=True is not for stacked members; use torch.func with a functional optimizer")

    # --- layout

    def _alike(self) -> list[list[str]]:
        """The parameters' names by element type and device."""
        found: dict[Any, list[str]] = {}
        for name, parameter in self._parameters.items():
            found.setdefault((parameter.dtype, parameter.device), []).append(name)
        return list(found.values())

    def _laid(self, blocks: Iterable[Iterable[str]]) -> list[Rows | Views]:
        return [Rows({name: self._parameters[name] for name in names}) for names in blocks]

    def _viewed(self) -> list[Rows | Views]:
        members = self.ensemble.layout.members
        return [Views(name, p, [member.shapes.get(name) for member in members]) for name, p in self._parameters.items()]

    def _leaves(self, index: int) -> list[Tensor]:
        return [leaf for block in self._blocks if (leaf := block.leaves[index]) is not None]

    def _share(self, state: Any, groups: list[dict[str, Any]]) -> None:
        """Let the inner optimizers and this one have the same state and the same groups."""
        self.state, self._groups = state, groups
        if len(self._inner) == 1:
            self._inner[0].__setstate__({"state": state, "param_groups": groups})
        else:
            for inner, group in zip(self._inner, groups, strict=True):
                inner.__setstate__({"state": state, "param_groups": [group]})

    def _part(self, blocks: Sequence[Sequence[str]]) -> None:
        """Lay the rows out anew, in parts of what they are; the state goes along."""
        homes = {name: block for block in self._blocks if isinstance(block, Rows) for name in block.parameters}
        made = self._laid(blocks)
        for block in made:
            assert isinstance(block, Rows)
            home = homes[block.names[0]]
            spans = [home.spans[name] for name in block.names]
            columns = torch.cat([torch.arange(s.start, s.stop, device=block.leaves[0].device) for s in spans])
            for old, new in zip(home.leaves, block.leaves, strict=True):
                if old in self.state:
                    self.state[new] = {
                        key: value[columns] if isinstance(value, Tensor) and value.shape == old.shape else deepcopy(value)
                        for key, value in self.state[old].items()
                    }
        for group in self._groups:
            for leaf in group["params"]:
                self.state.pop(leaf, None)
        self._blocks = made
        for index, group in enumerate(self._groups):
            group["params"] = self._leaves(index)

    def _names(self) -> list[list[str]]:
        return [block.names for block in self._blocks]

    # --- as an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group for each member, with its leaves' gradients where the ensemble's are."""
        if self._groups:
            self._link()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    @torch.no_grad()
    def _link(self) -> None:
        parts: list[list[str]] = []
        for block in self._blocks:
            if isinstance(block, Rows):
                missing = block.without_gradient()
                parts.extend(part for part in ([n for n in block.parameters if n not in missing], missing) if part)
        if len(parts) > len(self._blocks):
            self._part(parts)
        for block in self._blocks:
            block.link()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every member.

        Args:
            closure: evaluates the ensemble again and returns a loss, in which backward was called.

        Returns:
            What the closure returned, or None.
        """
        if self._repeats:
            return self._one_by_one(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run(lambda: [inner.step() for inner in self._inner])
        return loss

    @torch.no_grad()
    def _run(self, steps: Callable[[], Any]) -> Any:
        self._load()
        made = steps()
        self._store()
        return made

    @torch.no_grad()
    def _load(self) -> None:
        self._link()
        for block in self._blocks:
            block.load()

    @torch.no_grad()
    def _store(self) -> None:
        for block in self._blocks:
            block.store()

    def _one_by_one(self, closure: Callable[[], Any] | None) -> Tensor:
        if closure is None:
            raise TypeError(f"{type(self._inner[0]).__name__} needs step(closure), which returns the members' losses")

        def of(index: int) -> Callable[[], Any]:
            def evaluate() -> Any:
                self._store()
                losses = torch.as_tensor(closure())
                if losses.shape != (len(self.ensemble),):
                    raise AdaptError(
                        f"{type(self._inner[0]).__name__} needs each member's own loss: let the closure return the "
                        f"{len(self.ensemble)} losses, not a tensor of shape {tuple(losses.shape)}"
                    )
                self._load()
                return losses[index].detach()

            return evaluate

        made = self._run(lambda: [inner.step(of(index)) for index, inner in enumerate(self._inner)])
        return torch.stack([torch.as_tensor(loss) for loss in made])

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the ensemble's parameters."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                # Never zeroed in place: a gradient that lies in rows would be accumulated into with a warning of torch's.
                parameter.grad = None if set_to_none else torch.zeros_like(parameter)
        if set_to_none:
            self._link()  # lets go of what the leaves held

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the groups are the ensemble's members."""
        if self._groups and len(self._groups) >= len(self.ensemble):
            raise AdaptError("the groups are the ensemble's members; make an ensemble of more members, and an optimizer of it")
        super().add_param_group(param_group)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer: state and groups, one group for each member."""
        return {**super().state_dict(), "blocks": self._names()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            StateError: if it is the state of an optimizer of other parameters.
            ValueError: if it has another number of members.
        """
        blocks, rows = state_dict.get("blocks"), isinstance(self._blocks[0], Rows)
        known = sorted(self._parameters)
        if blocks is None or sorted(name for names in blocks for name in names) != known:
            raise StateError("this is not the state of a per_member optimizer of such an ensemble: its parameters differ")
        if blocks != self._names() and not rows:
            raise StateError("this is the state of an optimizer of another class, which saw members in another way")
        if blocks != self._names():
            self._blocks = self._laid(blocks)
            self.state.clear()
            for index, group in enumerate(self._groups):
                group["params"] = self._leaves(index)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._share(state["state"], state["param_groups"])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a per_member optimizer is not copied or pickled, since it writes to its ensemble; use state_dict()")

    def select(self, members: Sequence[int]) -> tuple[Ensemble, PerMember]:
        """The ensemble of some of the members and its optimizer, which go on as if the others had never been.

        Args:
            members: their indices, at least one.

        Returns:
            Both new: the members' tensors and the optimizer's state are copied.

        Raises:
            IndexError: if there is no such member, or none was chosen.

        Example:
            >>> import torch, gift_func as gf
            >>> ens = gf.adapt_ensemble(torch.nn.Linear(4, 2), gf.LoRA(rank=1), 3)
            >>> optimizer = gf.optim.per_member(torch.optim.SGD, ens, lr=[0.1, 0.2, 0.3])
            >>> ens, optimizer = optimizer.select([0, 2])
            >>> len(ens), [group["lr"] for group in optimizer.param_groups]
            (2, [0.1, 0.3])
        """
        chosen = [self.ensemble.place_of(index) for index in members]
        made = PerMember(self.kind, self.ensemble[chosen], [self._settings[index] for index in chosen])
        if made._names() != self._names():
            made._part(self._names())
        for index, group in zip(chosen, made._groups, strict=True):
            source = self._groups[index]
            group.update({key: deepcopy(value) for key, value in source.items() if key != "params"})
            for old, new in zip(source["params"], group["params"], strict=True):
                if old in self.state:
                    made.state[new] = deepcopy(self.state[old])
        return made.ensemble, made


def _spread(name: str, value: Any, size: int) -> list[Any]:
    """An argument's value for each member."""
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return [value.detach().clone() for _ in range(size)]
        value = value.tolist()
    if not isinstance(value, (list, range)):
        return [value] * size
    if len(value) != size:
        raise AdaptError(
            f"{name} has {len(value)} values for an ensemble of {size} members: give one for each, or a single one for all"
        )
    return list(value)
