"""The bank: named adapters on one frozen base, and one pass for a batch whose samples have different adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..adapt import base_of, new_adapter
from ..adapted_model import AdaptedModel
from ..adapter import Adapter
from ..adapter_dict import AdapterModule, NameSpace
from ..errors import AdaptError, nearest
from ..methods import Method
from ..network.base_view import BaseView
from ..network.frozen_base import FrozenBase
from ..network.module_tree import Modes, clone
from ..printing import table
from ..strategy import Strategy
from .compiled import CompiledBank
from .contiguous import lay_side_by_side, side_by_side
from .mixed_batch import MixedBatchRunner
from .plan import Batch, batch_by_address
from .samples import numbers_of

Names = Sequence[str | None]


class AdapterBank(AdapterModule, Mapping[str, AdaptedModel]):
    """Named adapters on one frozen base: an ordinary module whose parameters are exactly the adapters'.

    `bank(x, adapters=["fr", None, "de"])` runs every sample with its own adapter in one pass, forward and backward; methods
    and ranks may differ. All samples are multiplied by each frozen weight in one product. `bank["fr"]` is the adapter as a
    model, with the same tensors: training one trains the other. The adapters of a bank never change: `add`, `remove` and
    `rename` return another bank, which shares tensors with this one. All else is as in any module and acts in place:
    `train()`, `eval()`, `to()`, `load_state_dict()`, `requires_grad_()`.

    The batch is the leading axis of the network's tensor arguments. It is tracked through the network, which may flatten,
    transpose or gather it (GPT-2, attention, mixtures of experts). If the samples cannot be told apart at an adapted weight,
    an error is raised. Samples are sorted by adapter once in a call. If adapters cannot share a pass (they have modules or
    statistics of their own; BatchNorm in training; checkpointing), there is one pass for each, with the same results.

    The result for a sample does not depend on the values of other samples or adapters, not even within rounding, and its
    gradients with respect to them are exactly zero. It may depend, within rounding, on which adapters a batch has and on
    how many samples, which decide the sizes of products, and on whether the call is the first of its kind, which is
    tracked. Threads may use a bank at once. Adapters of one shape share memory, so autograd raises an error if an optimizer
    steps on one during the backward of another; use several banks for that.

    Args:
        adapters: names and adapted models of one base; their tensors are copied into stacks.
        base: the base of a bank without adapters: a model, or a frozen base.

    Raises:
        AdaptError: if the models have different bases, or a name is empty.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Linear(4, 2)
        >>> bank = gf.AdapterBank({"fr": gf.adapt(model, gf.LoRA(rank=1)), "de": gf.adapt(model, gf.IA3())})
        >>> bank(torch.randn(3, 4), adapters=["de", None, "fr"]).shape
        torch.Size([3, 2])
        >>> list(bank.rename("fr", "french").remove("de"))
        ['french']
    """

    adapters: nn.Module

    def __init__(
        self, adapters: Mapping[str, AdaptedModel] | None = None, *, base: nn.Module | FrozenBase | None = None
    ) -> None:
        given = dict(adapters or {})
        for name, model in given.items():
            _check(name, model)
        first = next(iter(given.values()), None)
        if base is not None:
            frozen = base_of(base)
        elif first is not None:
            frozen = first.frozen_base
        else:
            raise AdaptError("a bank without adapters needs to know its base: AdapterBank(base=model)")
        modes = frozen.tree.modes() if first is None else first.copy_pool.current_modes()
        for name, model in given.items():
            _check_base(name, frozen, model.frozen_base)
        values = side_by_side([model.to_adapter() for model in given.values()], frozen)
        self._set_up(dict(zip(given, values, strict=True)), MixedBatchRunner(frozen, modes))

    @classmethod
    def of(cls, adapters: Mapping[str, Adapter], base: FrozenBase, modes: Modes | bool = True) -> Self:
        """A bank of adapters on one frozen base, which shares their tensors.

        Args:
            adapters: the adapters by name, as `side_by_side` returns them.
            base: the base of all of them.
            modes: the modules in training mode, or one mode for all.
        """
        return object.__new__(cls)._set_up(adapters, MixedBatchRunner(base, modes))

    def _set_up(self, adapters: Mapping[str, Adapter], runner: MixedBatchRunner) -> Self:
        super().__init__()
        return self._replace(adapters, runner)

    def _replace(self, adapters: Mapping[str, Adapter], runner: MixedBatchRunner) -> Self:
        self._runner = runner
        self._compiled: CompiledBank | None = None
        self.training = runner.training
        self.adapters = NameSpace()
        self._adapters = dict(adapters)
        self.adapters._modules = {name: adapter.module for name, adapter in self._adapters.items()}
        return self

    # --- as a mapping

    def __getitem__(self, name: str) -> AdaptedModel:
        """One adapter as a model, with the bank's own tensors.

        Raises:
            KeyError: with the nearest names.
        """
        return self._runner.model(self._adapter(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        head = f"AdapterBank of {len(self)} on {type(self.frozen_base.tree.module).__name__}"
        adapters = self._adapters.items()
        return "\n".join([head, *(f"  {name!r}: {_methods(one)} at {len(one.parameters)} places" for name, one in adapters)])

    # --- other banks

    def add(self, name: str, adapter: Any, *, generator: torch.Generator | None = None) -> AdapterBank:
        """A bank with one adapter more, which shares the tensors of the others.

        Args:
            name: the new adapter's name.
            adapter: an adapted model, whose tensors are copied; or a strategy, as for `adapt`, for a new adapter of the
                bank's base, for which the network is not copied.
            generator: the generator of a new adapter's initial values; None for torch's global generator.

        Raises:
            AdaptError: if the name is taken, the adapter has another base, or the strategy does not fit.
        """
        _check_name(name)
        if name in self._adapters:
            raise AdaptError(f"the bank has an adapter {name!r} already; remove it first, or give this one another name")
        if isinstance(adapter, (Method, Strategy, Iterable)) and not isinstance(adapter, (nn.Module, str)):
            new = new_adapter(self.frozen_base, adapter, generator)
        else:
            _check(name, adapter)
            _check_base(name, self.frozen_base, adapter.frozen_base)
            new = side_by_side([adapter.to_adapter()], self.frozen_base)[0]
        return self._like({**self._adapters, name: new})

    def remove(self, name: str) -> AdapterBank:
        """A bank without one of the adapters, which shares the tensors of the others.

        Raises:
            KeyError: with the nearest names.
        """
        self._adapter(name)
        return self._like({key: adapter for key, adapter in self._adapters.items() if key != name})

    def rename(self, name: str, new_name: str) -> AdapterBank:
        """A bank in which an adapter has another name; the order stays the same.

        Raises:
            KeyError: with the nearest names.
            AdaptError: if the new name is taken or empty.
        """
        self._adapter(name)
        _check_name(new_name)
        if new_name in self._adapters and new_name != name:
            raise AdaptError(f"the bank has an adapter {new_name!r} already")
        return self._like({new_name if key == name else key: adapter for key, adapter in self._adapters.items()})

    # --- calls

    def forward(self, *args: Any, adapters: Names | Tensor, **kwargs: Any) -> Any:
        """The network on a batch, every sample with its own adapter.

        Args:
            args: the network's arguments; tensors have the samples as leading axis.
            adapters: for each sample an adapter's name, or None for the base alone; or their indices in the order of the
                bank, int64 `(batch,)`, -1 for the base alone.
            kwargs: the network's keyword arguments.

        Returns:
            The network's output, with the samples in the order given.

        Raises:
            KeyError: for an unknown name, with the nearest.
            AdaptError: if there are not as many names as samples, or the samples cannot be told apart at a weight.
        """
        if torch.compiler.is_compiling():
            if self._compiled is None:
                raise AdaptError(
                    "a bank is made ready for torch.compile by bank.prepare(), once, outside of the compiled function"
                )
            if not isinstance(adapters, Tensor):
                raise AdaptError(
                    "under torch.compile adapters is an index tensor, int64 of shape (batch,), -1 for the base alone"
                )
            return self._compiled(adapters, args, kwargs)
        return self._runner.run(self._batch(adapters), args, kwargs)

    def generate(self, *args: Any, adapters: Names | Tensor, **kwargs: Any) -> Any:
        """`generate` of a transformers model, with its key-value cache, on a batch in which every sample has its own adapter.

        Args:
            args: the arguments of the model's `generate`; tensors have the samples as leading axis.
            adapters: as for a call.
            kwargs: the keyword arguments of the model's `generate`.

        Raises:
            AttributeError: if the model has no `generate`.
        """
        return self._runner.run(self._batch(adapters), args, kwargs, method="generate")

    def prepare(self) -> AdapterBank:
        """Prepare the bank for `torch.compile`, and return it: a call in a compiled function is then one graph.

        There `adapters` is an index tensor, and one graph serves all of its values, which are not checked. Every sample runs
        as a batch of one under `torch.vmap`, with its adapter's tensors taken from stacks. So `gf.stack` must accept the
        adapters (ranks, scales and adapted parameters may differ), and torch must have batching rules for the network: no
        RNN, no mixture of experts that sorts its tokens. Dynamo may warn that tensors are not leaves: these are the stacks,
        and the parameters get their gradients.

        Raises:
            AdaptError: if the adapters cannot share a stack; it names the parameter and what differs.

        Example:
            >>> import torch, gift_func as gf
            >>> model = torch.nn.Linear(4, 2)
            >>> bank = gf.AdapterBank({f"r{rank}": gf.adapt(model, gf.LoRA(rank=rank)) for rank in (1, 2)}).prepare()
            >>> step = torch.compile(lambda x, index: bank(x, adapters=index), fullgraph=True)
            >>> bank(torch.randn(3, 4), adapters=torch.tensor([1, -1, 0])).shape  # or step(x, index)
            torch.Size([3, 2])
        """
        if not self._adapters:
            raise AdaptError("a bank without adapters has nothing to choose from by index; compile its base")
        for name, adapter in self._adapters.items():
            if adapter.why_apart:
                raise AdaptError(
                    f"under torch.compile the adapters of a bank share a stack, and {name!r} cannot: {adapter.why_apart}"
                )
        self._compiled = self._runner.compiled([self._runner.model(adapter) for adapter in self._adapters.values()])
        return self

    @property
    def base(self) -> BaseView:
        """The frozen base, without an adapter."""
        return self._runner.view

    @property
    def frozen_base(self) -> FrozenBase:
        """The frozen base, as `adapt` takes it for further adapters."""
        return self._runner.base

    def summary(self) -> str:
        """A table of the adapters: their methods, how many parameters each adapts and trains, and the whole."""
        rows = [("adapter", "methods", "places", "trained")]
        for name, adapter in self._adapters.items():
            trained = sum(tensor.numel() for tensor in adapter.tensors.values() if tensor.requires_grad)
            rows.append((name, _methods(adapter), str(len(adapter.parameters)), f"{trained:,}"))
        return table(rows)

    # --- as a module

    def train(self, mode: bool = True) -> Self:
        """Set training mode for all adapters; the user's model is not touched."""
        super().train(mode)
        runner = self._runner.in_mode(mode)
        if runner is not self._runner:
            self._runner = runner
            self._compiled = None
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        base = self.frozen_base.apply(fn)
        lay_side_by_side(list(self._adapters.values()))
        moved = {name: adapter.replace_tensors(adapter.tensors, base) for name, adapter in self._adapters.items()}
        return self._replace(moved, self._runner if base is self.frozen_base else MixedBatchRunner(base, self._runner.modes))

    # --- inside

    def _named_tensors(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{inner}": tensor
            for name, adapter in self._adapters.items()
            for inner, tensor in adapter.tensors.items()
            if isinstance(tensor, nn.Parameter)
        }

    def _saved_buffers(self) -> dict[str, Tensor]:
        return {
            f"{name}.{inner}": buffer for name, adapter in self._adapters.items() for inner, buffer in adapter.buffers.items()
        }

    def _base_buffers(self) -> dict[str, Tensor]:
        return {}  # an adapter has only buffers that differ from the base's

    def _like(self, adapters: Mapping[str, Adapter]) -> AdapterBank:
        return object.__new__(type(self))._set_up(adapters, self._runner)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterBank:
        copied = side_by_side(list(self._adapters.values()))
        for ours, theirs in zip(self._adapters.values(), copied, strict=True):
            for name, tensor in ours.tensors.items():
                theirs.tensors[name].grad = None if tensor.grad is None else clone(tensor.grad)
                memo[id(tensor)] = theirs.tensors[name]
        made = memo[id(self)] = self._like(dict(zip(self._adapters, copied, strict=True)))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        adapters = {name: adapter.copy() for name, adapter in self._adapters.items()}  # not views of the stacks of all
        return type(self)._unpickled, (adapters, self.frozen_base, self._runner.modes)

    @classmethod
    def _unpickled(cls, adapters: Mapping[str, Adapter], base: FrozenBase, modes: Modes) -> Self:
        return cls.of(dict(zip(adapters, side_by_side(list(adapters.values()), base), strict=True)), base, modes)

    def _adapter(self, name: str) -> Adapter:
        found = self._adapters.get(name)
        if found is None:
            raise KeyError(f"the bank has no adapter {name!r}; {nearest(str(name), self._adapters)}")
        return found

    def _batch(self, adapters: Names | Tensor) -> Batch:
        if isinstance(adapters, str):
            raise TypeError(f"adapters is a sequence with one name for each sample, got the text {adapters!r}")
        if not isinstance(adapters, Tensor):
            return batch_by_address([None if name is None else self._adapter(name) for name in adapters])
        known, indices = list(self._adapters.values()), numbers_of(adapters, "adapters")
        for index in indices:
            if not -1 <= index < len(known):
                raise AdaptError(f"there is no adapter {index} in a bank of {len(known)}; -1 is the base alone")
        return batch_by_address([None if index < 0 else known[index] for index in indices])


def _methods(adapter: Adapter) -> str:
    return ", ".join(dict.fromkeys(str(parameter.method) for parameter in adapter.parameters))


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise AdaptError(f"an adapter's name is a text that is not empty, got {name!r}")


def _check(name: object, model: object) -> None:
    _check_name(name)
    if not isinstance(model, AdaptedModel):
        raise TypeError(f"a bank holds adapted models, and {name!r} is a {type(model).__name__}; adapt() makes one")


def _check_base(name: str, base: FrozenBase, other: FrozenBase) -> None:
    if not base.shares_tensors_with(other):
        raise AdaptError(
            f"{name!r} was adapted from another model than the bank's base. Adapt the same model, whose tensors "
            "are then shared."
        )
