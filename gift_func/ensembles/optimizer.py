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
from .member_blocks import MemberVectors, MemberViews

# Each number's update depends on the gradients of that number only, so all of a member's numbers may be one vector.
ELEMENT_WISE = frozenset({SGD, ASGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop})
MakeOptimizer = Callable[..., Optimizer]


def per_member(kind: MakeOptimizer, ensemble: Ensemble, /, **settings: Any) -> PerMember:
    """An optimizer of an ensemble whose hyper-parameters may differ by member; it equals one optimizer for each member.

    `θ_i ← kind(θ_i, g_i; settings_i)` for i = 1 ... N, with any optimizer class, on the tensors that each member has as a
    model. Member i is `optimizer.param_groups[i]`, so learning-rate schedulers work, such as `LambdaLR` with a list of N
    functions. The zeros with which a smaller rank is padded are left out.

    Args:
        kind: an optimizer class, such as `torch.optim.AdamW`, or a function that makes an optimizer from a list of parameters.
        ensemble: the ensemble whose trainable parameters are trained.
        settings: the optimizer's arguments. A list, a range or a 1-D tensor has one value for each of the N members; any
            other value (such as a tuple of betas) is shared.

    Returns:
        The optimizer.

    Raises:
        AdaptError: if a list has another length than N, or nothing is trainable.
        TypeError, ValueError: by the optimizer, for an argument that it does not accept.

    Example:
        >>> import torch, gift_func as gf
        >>> ens = gf.adapt_ensemble(torch.nn.Linear(4, 2), gf.LoRA(rank=1), 3)
        >>> optimizer = gf.optim.per_member(torch.optim.AdamW, ens, lr=[1e-3, 1e-2, 1e-1], weight_decay=0.01)
        >>> ens(torch.randn(5, 4)).square().mean((1, 2)).sum().backward()  # the gradients of a sum are those of each loss
        >>> optimizer.step()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.01, 0.1]
    """
    size = len(ensemble)
    each = {name: _spread(name, value, size) for name, value in settings.items()}
    return PerMember(kind, ensemble, [{name: values[i] for name, values in each.items()} for i in range(size)])


