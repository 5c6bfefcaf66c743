"""Functional, immutable adapters for PyTorch: a frozen base, adapters as data, no monkey-patching."""

from . import select as select
from . import weights as weights
from .adapt import adapt as adapt
from .adapted import AdaptedModel as AdaptedModel
from .base import FrozenBase as FrozenBase
from .errors import AdaptError as AdaptError
from .errors import BaseChangedWarning as BaseChangedWarning
from .errors import CheckpointError as CheckpointError
from .errors import FileError as FileError
from .errors import StateError as StateError
from .files import load_adapter as load_adapter
from .files import save_adapter as save_adapter
from .functional import functional_call as functional_call
from .methods import BitFit as BitFit
from .methods import Diff as Diff
from .methods import Full as Full
from .methods import LoRA as LoRA
from .methods import Method as Method
from .methods import NormTuning as NormTuning
from .methods import SHiRA as SHiRA
from .methods import SVDiff as SVDiff
from .methods import TrainableTokens as TrainableTokens
from .select import Selector as Selector
from .select import Site as Site
from .strategy import Strategy as Strategy
