"""The methods: what a paper proposes, one file and one frozen dataclass each."""

from .bitfit import BitFit as BitFit
from .diff import Diff as Diff
from .full import Full as Full
from .lora import LoRA as LoRA
from .method import Method as Method
from .norm_tuning import NormTuning as NormTuning
from .shira import SHiRA as SHiRA
from .svdiff import SVDiff as SVDiff
from .trainable_tokens import TrainableTokens as TrainableTokens
