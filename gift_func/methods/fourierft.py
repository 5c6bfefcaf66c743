"""FourierFT: a change is learned at a few of its frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..seeding import sample
from ..select import Site
from ..weights import Fourier, Weight
from .matrix import MatrixMethod, matrix_shape, on_matrix
from .options import FrozenMap


@dataclass(frozen=True)
class FourierFT(MatrixMethod):
    """`W' = W + scaling·Re(F⁻¹(S))`: S is zero but at n random places, where it is trained.

    Few frequencies describe a change of full rank. Their places are drawn once, kept and saved with the adapter.

    Shapes: fourierft_spectrum `(n,)`, fourierft_indices `(2, n)`, row and column in S; a kernel is a matrix
    `(out, in/groups·k...)`.

    Args:
        n_frequency: n, at most the number of the weight's elements.
        scaling: the factor before the change.
        random_loc_seed: what the places are drawn with, the same for weights of one size, as in PEFT; None: `adapt`'s
            generator, anew for each weight.
        init: `"normal"`, as in the paper: the network does not start as the base; or `"zeros"`.
        n_frequency_pattern: n of the sites whose module name ends in what a key (a regular expression) matches.

    Raises:
        AdaptError: for an n below 1 or an unknown init.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 2), gf.FourierFT(n_frequency=3))
        >>> {name: tuple(p.shape) for name, p in adapted.adapter.items()}
        {'fourierft_spectrum': (3,), 'fourierft_indices': (2, 3)}

    References:
        Gao et al., Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, 2024 (arXiv:2405.03003).
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"fourierft_indices"})
    whole = ("n_frequency",)

    n_frequency: int = 1000
    _: KW_ONLY
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    init: Literal["normal", "zeros"] = "normal"
    n_frequency_pattern: Mapping[str, int] = field(default_factory=FrozenMap)

    @property
    def starts_as_base(self) -> bool:
        return self.init == "zeros"

    def why_not(self, site: Site) -> str | None:
        here = self.for_site(site)
        if site.parameter.ndim >= 2 and here.n_frequency > matrix_shape(site.parameter.shape, here.view)[-2:].numel():
            return f"at least n_frequency={here.n_frequency} elements"
        return super().why_not(site)

    def init_tensors(self, site: Site, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        parameter, n = site.parameter, self.n_frequency
        *lead, rows, columns = matrix_shape(parameter.shape, self.view)
        spectrum = torch.zeros(*lead, n, dtype=parameter.dtype, device=parameter.device)
        if self.init == "normal":
            spectrum.normal_(generator=generator)
        places = sample(rows * columns, n, seed=self.random_loc_seed, generator=generator, device=parameter.device)
        return {"fourierft_spectrum": spectrum, "fourierft_indices": torch.stack([places // columns, places % columns])}

    def weight(self, base: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        spectrum, indices = tensors["fourierft_spectrum"], tensors["fourierft_indices"]
        return on_matrix(base, self.view, lambda matrix: Fourier(matrix, spectrum, indices, self.scaling))
