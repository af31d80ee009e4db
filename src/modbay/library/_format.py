"""What a file says of kinds, routers and aggregators: a class name, and the arguments that made it, as JSON.

Nothing is imported because a file names it: a class is found among those that are imported already.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Kind, Router
from ..core import Network
from ..errors import FileError, ModbayError, listed

FORMAT = 1
RESERVED = ({"class", "module", "arguments"}, {"tensor", "dtype", "shape"}, {"float"}, {"dtype"})


@cache
def written_by() -> str:
    """The version of modbay, for the files that it writes."""
    try:
        return version("modbay")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def describe(part: Kind | Router | Aggregator, where: str) -> dict[str, Any]:
    """A kind, router or aggregator as JSON. Raises FileError for an argument that JSON can't hold."""
    if isinstance(part, Network):
        arguments: Mapping[str, Any] = {}  # its parameters are in the file; its code is its owner's
    elif isinstance(part, Kind):
        arguments = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
    else:
        arguments = part.arguments()
    cls = type(part)
    return {
        "class": cls.__name__,
        "module": cls.__module__,
        "arguments": {key: encode(value, f"{where}: {cls.__name__}({key}=…)") for key, value in arguments.items()},
    }


def encode(value: Any, where: str) -> Any:
    """A value as JSON, such that `decode` gives it back."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and set(value) not in RESERVED:
        return {key: encode(item, where) for key, item in value.items()}
    if isinstance(value, (Kind, Router, Aggregator)):
        return describe(value, where)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        return {"tensor": value.flatten().tolist(), "dtype": str(value.dtype)[6:], "shape": list(value.shape)}
    raise FileError(
        f"{where} is {value!r}, which a file can't hold: arguments must be numbers, strings, None, tensors, kinds, "
        f"routers, aggregators, or lists and mappings of them (with strings as keys)."
    )


def decode(value: Any, where: str, tuples: bool) -> Any:
    """What `encode` wrote; sequences as tuples for kinds, which must be hashable, and as lists for others."""
    if isinstance(value, list):
        items = [decode(item, where, tuples) for item in value]
        return tuple(items) if tuples else items
    if not isinstance(value, dict):
        return value
    if set(value) == {"class", "module", "arguments"}:
        return make(value, (Kind, Router, Aggregator), where)
    if set(value) == {"float"}:
        return float(value["float"])
    if "dtype" in value and set(value) in RESERVED:
        dtype = getattr(torch, str(value["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise FileError(f"{where}: {value['dtype']!r} is no dtype of torch.")
        return torch.tensor(value["tensor"], dtype=dtype).view(value["shape"]) if "tensor" in value else dtype
    return {key: decode(item, where, tuples) for key, item in value.items()}


def make(said: Any, bases: tuple[type, ...], where: str) -> Any:
    """The kind, router or aggregator that `describe` described. Raises FileError if it can't be made again."""
    if not isinstance(said, dict) or not {"class", "module", "arguments"} <= set(said):
        raise FileError(f"{where}: {said!r} does not say a class, its module and its arguments.")
    cls = find(said["class"], said["module"], bases, where)
    if issubclass(cls, Network):
        raise FileError(
            f"{where} is a network of your own, whose code a file can't hold: attach a bay with it as mb.attach did "
            f"then, and load into that by bay.load(FOLDER)."
        )
    tuples = issubclass(cls, Kind)
    try:
        return cls(**{key: decode(item, where, tuples) for key, item in said["arguments"].items()})
    except ModbayError:
        raise
    except Exception as error:
        raise FileError(
            f"{where}: {said['class']} can't be made from the arguments in the file, {said['arguments']!r}: {error}. "
            f"It may have been written by another version of {str(said['module']).partition('.')[0]}."
        ) from error


def called(said: Mapping[str, Any]) -> str:
    """`LoRA(rank=8, alpha=16)`: a part as its file tells it, whether its class is known here or not."""
    arguments = ", ".join(f"{key}={_shown(value)}" for key, value in said["arguments"].items())
    return f"{said['class']}({arguments})" + (" at each site" if said.get("per_site") else "")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and {"class", "arguments"} <= set(value):
        return called(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return value["float"] if isinstance(value, Mapping) and set(value) == {"float"} else repr(value)


def find(name: str, module: str, bases: tuple[type, ...], where: str) -> type:
    """The class of that name among the imported ones; where several share it, the one of that module."""
    found = [cls for base in bases for cls in subclasses(base) if cls.__name__ == name and not inspect.isabstract(cls)]
    same = [cls for cls in found if cls.__module__ == module]
    if same:
        return same[-1]  # the last, where a notebook's cell defined it again
    if not found:
        raise FileError(
            f"{where}: no {' or '.join(base.__name__.lower() for base in bases)} {name!r} is known here. Files name "
            f"classes, and load none: import {module!r} first, if you trust it."
        )
    if len(set(found)) > 1:
        raise FileError(f"{where}: several classes are named {name!r}: {listed(c.__module__ for c in found)}.")
    return found[0]


def subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)
