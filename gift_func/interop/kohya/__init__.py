"""kohya's and LyCORIS's safetensors files, without either of them."""

from .load import load as load
from .load import metadata as metadata
from .methods import Decomposed as Decomposed
from .methods import GivenLoKr as GivenLoKr
from .methods import WeightIA3 as WeightIA3
from .save import save as save
