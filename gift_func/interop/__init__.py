"""Reading and writing the files of other libraries."""

from . import kohya as kohya
from . import peft as peft
