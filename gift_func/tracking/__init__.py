"""The rules by which a batch's samples are followed through torch functions."""

from . import along as along
from . import elementwise as elementwise
from . import indexing as indexing
from . import layers as layers
from . import products as products
from . import shapes as shapes
from . import writing as writing