class PerMember(Optimizer):
    """One optimizer for each member of an ensemble, as a single optimizer. `per_member` makes it.

    As in any optimizer, a parameter without a gradient is skipped. `step(closure)` calls the closure once. An optimizer that
    evaluates it repeatedly (LBFGS) does so for one member after another; the closure then returns the members' losses,
    `(N,)`. A `GradScaler` that finds an infinite gradient skips the step for all members.

    Args:
        kind: an optimizer class, or a function that makes one.
        ensemble: the ensemble.
        settings: the arguments of `kind` for each member.

    Attributes:
        ensemble: the ensemble that is trained.
    """

    def __init__(self, kind: MakeOptimizer, ensemble: Ensemble, settings: Sequence[Mapping[str, Any]]) -> None:
        self.kind, self.ensemble = kind, ensemble
        self._settings = [dict(own) for own in settings]
        self._parameters = dict(ensemble.named_trainable_parameters())
        if not self._parameters:
            raise AdaptError("no parameter of the ensemble requires grad, so there is nothing for an optimizer to train")
        for name in self._parameters.keys() & ensemble.layout.once:
            raise AdaptError(f"{name!r} is frozen and one for all members, so no member can train it. Freeze it again.")
        if any(own.get("differentiable") for own in self._settings):
            raise AdaptError("differentiable=True is not for stacked members; use torch.func with a functional optimizer")
        self._groups: list[dict[str, Any]] = []
        element_wise = (kind.func if isinstance(kind, partial) else kind) in ELEMENT_WISE
        self._blocks = self._vectors() if element_wise else self._views()
        inner = [kind(self._leaves(index), **own) for index, own in enumerate(self._settings)]
        if any(len(one.param_groups) != 1 for one in inner):
            raise AdaptError("per_member needs an optimizer of one parameter group, and this one makes several for a member")
        groups = [one.param_groups[0] for one in inner]
        # One element-wise optimizer with all members as groups does the same in one call of its step.
        self._inner = inner[:1] if element_wise else inner
        step = inspect.signature(type(inner[0]).step)
        self._repeats = step.parameters["closure"].default is inspect.Parameter.empty
        super().__init__([{"params": group["params"]} for group in groups], inner[0].defaults)
        self._share(self.state, groups)

    # --- layout

    def _vectors(self, blocks: Iterable[Iterable[str]] | None = None) -> list[MemberVectors | MemberViews]:
        """Blocks of the parameters of these names; by default one block for each dtype and device."""
        if blocks is None:
            alike: dict[Any, list[str]] = {}
            for name, parameter in self._parameters.items():
                alike.setdefault((parameter.dtype, parameter.device), []).append(name)
            blocks = alike.values()
        return [MemberVectors({name: self._parameters[name] for name in names}) for names in blocks]

    def _views(self) -> list[MemberVectors | MemberViews]:
        members = self.ensemble.layout.members
        return [MemberViews(name, p, [member.shapes.get(name) for member in members]) for name, p in self._parameters.items()]

    def _leaves(self, index: int) -> list[Tensor]:
        return [leaf for block in self._blocks if (leaf := block.leaves[index]) is not None]

    def _share(self, state: Any, groups: list[dict[str, Any]]) -> None:
        """Make the inner optimizers and this one share state and groups."""
        self.state, self._groups = state, groups
        if len(self._inner) == 1:
            self._inner[0].__setstate__({"state": state, "param_groups": groups})
        else:
            for inner, group in zip(self._inner, groups, strict=True):
                inner.__setstate__({"state": state, "param_groups": [group]})

    def _split(self, blocks: Sequence[Sequence[str]]) -> None:
        """Split the vectors, and the state with them."""
        old_blocks = {name: block for block in self._blocks if isinstance(block, MemberVectors) for name in block.parameters}
        made = self._vectors(blocks)
        for block in made:
            assert isinstance(block, MemberVectors)
            old_block = old_blocks[block.names[0]]
            spans = [old_block.spans[name] for name in block.names]
            indices = torch.cat([torch.arange(s.start, s.stop, device=block.leaves[0].device) for s in spans])
            for old, new in zip(old_block.leaves, block.leaves, strict=True):
                if old in self.state:
                    self.state[new] = {
                        key: value[indices] if isinstance(value, Tensor) and value.shape == old.shape else deepcopy(value)
                        for key, value in self.state[old].items()
                    }
        for group in self._groups:
            for leaf in group["params"]:
                self.state.pop(leaf, None)
        self._set_blocks(made)

    def _set_blocks(self, blocks: list[MemberVectors | MemberViews]) -> None:
        self._blocks = blocks
        for index, group in enumerate(self._groups):
            group["params"] = self._leaves(index)

    def _names(self) -> list[list[str]]:
        return [block.names for block in self._blocks]

    # --- as an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group for each member, whose gradients are views of the ensemble's."""
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
            if isinstance(block, MemberVectors):
                missing = block.without_gradient()
                parts.extend(part for part in ([n for n in block.parameters if n not in missing], missing) if part)
        if len(parts) > len(self._blocks):
            self._split(parts)
        for block in self._blocks:
            block.link()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every member.

        Args:
            closure: evaluates the ensemble, calls `backward`, and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if self._repeats:
            if closure is None:
                raise TypeError(f"{type(self._inner[0]).__name__} needs step(closure), which returns the members' losses")
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._load()
            arguments = [(partial(self._loss_of, i, closure),) if self._repeats else () for i in range(len(self._inner))]
            losses = [inner.step(*given) for inner, given in zip(self._inner, arguments, strict=True)]
            self._store()
        return torch.stack([torch.as_tensor(one) for one in losses]) if self._repeats else loss

    @torch.no_grad()
    def _load(self) -> None:
        self._link()
        for block in self._blocks:
            block.load()

    @torch.no_grad()
    def _store(self) -> None:
        for block in self._blocks:
            block.store()

    def _loss_of(self, index: int, closure: Any) -> Any:
        """Evaluate the closure at the leaves' present values, and return one member's loss."""
        self._store()
        losses = torch.as_tensor(closure())
        if losses.shape != (len(self.ensemble),):
            raise AdaptError(
                f"{type(self._inner[0]).__name__} needs each member's own loss: let the closure return the "
                f"{len(self.ensemble)} losses, not a tensor of shape {tuple(losses.shape)}"
            )
        self._load()
        return losses[index].detach()

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the ensemble's parameters."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                # Not zeroed in place: torch warns when it accumulates into a gradient that is a view of the vectors.
                parameter.grad = None if set_to_none else torch.zeros_like(parameter)
        if set_to_none:
            self._link()  # sets the gradients of the leaves to None too

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises `AdaptError`, since the groups are the ensemble's members."""
        if self._groups and len(self._groups) >= len(self.ensemble):
            raise AdaptError("the groups are the ensemble's members; make an ensemble of more members, and an optimizer of it")
        super().add_param_group(param_group)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """State and groups as in any optimizer, with one group for each member."""
        return {**super().state_dict(), "blocks": self._names()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned.

        Raises:
            StateError: if it is the state of an optimizer of other parameters.
            ValueError: if it has another number of members.
        """
        blocks = state_dict.get("blocks")
        known = sorted(self._parameters)
        if blocks is None or sorted(name for names in blocks for name in names) != known:
            raise StateError("this is not the state of a per_member optimizer of such an ensemble: its parameters differ")
        if blocks != self._names():
            if isinstance(self._blocks[0], MemberViews):
                raise StateError("this is the state of an optimizer of another class, which saw members in another way")
            self.state.clear()
            self._set_blocks(self._vectors(blocks))
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._share(state["state"], state["param_groups"])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a per_member optimizer is not copied or pickled, since it writes to its ensemble; use state_dict()")

    def select(self, members: Sequence[int]) -> tuple[Ensemble, PerMember]:
        """An ensemble of some of the members and its optimizer, in the same state.

        Args:
            members: their indices, at least one.

        Returns:
            The new ensemble and the new optimizer; tensors and state are copied.

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
        chosen = [self.ensemble.index_of(index) for index in members]
        made = PerMember(self.kind, self.ensemble[chosen], [self._settings[index] for index in chosen])
        if made._names() != self._names():
            made._split(self._names())
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
