"""Structured weights: how a changed weight acts, and the slot that routes torch functions to it."""

from . import rules as rules
from .low_rank import LowRank as LowRank
from .scattered import Rows as Rows
from .scattered import Scattered as Scattered
from .slot import Slot as Slot
from .slot import rule as rule
from .slot import weight_of as weight_of
from .spectral import Spectral as Spectral
from .value import Delta as Delta
from .value import Dense as Dense
from .value import OnBase as OnBase
from .value import Transposed as Transposed
from .value import Weight as Weight
from .value import as_weight as as_weight
