"""The methods: what a paper proposes, one file and one frozen dataclass each."""

from .adalora import AdaLoRA as AdaLoRA
from .bitfit import BitFit as BitFit
from .boft import BOFT as BOFT
from .bottleneck import Bottleneck as Bottleneck
from .c3a import C3A as C3A
from .diff import Diff as Diff
from .dora import DoRA as DoRA
from .fourierft import FourierFT as FourierFT
from .full import Full as Full
from .hira import HiRA as HiRA
from .hra import HRA as HRA
from .ia3 import IA3 as IA3
from .loha import LoHa as LoHa
from .lokr import LoKr as LoKr
from .lora import LoRA as LoRA
from .method import Method as Method
from .miss import MiSS as MiSS
from .mixing_lora import MixingLoRA as MixingLoRA
from .module_method import ModuleMethod as ModuleMethod
from .norm_tuning import NormTuning as NormTuning
from .oft import OFT as OFT
from .shira import SHiRA as SHiRA
from .svdiff import SVDiff as SVDiff
from .trainable_tokens import TrainableTokens as TrainableTokens
from .vera import VeRA as VeRA
