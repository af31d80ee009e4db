"""What the JSON of format 1 must look like, where it does not, and the same as a JSON Schema."""

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import FileError

NOTHING = type(None)
LINE = re.compile(r"\w+ [0-9a-f]+ [0-9a-f]+")  # a tensor of the base: dtype, raw, canonical
HASH = re.compile(r"[0-9a-f]{64}")  # SHA-256
WORDS = {LINE: "a dtype and two digests", HASH: "a SHA-256, 64 hexadecimal digits"}

# A type, or several; a pattern; [of each item]; {str: of each value}; {key: of its value}, with "?" where it may be
# absent. Other keys are let be: what a later modbay adds does not stop this one.
PART = {"class": str, "module": str, "arguments": {str: object}}
SITE = {
    "form": str, "inputs": (int, NOTHING), "outputs": (int, NOTHING),
    "output?": [int], "from?": str, "features?": int, "parameter?": str,
}  # fmt: skip
BASE = {
    "class": str, "name": (str, NOTHING), "revision": (str, NOTHING), "learned": [str],
    "dtypes": [str], "digest": str, "canonical": str, "tensors?": {str: LINE},
}  # fmt: skip
NUMBER = (int, float)
ABOUT = {
    "labels?": {str: [str]}, "metrics?": {str: NUMBER},
    "data?": [{"name": str, "sha256?": HASH, "rows?": int, "split?": str}],
    "parents?": [HASH], "licence?": str, "notes?": str, "embedding?": [NUMBER],
}  # fmt: skip
MODULE = {
    "kinds": [PART], "sites": {str: {"kind": int, **SITE}}, "shared": {str: str}, "frozen": bool, "base": BASE,
    "sha256?": HASH, "made_on?": str, "dtype?": (str, list), "content?": HASH, "about?": ABOUT,
}  # fmt: skip
BAY = {
    "position": int, "modules": [str], "names": [str], "router": {"per_site": bool, **PART},
    "aggregator": {"per_site": bool, **PART}, "sometimes": bool, "add_losses": bool, "sites": {str: SITE},
    "shared": {str: str}, "base": {"tensors": {str: object}, **BASE}, "sha256?": HASH, "empty?": bool,
    "references?": {str: {"content": HASH, "at": str}},
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
    elif isinstance(shape, re.Pattern):
        if not isinstance(value, str) or not shape.fullmatch(value):
            yield where, value, WORDS[shape]
    else:
        types = shape if isinstance(shape, tuple) else (shape,)
        if not isinstance(value, types) or (isinstance(value, bool) and not {bool, object} & set(types)):
            yield where, value, " or ".join("null" if t is NOTHING else t.__name__ for t in types)
        elif isinstance(value, float) and not math.isfinite(value):
            yield where, value, "a finite number"


JSON = {
    str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"},
    NOTHING: {"type": "null"}, list: {"type": "array"}, object: {},
}  # fmt: skip


def json_schema() -> dict[str, Any]:
    """The tables above as a JSON Schema (draft 2020-12): of module.json, and of bay.json."""
    head = {"format": int, "modbay?": str, "created?": str, "bay?": str}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "modbay, format 1: module.json and bay.json",
        "anyOf": [{"$ref": "#/$defs/module"}, {"$ref": "#/$defs/bay"}],
        "$defs": {"module": as_schema(head | {"module?": str, **MODULE}), "bay": as_schema(head | BAY)},
    }


def schema_text() -> str:
    """The schema for the eye: a line a key of a record."""
    said = json_schema()
    line = lambda value: json.dumps(value, ensure_ascii=False)
    out = [f"  {line(key)}: {line(value)}" for key, value in said.items() if key != "$defs"]
    defs = []
    for name, table in said["$defs"].items():
        rows = ",\n".join(f"        {line(key)}: {line(value)}" for key, value in table["properties"].items())
        head = f'      "type": "object", "required": {line(table["required"])},'
        defs.append(f'    {line(name)}: {{\n{head}\n      "properties": {{\n{rows}\n      }}\n    }}')
    return "{\n" + ",\n".join(out) + ',\n  "$defs": {\n' + ",\n".join(defs) + "\n  }\n}"


def as_schema(shape: Any) -> dict[str, Any]:
    """One table, or one entry of it."""
    if isinstance(shape, dict) and str in shape:
        return {"type": "object", "additionalProperties": as_schema(shape[str])}
    if isinstance(shape, dict):
        # A key with "?" and the same without: the latter is the stricter.
        inner = {key.removesuffix("?"): as_schema(value) for key, value in shape.items()}
        return {"type": "object", "required": [k for k in shape if not k.endswith("?")], "properties": inner}
    if isinstance(shape, list):
        return {"type": "array", "items": as_schema(shape[0])}
    if isinstance(shape, re.Pattern):
        return {"type": "string", "pattern": f"^{shape.pattern}$"}
    if isinstance(shape, tuple):
        names = [JSON[t]["type"] for t in shape]
        return {"type": "number" if names == ["integer", "number"] else names}
    return JSON[shape]
