"""Reading a checkpoint of peft's: its type says how."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ...errors import FileError, listed
from .._composition import Composition
from .._files import read_json
from .._foreign import Foreign, together
from . import _multitask, _poly, _prompts, _weights
from ._source import CONFIG, TENSORS, Source, open_source

READERS: dict[str, Callable[[Source], None]] = {
    "LORA": _weights.lora,
    "ADALORA": _weights.adalora,
    "LOHA": _weights.loha,
    "LOKR": _weights.lokr,
    "VERA": _weights.vera,
    "IA3": _weights.ia3,
    "LN_TUNING": _weights.layer_norms,
    "PROMPT_TUNING": _prompts.prompt,
    "P_TUNING": _prompts.prompt,
    "PREFIX_TUNING": _prompts.prefix,
}
COMPOSED: dict[str, Callable[[Source], Composition]] = {  # several modules, a router and an aggregator
    "POLY": _poly.poly,
    "MULTITASK_PROMPT_TUNING": _multitask.multitask,
}


def composes(folder: Path) -> bool:
    """Whether a folder of peft's holds several modules that belong together."""
    return str(read_json(folder / CONFIG).get("peft_type")) in COMPOSED


def read(folder: Path, name: str, model: nn.Module) -> Foreign:
    """The module that a folder of peft's holds, for this model."""
    source = open_source(folder, model)
    method = source.get("peft_type", str, "")
    if method in COMPOSED:
        raise FileError(
            f"{folder}: {method} is several modules, with a router of their own: mb.load(model, FOLDER) makes "
            f"a bay of it."
        )
    if method not in READERS:
        known = listed(sorted([*READERS, *COMPOSED]))
        raise FileError(f"{folder}/{CONFIG}: peft_type {method!r} is not one that modbay reads: {known}.")
    with together(folder, f"peft 0.21's {method}"):
        READERS[method](source)
        _weights.rest(source)
    if not source.kinds:
        raise FileError(f"{folder}: it holds no tensors of {method}.")
    base = source.get("base_model_name_or_path", str)
    return Foreign(name, folder, "peft", source.kinds, source.found, base)


def read_composition(folder: Path, model: nn.Module) -> Composition:
    """The modules, router and aggregator that a folder of peft's holds, for this model."""
    source = open_source(folder, model)
    method = source.get("peft_type", str, "")
    with together(folder, f"peft 0.21's {method}"):
        made = COMPOSED[method](source)
    if source.tensors:
        raise FileError(
            f"{folder}/{TENSORS}: {listed(source.tensors)} beside {method}: heads and copies of layers are no part of "
            f"what its router chooses from. Save them apart (modules_to_save=None)."
        )
    return made
