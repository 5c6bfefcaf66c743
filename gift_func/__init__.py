"""Functional, immutable adapters for PyTorch: a frozen base, adapters as data, no monkey-patching.

    adapted = gf.adapt(model, gf.LoRA(rank=8))  # model is only read; adapted is a module whose parameters are the adapter's

The folders and files of the package, from the top down. A file imports from its own row or from rows below it.

| where | what is there |
|---|---|
| `sweeps/` | many trials trained as one run: `gf.sweep` |
| `interop/`, `optim/`, `testing/` | other libraries' files; optimizers' parameter groups; the laws of a method |
| `stores/` | a bank whose adapters are files: `gf.AdapterStore` |
| `ensembles/` | N stacked adapters, run and trained as one: `gf.stack`, `gf.Ensemble`, optimizers with settings by member |
| `banks/` | named adapters, one for each sample of a batch: `gf.AdapterBank` |
| `files.py`, `eva.py`, `stack_layout.py` | the native file; EVA's starting points; how unequal adapters share one stack |
| `strategies.py`, `factories.py`, `utils.py` | GIFt's names |
| `adapt.py`, `functional.py` | `gf.adapt`: a model and a strategy in, an adapted model out; `gf.functional_call` |
| `adapted_model.py` | `gf.AdaptedModel`: the module that runs base and adapter |
| `initialise.py` | an adapter's initial tensors |
| `adapter.py`, `adapter_dict.py` | the adapter as a value: frozen base, adapted parameters, tensors, strategy, buffers |
| `printing.py`, `gift_protocol.py` | `print(adapted)` and its summary; GIFt's (check, action) strategies |
| `strategy.py` | ordered rules, and the sites that they take |
| `network/` | what is run: the frozen base, and private copies of its modules with tensors bound in them |
| `methods/` | what a paper proposes: one file and one frozen dataclass each |
| `tracking/` | where the samples of a batch are in each tensor, through all torch functions; it knows nothing of adapters |
| `weights/` | structured weights, and the slot and the rules that route torch functions to them |
| `kernels/` | autograd functions that compute a whole layer in one pass |
| `select.py`, `safetensors_io.py` | sites and selectors; the only file that opens and writes safetensors |
| `seeding.py`, `caching.py` | random draws from a generator; the cache of values used last |
| `errors.py`, `_torch.py` | what the package raises and warns with; the only file that uses private names of torch |

One word for one thing:

| word | meaning |
|---|---|
| site | a parameter and where it is found |
| selector, rule, strategy | which sites; a selector with a method; ordered rules, of which the first that matches is taken |
| method | a frozen dataclass that makes a site's initial tensors, and the changed weight from them |
| placement | a site with its method |
| adapted parameter | a parameter's name, its method, and the names of its tensors |
| adapter | the value: adapted parameters and their tensors, on a frozen base |
| adapted model | the module that runs a base with an adapter |
| frozen base | the model's own tensors, aliased, in a private module tree |
| module tree | one copy of the modules, with an index of its parameters |
| copy pool | private copies of the modules, one for each call under way |
| bind | put a tensor in a parameter's place |
| runner | binds weights into a copy and runs it |
| structured weight | a value with `dense()` and `linear(x)`, e.g. `W + s·B·A` |
| slot, slot rule | the placeholder tensor for a structured weight; what a torch function does with one |
| kernel | the autograd function of a layer in one pass |
| ensemble, member | N stacked adapters; one of them |
| stack layout | the padding and the scales of unequal members |
| bank, store | named adapters, one for each sample; a bank whose adapters are files |
| segment, routed weight | neighbouring samples of one adapter; a weight for each segment |
| sample axis | where the samples are in a tensor |
| tracking, recorded path | following samples through a call; what such a call used, in which order, for later calls |
| trial, sweep | one setting; many of them trained as one run |
"""

from importlib import metadata as _metadata

from . import interop as interop
from . import optim as optim
from . import select as select
from . import weights as weights
from .adapt import adapt as adapt
from .adapted_model import AdaptedModel as AdaptedModel
from .banks.bank import AdapterBank as AdapterBank
from .ensembles.ensemble import Ensemble as Ensemble
from .ensembles.stack import adapt_ensemble as adapt_ensemble
from .ensembles.stack import stack as stack
from .errors import AdaptError as AdaptError
from .errors import BaseChangedWarning as BaseChangedWarning
from .errors import CheckpointError as CheckpointError
from .errors import FileError as FileError
from .errors import StateError as StateError
from .eva import eva as eva
from .files import load_adapter as load_adapter
from .files import save_adapter as save_adapter
from .functional import functional_call as functional_call
from .methods import BOFT as BOFT
from .methods import C3A as C3A
from .methods import HRA as HRA
from .methods import IA3 as IA3
from .methods import OFT as OFT
from .methods import AdaLoRA as AdaLoRA
from .methods import AddedModule as AddedModule
from .methods import BitFit as BitFit
from .methods import Bottleneck as Bottleneck
from .methods import Diff as Diff
from .methods import DoRA as DoRA
from .methods import FourierFT as FourierFT
from .methods import Full as Full
from .methods import HiRA as HiRA
from .methods import LoHa as LoHa
from .methods import LoKr as LoKr
from .methods import LoRA as LoRA
from .methods import Method as Method
from .methods import MiSS as MiSS
from .methods import MixingLoRA as MixingLoRA
from .methods import ModuleMethod as ModuleMethod
from .methods import NormTuning as NormTuning
from .methods import SHiRA as SHiRA
from .methods import SVDiff as SVDiff
from .methods import TrainableTokens as TrainableTokens
from .methods import VeRA as VeRA
from .methods import WeightMethod as WeightMethod
from .network.frozen_base import FrozenBase as FrozenBase
from .select import Selector as Selector
from .select import Site as Site
from .stores.store import AdapterStore as AdapterStore
from .strategy import Strategy as Strategy
from .sweeps.result import SweepResult as SweepResult
from .sweeps.sweep import sweep as sweep

try:
    __version__: str = _metadata.version("gift_func")
except _metadata.PackageNotFoundError:  # the folder is on the path, and was not installed
    __version__ = "0+unknown"

_MODULES = ("factories", "interop", "optim", "select", "strategies", "testing", "utils", "weights")


def __dir__() -> list[str]:
    """The names of the public interface, for completion; of the submodules only those to be used by name."""
    own = {name for name, value in globals().items() if name in _MODULES or type(value) is not type(_metadata)}
    return sorted(name for name in own if name.startswith("__") or not name.startswith("_"))
