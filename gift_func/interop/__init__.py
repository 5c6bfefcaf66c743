"""Other libraries' files: read them, write them."""

from . import peft as peft
