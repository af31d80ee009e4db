"""What lies in a folder of modules. Its folders are the truth; what was read of them is kept in a cache, FOLDER/.index.

A module is a folder with a module.json, at any depth, and its name is its path. The cache knows each by the time, size
and inode of that file, which every write replaces; it can be deleted at any time, and nothing waits for it.
"""

import base64
import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import FileError
from ._content import content
from ._files import Stamp, aside, at_hand, inside, walk
from ._format import called
from ._read import checked, read_module

CACHE = Path(".index", "modules.json")
VERSION = 1
BASE = ("class", "name", "revision", "digest")


@dataclass(frozen=True, eq=False)
class Entry:
    """A module of a library. facts: what its files say in short; {"error": …} if they can't be read.

    score: how alike it is to what a search was given.
    """

    name: str
    library: Path
    facts: Mapping[str, Any]
    score: float | None = None

    @property
    def path(self) -> Path:
        return self.library / self.name

    @property
    def content(self) -> str:
        return self.facts.get("content", "")

    @property
    def about(self) -> Mapping[str, Any]:
        return self.facts.get("about", {})

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        own = {key: value for key, value in self.facts.items() if key != "embedding"}
        score = {} if self.score is None else {"score": self.score}
        return {"name": self.name, "path": str(self.path), **score, **own}


def entries(root: Path) -> list[Entry]:
    """All modules of a library, by name."""
    known = _cached(root)
    found = dict(walk(root))
    now: dict[str, tuple[Stamp, dict[str, Any]]] = {}
    for name, stamp in sorted(found.items()):
        before = known.get(name)
        if before is not None and before[0] == stamp:
            now[name] = (stamp, before[1])
        else:
            with suppress(FileNotFoundError):  # removed since
                now[name] = (stamp, look(root / name))
    if {name: one[0] for name, one in now.items()} != {name: one[0] for name, one in known.items()}:
        keep(root / CACHE, {"version": VERSION, "modules": now})
    return [Entry(name, root, facts) for name, (_, facts) in now.items()]


def look(path: Path) -> dict[str, Any]:
    """What the files of a module say in short."""
    try:
        record = checked(inside(path, "module.json"))
        tensors_at = at_hand(inside(path, "module.safetensors"), record)
        count = 0
        if "sha256" in record or tensors_at.exists():
            with safe_open(tensors_at, "pt") as file:
                count = sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        own = record.get("content")
        if own is None:  # of version 0.1.0
            file = read_module(path.parent, path.name, allow_nan=True)
            own = content(file.record, file.tensors)
    except FileError as error:
        return {"error": str(error)}
    except FileNotFoundError:
        return {"error": f"{path}/module.safetensors is missing."}
    except Exception as error:  # safetensors has no one error for what is damaged
        return {"error": f"{path}: {type(error).__name__}: {error}"}
    about = dict(record.get("about", {}))
    vector = about.pop("embedding", None)
    return {
        "content": own,
        "kinds": list(dict.fromkeys(called(said) for said in record["kinds"])),
        "sites": len(record["sites"]),
        "parameters": count,
        "bytes": tensors_at.stat().st_size if tensors_at.exists() else 0,
        "frozen": record["frozen"],
        "base": {key: record["base"][key] for key in BASE},
        **{key: record[key] for key in ("module", "bay", "created", "modbay", "made_on") if key in record},
        "about": about,
        **({} if vector is None else {"embedding": packed(vector)}),
    }


def packed(vector: list[float]) -> str:
    """Numbers as float32 in base64: a tenth of their length in digits."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _cached(root: Path) -> dict[str, tuple[Stamp, dict[str, Any]]]:
    try:
        said = json.loads((root / CACHE).read_bytes())
        return {name: (one[0], one[1]) for name, one in said["modules"].items()} if said["version"] == VERSION else {}
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # none, or damaged: it is made again
        return {}


def keep(path: Path, what: Mapping[str, Any]) -> None:
    """Keep a cache, if that can be: a folder that can't be written to is read all the same."""
    temporary = aside(path)
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(what, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
