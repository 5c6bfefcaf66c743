"""Tracking: where a batch's samples are in each tensor, through torch functions; it knows nothing of adapters.

A tensor's tag is its sample axis (`SampleAxis`), or `Untracked` if it was made from the batch but its samples cannot be told
apart; a tensor that was not made from the batch has none. `sample_axis` has the mode that tags results, `layout` the tags,
`table` the table of rules, and the other files the rules, by kind of function.
"""

from . import along as along
from . import elementwise as elementwise
from . import indexing as indexing
from . import layers as layers
from . import products as products
from . import shapes as shapes
from . import writing as writing
