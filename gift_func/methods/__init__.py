"""The methods: what a paper proposes, one file and one frozen dataclass each."""

from .full import Full as Full
from .lora import LoRA as LoRA
from .method import Method as Method
from .svdiff import SVDiff as SVDiff
