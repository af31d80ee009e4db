"""Checkpoints of the library adapters, in and out: adapter_config.json and adapter.safetensors, or a .bin of them."""

from ._draft import Draft as Draft
from ._read import read as read
from ._setup import read_setup as read_setup
from ._source import CONFIG as CONFIG
from ._write import write as write
from ._write_setup import write_setup as write_setup
