"""What adapters are trained with: torch's own optimizers, given an adapter's groups or driving an ensemble's members."""

from ..ensembles.clipping import clip_grad_norm_per_member as clip_grad_norm_per_member
from ..ensembles.optimizer import PerMember as PerMember
from ..ensembles.optimizer import per_member as per_member
from .lora_plus import lora_plus as lora_plus
