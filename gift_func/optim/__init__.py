"""For training adapters with torch's optimizers: parameter groups, and hyper-parameters that differ by member."""

from ..ensembles.clipping import clip_grad_norm_per_member as clip_grad_norm_per_member
from ..ensembles.optimizer import PerMember as PerMember
from ..ensembles.optimizer import per_member as per_member
from .lora_plus import lora_plus as lora_plus
