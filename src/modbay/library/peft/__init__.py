"""Checkpoints of peft, in and out: adapter_config.json and adapter_model.safetensors."""

from ._draft import Draft as Draft
from ._plain import plain_parts as plain_parts
from ._plain import write_plain as write_plain
from ._read import composes as composes
from ._read import read as read
from ._read import read_composition as read_composition
from ._source import CONFIG as CONFIG
from ._source import TENSORS as TENSORS
from ._write import composed as composed
from ._write import write as write
from ._write import write_composition as write_composition
