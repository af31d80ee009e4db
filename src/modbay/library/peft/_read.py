"""Reading a checkpoint of peft's: its type says how."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ...errors import FileError, ModbayError
from .._foreign import Foreign
from . import _prompts, _weights
from ._source import CONFIG, Source, open_source

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
    "MULTITASK_PROMPT_TUNING": _prompts.multitask,
}


def read(folder: Path, name: str, model: nn.Module) -> Foreign:
    """The module that a folder of peft's holds, for this model."""
    source = open_source(folder, model)
    method = source.get("peft_type", str, "")
    if method not in READERS:
        raise FileError(
            f"{folder}/{CONFIG}: peft_type {method!r} is not one that modbay reads: {', '.join(sorted(READERS))}."
        )
    try:
        READERS[method](source)
        _weights.rest(source)
    except ModbayError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise FileError(
            f"{folder}: its config and tensors do not go together as peft's {method} do ({type(error).__name__}: "
            f"{error}). It was changed by hand, is damaged, or is of another version than peft 0.21."
        ) from error
    if not source.kinds:
        raise FileError(f"{folder}: it holds no tensors of {method}.")
    base = source.get("base_model_name_or_path", str)
    return Foreign(name, folder, "peft", source.kinds, source.found, base)
