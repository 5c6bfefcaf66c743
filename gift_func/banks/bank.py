"""The bank: many named adapters on one base, and one pass for a batch whose samples use different ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import base_of
from ..adapted_model import AdaptedModel
from ..errors import AdaptError, nearest
from ..methods import Method
from ..network.frozen_base import BaseView, FrozenBase
from ..network.modes import Modes, modes_in, modes_of
from ..network.module_tree import clone
from ..strategy import Strategy
from .compiled import CompiledBank
from .entry import Adapter, side_by_side
from .fresh import fresh
from .keeping import Conversion, Kept
from .mixed_batch import MixedBatchRunner
from .plan import Batch, arrange
from .samples import numbers_of

Names = Sequence[str | None]


class AdapterBank(Mapping[str, AdaptedModel]):
    """An immutable mapping from names to adapters on one frozen base.

    `bank(x, adapters=["fr", None, "de"])` runs every sample with its own adapter in one pass, of any methods and ranks,
    and trains as well as infers: the frozen weights meet all samples in one product each. `bank["fr"]` is the adapter as
    a model of its own; it holds the bank's very tensors, so what is trained by one is seen by the other.

    The batch is the leading axis of the network's tensor arguments. It is followed from there through the network, so
    networks may flatten, transpose or gather it as they like (GPT-2, attention, mixtures of experts); where it gets out
    of sight at an adapted weight, that is an error and no guess. SampleAxis are ordered by adapter once in a call. Where a pass
    cannot be shared (modules or statistics of an adapter's own, BatchNorm in training, checkpointing), each adapter's
    samples take one of their own, with the same results.

    A sample's result does not depend on the values of other samples or adapters: not a bit of it changes with them, and
    gradients toward them are exactly zero. Which adapters a batch has, and in what numbers, decides how many rows each
    product has, so to change that may change results within rounding; so may the first call of a kind, which is followed
    step by step, against those after it. Threads may use a bank at once. Adapters of one shape share memory, so an
    optimizer's step on one, while a backward of another is under way, is an error of autograd's; train apart in banks apart.

    Args:
        adapters: names and adapted models of one base; their tensors are copied and kept stacked.
        base: what a bank without adapters is for: a model, or a frozen base.

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

    _gathered: CompiledBank | None = None

    def __init__(
        self, adapters: Mapping[str, AdaptedModel] | None = None, *, base: nn.Module | FrozenBase | None = None
    ) -> None:
        given = dict(adapters or {})
        for name, model in given.items():
            _check(name, model)
        if base is None and not given:
            raise AdaptError("a bank without adapters needs to know its base: AdapterBank(base=model)")
        frozen = base_of(base) if base is not None else next(iter(given.values()))._body.base
        modes = modes_in(next(iter(given.values()))._body) if given else modes_of(frozen.structure)
        entries = [Adapter.of(model) for model in given.values()]
        for name, entry in zip(given, entries, strict=True):
            _check_base(name, frozen, entry.base)
        self._entries: dict[str, Adapter] = dict(zip(given, side_by_side(entries, frozen), strict=True))
        self._network = MixedBatchRunner(frozen, modes)
        self._models = Kept()

    # --- as a mapping

    def __getitem__(self, name: str) -> AdaptedModel:
        """One adapter as a model, by the bank's own tensors.

        Raises:
            KeyError: with the nearest names.
        """
        return self._apart(self._entry(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        rows = []
        for name, entry in self._entries.items():
            methods = ", ".join(dict.fromkeys(str(part.method) for part in entry.parts))
            rows.append(f"  {name!r}: {methods} at {len(entry.parts)} places")
        kind = type(self._network.base.structure.module).__name__
        return "\n".join([f"AdapterBank of {len(self)} on {kind}", *rows])

    # --- other banks

    def add(self, name: str, adapter: Any, *, generator: torch.Generator | None = None) -> AdapterBank:
        """A bank with one adapter more, which shares the tensors of the others.

        Args:
            name: the new adapter's name.
            adapter: an adapted model, whose tensors are copied; or what `adapt` takes for a strategy, for a new adapter of
                the bank's base, which needs no copy of the network.
            generator: what a new adapter's initial values are drawn from; None for torch's global generator.

        Raises:
            AdaptError: if the name is taken, the adapter has another base, or the strategy does not fit.
        """
        _check_name(name)
        if name in self._entries:
            raise AdaptError(f"the bank has an adapter {name!r} already; remove it first, or give this one another name")
        if isinstance(adapter, (Method, Strategy, Iterable)) and not isinstance(adapter, (nn.Module, str)):
            return self._like({**self._entries, name: fresh(self._network.base, adapter, generator)})
        _check(name, adapter)
        entry = Adapter.of(adapter)
        _check_base(name, self._network.base, entry.base)
        return self._like({**self._entries, name: side_by_side([entry], self._network.base)[0]})

    def remove(self, name: str) -> AdapterBank:
        """A bank without one of the adapters, which shares the tensors of the others.

        Raises:
            KeyError: with the nearest names.
        """
        self._entry(name)
        return self._like({key: entry for key, entry in self._entries.items() if key != name})

    def rename(self, name: str, new_name: str) -> AdapterBank:
        """A bank in which an adapter goes by another name, in the same place of the order.

        Raises:
            KeyError: with the nearest names.
            AdaptError: if the new name is taken or empty.
        """
        self._entry(name)
        if new_name in self._entries and new_name != name:
            raise AdaptError(f"the bank has an adapter {new_name!r} already")
        if not isinstance(new_name, str) or not new_name:
            raise AdaptError(f"an adapter's name is a text that is not empty, got {new_name!r}")
        return self._like({new_name if key == name else key: entry for key, entry in self._entries.items()})

    def train(self, mode: bool = True) -> AdapterBank:
        """A bank in training mode, or in eval mode, which shares the tensors of this one."""
        return self._like(self._entries, mode)

    def eval(self) -> AdapterBank:
        """A bank in eval mode, which shares the tensors of this one."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> AdapterBank:
        """A bank on another device or of another element type, as `nn.Module.to` has it."""
        function = Conversion.of(*args, **kwargs)
        base = self._network.base.apply(function)
        moved = [entry.apply(function, base) for entry in self._entries.values()]
        return self._like(
            dict(zip(self._entries, side_by_side(moved), strict=True)), network=MixedBatchRunner(base, self._network.modes)
        )

    @property
    def training(self) -> bool:
        """Whether the network runs in training mode."""
        return self._network.training

    # --- calls

    def __call__(self, *args: Any, adapters: Names | Tensor, **kwargs: Any) -> Any:
        """The network on a batch, every sample with its own adapter.

        Args:
            args: the network's arguments; tensors have the samples as leading axis.
            adapters: for each sample an adapter's name, or None for the base alone; or their indices in the order of the
                bank, int64 `(batch,)`, -1 for the base alone.
            kwargs: the network's keyword arguments.

        Returns:
            What the network returns, its samples in the order given.

        Raises:
            KeyError: for an unknown name, with the nearest.
            AdaptError: if there are not as many names as samples, or the samples cannot be told apart at a weight.
        """
        if torch.compiler.is_compiling():
            return self._prepared(adapters)(torch.as_tensor(adapters), args, kwargs)
        return self._network.run(self._batch(adapters), args, kwargs, self._apart)

    def generate(self, *args: Any, adapters: Names | Tensor, **kwargs: Any) -> Any:
        """`generate` of a transformers model on a batch, every sample with its own adapter, by its key-value cache.

        Args:
            args: as the model's `generate` takes them; tensors have the samples as leading axis.
            adapters: as of a call.
            kwargs: as the model's `generate` takes them.

        Raises:
            AttributeError: if the model has no `generate`.
        """
        return self._network.run(self._batch(adapters), args, kwargs, self._apart, method="generate")

    def prepare(self) -> AdapterBank:
        """Make ready for `torch.compile`, and return the bank itself: a call in a compiled function is then one graph.

        There `adapters` is an index tensor, and no mix of adapters compiles anew. Every sample runs as a batch of one under
        `torch.vmap`, its adapter's tensors gathered from stacks, so the adapters must be such as `gf.stack` takes (ranks,
        scales and places may differ) and the network one that torch can batch: no RNN, no mixture of experts that sorts
        its tokens. Indices are not checked there. Dynamo may warn of tensors that are not leaves; they are the stacks, and
        gradients arrive at the parameters.

        Raises:
            AdaptError: if the adapters cannot share a stack; it names the place and what differs.

        Example:
            >>> import torch, gift_func as gf
            >>> model = torch.nn.Linear(4, 2)
            >>> bank = gf.AdapterBank({f"r{rank}": gf.adapt(model, gf.LoRA(rank=rank)) for rank in (1, 2)}).prepare()
            >>> step = torch.compile(lambda x, index: bank(x, adapters=index), fullgraph=True)
            >>> bank(torch.randn(3, 4), adapters=torch.tensor([1, -1, 0])).shape  # or step(x, index)
            torch.Size([3, 2])
        """
        if not self._entries:
            raise AdaptError("a bank without adapters has nothing to choose from by index; compile its base")
        for name, entry in self._entries.items():
            if entry.apart:
                raise AdaptError(
                    f"under torch.compile the adapters of a bank share a stack, and {name!r} cannot: {entry.apart}"
                )
        self._gathered = self._network.gathered([self._apart(entry) for entry in self._entries.values()])
        return self

    @property
    def base(self) -> BaseView:
        """The frozen base, unadapted."""
        return self._network.view()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all adapters that require grad: what an optimizer gets."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all adapters that require grad, as `<adapter>.<global name>`."""
        for name, entry in self._entries.items():
            for tensor_name, tensor in entry.tensors.items():
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    yield f"{name}.{tensor_name}", tensor

    # --- inside

    def _like(
        self, entries: Mapping[str, Adapter], training: bool | None = None, network: MixedBatchRunner | None = None
    ) -> AdapterBank:
        made: AdapterBank = object.__new__(type(self))
        made._entries = dict(entries)
        if network is None:
            network = self._network if training is None else self._network.in_mode(training)
        made._network = network
        made._models = self._models if network is self._network else Kept()
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterBank:
        copied = side_by_side(list(self._entries.values()))
        for ours, theirs in zip(self._entries.values(), copied, strict=True):
            for name, tensor in ours.tensors.items():
                theirs.tensors[name].grad = None if tensor.grad is None else clone(tensor.grad)
                memo[id(tensor)] = theirs.tensors[name]
        made = memo[id(self)] = self._like(dict(zip(self._entries, copied, strict=True)))
        made._models = Kept()
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        entries = {name: entry.apply(clone, entry.base) for name, entry in self._entries.items()}
        return _restore, (type(self), self._network.base, self._network.modes, entries)

    def _entry(self, name: str) -> Adapter:
        found = self._entries.get(name)
        if found is None:
            raise KeyError(f"the bank has no adapter {name!r}; {nearest(str(name), self._entries)}")
        return found

    def _batch(self, adapters: Names | Tensor) -> Batch:
        if isinstance(adapters, Tensor):
            return arrange(self._by_index(adapters))
        if isinstance(adapters, str):
            raise TypeError(f"adapters is a sequence with one name for each sample, got the text {adapters!r}")
        return arrange([None if name is None else self._entry(name) for name in adapters])

    def _prepared(self, adapters: Names | Tensor) -> CompiledBank:
        if self._gathered is None:
            raise AdaptError("a bank is made ready for torch.compile by bank.prepare(), once, outside of the compiled function")
        if not isinstance(adapters, Tensor):
            raise AdaptError("under torch.compile adapters is an index tensor, int64 of shape (batch,), -1 for the base alone")
        return self._gathered

    def _by_index(self, index: Tensor) -> list[Adapter | None]:
        entries, numbers = list(self._entries.values()), numbers_of(index, "adapters")
        for number in numbers:
            if not -1 <= number < len(entries):
                raise AdaptError(f"there is no adapter {number} in a bank of {len(entries)}; -1 is the base alone")
        return [None if number < 0 else entries[number] for number in numbers]

    def _apart(self, entry: Adapter) -> AdaptedModel:
        """What runs one adapter's samples by themselves."""
        found = self._models.get(entry)
        return self._models.put(entry, self._network.model(entry)) if found is None else found


def _restore(kind: type[AdapterBank], base: FrozenBase, modes: Modes, entries: Mapping[str, Adapter]) -> AdapterBank:
    made: AdapterBank = object.__new__(kind)
    made._entries = dict(zip(entries, side_by_side(list(entries.values())), strict=True))
    made._network = MixedBatchRunner(base, modes)
    made._models = Kept()
    return made


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
