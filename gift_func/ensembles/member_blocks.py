"""An ensemble's stacked parameters as parameters of each member, for optimizers that do not support stacked ones.

An optimizer whose update is element-wise is given all numbers of a member as one vector, so that its cost does not depend
on how many tensors an adapter has. Any other is given each tensor of each member as a view of the stacked one, without the
zeros with which a smaller rank is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..stack_layout import cut_to


class MemberVectors:
    """Parameters of one dtype and device, with all numbers of a member in one vector.

    Attributes:
        parameters: the stacked parameters by name.
        names: their names.
        leaves: each member's vector, `(P,)`.
        spans: name -> the indices of a parameter's numbers in the vectors.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.names = list(parameters)
        first = next(iter(self.parameters.values()))
        start = 0
        self.spans: dict[str, slice] = {}
        for name, parameter in self.parameters.items():
            self.spans[name] = slice(start, start := start + parameter[0].numel())
        self._values = torch.empty(len(first), start, dtype=first.dtype, device=first.device)
        self._value_views = self._views(self._values)
        self._gradients: Tensor | None = None
        self._gradient_views: dict[str, Tensor] = {}
        self.leaves = [nn.Parameter(row) for row in self._values]

    def _views(self, matrix: Tensor) -> dict[str, Tensor]:
        return {name: matrix[:, self.spans[name]].view(p.shape) for name, p in self.parameters.items()}

    def without_gradient(self) -> list[str]:
        """The names of the parameters without a gradient."""
        return [name for name, parameter in self.parameters.items() if parameter.grad is None]

    def link(self) -> None:
        """Set the gradients of the leaves; the gradients of the parameters become views of the same memory."""
        if self.without_gradient():
            for leaf in self.leaves:
                leaf.grad = None
            return
        if self._gradients is None:
            self._gradients = torch.empty_like(self._values)
            self._gradient_views = self._views(self._gradients)
        for name, parameter in self.parameters.items():
            gradient, view = parameter.grad, self._gradient_views[name]
            if gradient is not None and gradient is not view:
                parameter.grad = view.copy_(gradient)
        for leaf, row in zip(self.leaves, self._gradients, strict=True):
            leaf.grad = row

    def load(self) -> None:
        """Copy the parameters' values to the vectors."""
        for name, parameter in self.parameters.items():
            self._value_views[name].copy_(parameter)

    def store(self) -> None:
        """Copy the vectors' values to the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._value_views[name])


class MemberViews:
    """One parameter as a view for each member that has it, or a contiguous copy if the view of a smaller rank has gaps.

    Args:
        name: the parameter's name.
        parameter: the stacked parameter.
        shapes: the shape of each member's tensor, None for a member without it.

    Attributes:
        names: the parameter's name.
        leaves: the members' tensors.
    """

    def __init__(self, name: str, parameter: nn.Parameter, shapes: Sequence[torch.Size | None]) -> None:
        self.names, self.parameter = [name], parameter
        self._shapes = shapes
        self._linked: Tensor | None = None
        self._is_linked = True
        self.leaves: list[nn.Parameter | None] = [
            None if view is None else nn.Parameter(view.contiguous()) for view in self._views(parameter.detach())
        ]

    def _views(self, stacked: Tensor) -> list[Tensor | None]:
        return [None if shape is None else cut_to(stacked[index], shape) for index, shape in enumerate(self._shapes)]

    def _pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        views = self._views(self.parameter.detach())
        return [(leaf, view) for leaf, view in zip(self.leaves, views, strict=True) if leaf is not None and view is not None]

    def link(self) -> None:
        """Set the gradients of the leaves to views of the parameter's."""
        gradient = self.parameter.grad
        if self._is_linked and gradient is self._linked:
            return
        views = [None] * len(self.leaves) if gradient is None else self._views(gradient)
        for leaf, view in zip(self.leaves, views, strict=True):
            if leaf is not None:
                leaf.grad = view
        self._linked, self._is_linked = gradient, True

    def load(self) -> None:
        """Copy values and gradients to the leaves where their views have gaps, since optimizers may need them contiguous."""
        for leaf, view in self._pairs():
            if view.is_contiguous():
                leaf.data = view  # each time, since `to()` replaces the parameter's memory
            else:
                leaf.copy_(view)
            if leaf.grad is not None and not leaf.grad.is_contiguous():
                leaf.grad = leaf.grad.contiguous()
                self._is_linked = False

    def store(self) -> None:
        """Copy leaves that do not share the parameter's memory to the parameter."""
        for leaf, view in self._pairs():
            if not view.is_contiguous():
                view.copy_(leaf)
