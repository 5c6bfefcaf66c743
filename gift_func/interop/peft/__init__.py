"""PEFT's adapter directories: `adapter_config.json` and `adapter_model.safetensors`, without PEFT."""

from .load import load as load
from .save import save as save
