"""Checkpoints of the library adapters, in and out: adapter_config.json and adapter.safetensors, or a .bin of them."""

from ._read import read as read
from ._source import CONFIG as CONFIG
