"""Compositions: bays whose modules lie in a library, and are named by their content."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError
from ._files import inside, read_json, walk

VARIABLE = "MODBAY_LIBRARY"


def resolve(bay: Path, name: str, said: Mapping[str, Any]) -> Path:
    """The folder of a module that a bay refers to: where it was, in a folder that the bay is in or in $MODBAY_LIBRARY;
    or anywhere in the latter, by its content. Raises FileError if it is nowhere."""
    named = os.environ.get(VARIABLE)
    libraries = [*bay.resolve().parents, *([Path(named)] if named else [])]
    for library in libraries:
        path = inside(library, *said["at"].split("/"))
        if _is(path, said["content"]):
            return path
    for at, _ in walk(Path(named)) if named else ():
        if _is(Path(named or "", at), said["content"]):
            return Path(named or "", at)
    where = f"nor in {VARIABLE}={named}" if named else f"and {VARIABLE} names no other library"
    raise FileError(
        f"{bay}/bay.json refers to module {name!r}, {said['at']!r} of a library, content {said['content'][:12]}…: it "
        f"is in no folder that {bay} is in, {where}. Put the composition into its library, or set {VARIABLE}."
    )


def _is(path: Path, content: str) -> bool:
    """Whether a module's record says that content; that its tensors are of it is for the reader to check."""
    try:
        return (path / "module.json").is_file() and read_json(path / "module.json").get("content") == content
    except FileError:
        return False
