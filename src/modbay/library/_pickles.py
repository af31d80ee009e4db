"""Tensors out of a file of torch.save's, by a loader that runs nothing: for formats that have no other file.

Only what torch.save writes for dictionaries of tensors is let through: its own archive, not compressed, and in it no
name of a function or class but the few that make a dense tensor of a storage.
"""

import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from ..errors import FileError

TENSOR = {
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict", "torch Size",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char",
                                          "Byte", "Bool")),
}  # fmt: skip
NUMBER = {"numpy.core.multiarray scalar", "numpy._core.multiarray scalar", "numpy dtype", "_codecs encode"}
MADE: list[Any] = [(np.int64(0).__reduce__()[0], name.replace(" ", ".")) for name in NUMBER if "scalar" in name]
MADE += [(np.dtype, "numpy.dtype"), type(np.dtype("int64"))]  # what makes a number of numpy's again
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
         torch.uint8, torch.bool)  # fmt: skip
NAMED = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # the opcodes that reach for something by name


def unpickled(path: Path, numbers: bool = False) -> dict[Any, Any]:
    """What torch.save wrote: dictionaries of tensors, and of numbers. Raises FileError for anything else.

    numbers: whole ones of numpy's are let through, too.
    """
    known = TENSOR | NUMBER if numbers else TENSOR
    if not path.is_file():
        raise FileError(f"{path} is missing.")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise FileError(f"{path} says that it unpacks to more than it is: it is not torch.save's.")
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            strange = [name for one in names for name in _reached(archive.read(one)) if name not in known]
        if len(names) != 1 or strange:
            what = f"it asks for {strange[0]!r}" if strange else f"it holds {len(names)} pickles"
            raise FileError(
                f"{path}: {what}, which is no part of a dictionary of tensors, and may run code. Nothing of it was "
                f"loaded."
            )
        with safe_globals(MADE if numbers else []):
            held = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (after what is said above)
    except FileError:
        raise
    except Exception as error:  # torch raises what it likes
        raise FileError(
            f"{path} is not what torch.save writes of tensors since torch 1.6 ({type(error).__name__}: "
            f"{str(error)[:200]}): damaged, or older. Copy it again, or save it again by a newer torch."
        ) from error
    if not isinstance(held, dict):
        raise FileError(f"{path} holds a {type(held).__name__}, not a dictionary of tensors.")
    _dense(path, held, path.stat().st_size)
    return held


def pickled_tensors(path: Path) -> dict[str, Tensor]:
    """A plain dictionary of tensors by name."""
    held = unpickled(path)
    wrong = [key for key, value in held.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise FileError(f"{path}: {wrong[0]!r:.80} is no tensor by its name: it is not a state dict.")
    return {key: value.detach().contiguous() for key, value in held.items()}


def _reached(data: bytes) -> Iterator[str]:
    """What a pickle asks for by name, without running it."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in NAMED:
            yield str(argument) if opcode.name == "GLOBAL" else opcode.name


def _dense(path: Path, held: Any, size: int) -> None:
    """Raise FileError for a tensor that claims more than the file has, or is of another make."""
    if isinstance(held, Mapping):
        for value in held.values():
            _dense(path, value, size)
    elif isinstance(held, Tensor):
        plain = type(held) in (Tensor, torch.nn.Parameter) and held.layout == torch.strided and held.dtype in PLAIN
        if not plain or held.numel() * held.element_size() > size:
            raise FileError(f"{path} has a tensor {tuple(held.shape)} of {held.dtype}, more than it can hold.")
