"""Other libraries' files: read them, write them."""

from . import kohya as kohya
from . import peft as peft
