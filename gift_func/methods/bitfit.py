"""BitFit: the biases are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from ..select import Site
from .full import Full


@dataclass(frozen=True)
class BitFit(Full):
    """`b' = θ` for every bias, a trained copy that starts at b; every matrix stays.

    Biases are a tenth of a percent of a transformer and shift what each unit answers to, which is enough for many tasks.
    Its usual sites are the parameters of one dimension whose own name holds "bias" (`bias`, `in_proj_bias`,
    `bias_ih_l0`), those of norm layers included.

    Shapes: the adapter holds θ under the bias's own dotted name and with its shape.

    Example:
        >>> import torch, gift_func as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> list(gf.adapt(model, gf.BitFit()).adapter)
        ['0.bias', '1.bias']

    References:
        Ben Zaken et al., BitFit, 2021 (arXiv:2106.10199). The task's head, which the paper trains too, is a rule of its
        own: `{"head": gf.Full(), "*.bias": gf.BitFit()}`.
    """

    def is_default_site(self, site: Site) -> bool:
        return "bias" in site.param_name and site.parameter.ndim == 1 and self.why_not(site) is None
