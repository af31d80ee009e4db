"""What lies in a folder of modules. Its folders are the truth; what was read of them is kept in a cache, FOLDER/.index.

A module is a folder with a module.json, at any depth, and its name is its path. The cache knows each by the time, size
and inode of that file, which every write replaces; it can be deleted at any time, and nothing waits for it.
"""

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import FileError
from ._cache import keep, kept
from ._content import content
from ._files import Stamp, at_hand, inside, walk
from ._format import called
from ._read import checked, read_module

CACHE = Path(".index", "modules.bin")
SHELF = 64  # modules whose facts are parsed together
BASE = ("class", "name", "revision", "digest")


class Shelf:
    """Neighbours in the index, as JSON. They are parsed together when the first is asked for: one by one takes longer,
    for each would have the names of its fields to itself, and all at once longer where a search shows ten."""

    __slots__ = ("_facts", "texts")

    def __init__(self, texts: list[str]):
        self.texts = texts
        self._facts: list[dict[str, Any]] | None = None

    @property
    def facts(self) -> list[dict[str, Any]]:
        if self._facts is None:
            self._facts = json.loads(f"[{','.join(self.texts)}]")
        return self._facts  # type: ignore[return-value]


class Said:
    """What the files of a module say in short, at its place on a shelf; and beside it, what searches among thousands
    ask for: its content ("" if the files can't be read), and its embedding as float32 (b"" if there is none)."""

    __slots__ = ("at", "content", "shelf", "vector")

    def __init__(self, shelf: Shelf, at: int, content: str, vector: bytes):
        self.shelf, self.at, self.content, self.vector = shelf, at, content, vector

    @property
    def text(self) -> str:
        return self.shelf.texts[self.at]

    @property
    def facts(self) -> dict[str, Any]:
        return self.shelf.facts[self.at]


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A module of a library. score: how alike it is to what a search was given."""

    name: str
    library: Path
    said: Said
    score: float | None = None

    @property
    def path(self) -> Path:
        return self.library / self.name

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its files say in short; {"error": …} if they can't be read."""
        return self.said.facts

    @property
    def content(self) -> str:
        return self.said.content

    @property
    def about(self) -> Mapping[str, Any]:
        return self.facts.get("about", {})

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        score = {} if self.score is None else {"score": self.score}
        return {"name": self.name, "path": str(self.path), **score, **self.facts}


def entries(root: Path) -> list[Entry]:
    """All modules of a library, by name."""
    known = _cached(root)
    now: dict[str, tuple[Stamp, Said]] = {}
    fresh = False
    for name, stamp in sorted(walk(root)):
        before = known.get(name)
        if before is not None and before[0] == stamp:
            now[name] = before
        else:
            with suppress(FileNotFoundError):  # removed since
                now[name] = (stamp, look(root / name))
                fresh = True
    if fresh or len(now) != len(known):
        _keep(root, now)
    return [Entry(name, root, said) for name, (_, said) in now.items()]


def look(path: Path) -> Said:
    """What the files of a module say in short."""
    facts, vector = _look(path)
    raw = b"" if vector is None else struct.pack(f"<{len(vector)}f", *vector)
    return Said(Shelf([json.dumps(facts)]), 0, facts.get("content", ""), raw)


def _look(path: Path) -> tuple[dict[str, Any], list[float] | None]:
    """(the facts, the embedding)."""
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
        return {"error": str(error)}, None
    except FileNotFoundError:
        return {"error": f"{path}/module.safetensors is missing."}, None
    except Exception as error:  # safetensors has no one error for what is damaged
        return {"error": f"{path}: {type(error).__name__}: {error}"}, None
    about = dict(record.get("about", {}))
    vector = about.pop("embedding", None)
    said = {
        "content": own,
        "kinds": list(dict.fromkeys(called(said) for said in record["kinds"])),
        "sites": len(record["sites"]),
        "parameters": count,
        "bytes": tensors_at.stat().st_size if tensors_at.exists() else 0,
        "frozen": record["frozen"],
        "base": {key: record["base"][key] for key in BASE},
        **{key: record[key] for key in ("module", "bay", "created", "modbay", "made_on") if key in record},
        "about": about,
    }
    return said, vector


def _keep(root: Path, now: Mapping[str, tuple[Stamp, Said]]) -> None:
    several = [said for _, said in now.values()]
    texts = [said.text for said in several]
    head = {
        "names": list(now),
        "stamps": [number for stamp, _ in now.values() for number in stamp],
        "contents": [said.content for said in several],
        "texts": [len(text) for text in texts],
        "vectors": [len(said.vector) for said in several],
    }
    keep(root / CACHE, head, "".join(texts).encode() + b"".join(said.vector for said in several))


def _cached(root: Path) -> dict[str, tuple[Stamp, Said]]:
    found = kept(root / CACHE)
    try:
        return {} if found is None else _shelved(*found)
    except (LookupError, TypeError, ValueError):  # whole, but not what is kept here
        return {}


def _shelved(head: Mapping[str, Any], body: memoryview) -> dict[str, tuple[Stamp, Said]]:
    """What `_keep` kept."""
    split = sum(head["texts"])
    text, rest = str(body[:split], "ascii"), bytes(body[split:])  # json.dumps writes ASCII: a character is a byte
    texts = [text[a:b] for a, b in pairwise([0, *accumulate(head["texts"])])]
    vectors = [rest[a:b] for a, b in pairwise([0, *accumulate(head["vectors"])])]
    shelves = [Shelf(texts[i : i + SHELF]) for i in range(0, len(texts), SHELF)]
    stamps = zip(*[iter(head["stamps"])] * 3, strict=True)
    columns = zip(head["names"], stamps, head["contents"], vectors, strict=True)
    return {
        name: (stamp, Said(shelves[i // SHELF], i % SHELF, own, vector))
        for i, (name, stamp, own, vector) in enumerate(columns)
    }
