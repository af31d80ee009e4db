"""What the JSON of format 1 must look like, and where it does not."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FileError

NOTHING = type(None)
LINE = re.compile(r"\w+ [0-9a-f]+ [0-9a-f]+")  # a tensor of the base: dtype, raw, canonical

# A type, or several; [of each item]; {str: of each value}; {key: of its value}, with "?" where it may be absent.
PART = {"class": str, "module": str, "arguments": {str: object}}
SITE = {
    "form": str, "inputs": (int, NOTHING), "outputs": (int, NOTHING),
    "output?": [int], "from?": str, "features?": int, "parameter?": str,
}  # fmt: skip
BASE = {
    "class": str, "name": (str, NOTHING), "revision": (str, NOTHING), "learned": [str],
    "dtypes": [str], "digest": str, "canonical": str, "tensors?": {str: lambda line: bool(LINE.fullmatch(str(line)))},
}  # fmt: skip
MODULE = {
    "kinds": [PART], "sites": {str: {"kind": int, **SITE}}, "shared": {str: str}, "frozen": bool, "base": BASE,
    "sha256?": str, "made_on?": str,
}  # fmt: skip
BAY = {
    "position": int, "modules": [str], "names": [str], "router": {"per_site": bool, **PART},
    "aggregator": {"per_site": bool, **PART}, "sometimes": bool, "add_losses": bool, "sites": {str: SITE},
    "shared": {str: str}, "base": {"tensors": {str: object}, **BASE}, "sha256?": str,
}  # fmt: skip


def check(path: Path, record: dict[str, Any]) -> None:
    """Raise FileError, naming the field, if a record is not of format 1."""
    for where, value, wanted in wrong(record, BAY if path.name == "bay.json" else MODULE, ""):
        raise FileError(
            f"{path}: {where[1:]} is {value!r:.80}, but must be {wanted}: damaged, or edited by hand. Copy it again."
        )


def wrong(value: Any, shape: Any, where: str):
    """(where, the value there, what it must be) of each part of a value that has not the shape."""
    if isinstance(shape, dict) and not isinstance(value, dict):
        yield where, value, "an object"
    elif isinstance(shape, dict) and str in shape:
        for key, item in value.items():
            yield from wrong(item, shape[str], f"{where}.{key}")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                yield from wrong(value[name], inner, f"{where}.{name}")
            elif name == key:
                yield f"{where}.{name}", None, "there"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield where, value, "a list"
        else:
            for i, item in enumerate(value):
                yield from wrong(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, (type, tuple)):
        types = shape if isinstance(shape, tuple) else (shape,)
        if not isinstance(value, types) or (isinstance(value, bool) and not {bool, object} & set(types)):
            yield where, value, " or ".join("null" if t is NOTHING else t.__name__ for t in types)
    elif isinstance(shape, Callable) and not shape(value):
        yield where, value, "a dtype and two digests"
