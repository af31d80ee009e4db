"""A cache as one file: a checksum, a line of JSON, and bytes. One that is damaged, or of another version, is not there.

    modbay cache 2 CRC32 ⏎ {…} ⏎ bytes

It is replaced as a whole, so that of several writers the last one's is kept, whole; what it lacks is made again. The
checksum is of all that follows: what is read from it later, piece by piece, needs no doubt.
"""

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ._files import aside

MARK = b"modbay cache 2 "


def keep(path: Path, head: Mapping[str, Any], body: bytes) -> None:
    """Keep a cache, if that can be: a folder that can't be written to is read all the same."""
    temporary = aside(path)
    text = json.dumps(head, separators=(",", ":")).encode() + b"\n"
    digest = zlib.crc32(body, zlib.crc32(text))
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines((MARK, b"%08x\n" % digest, text, body))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def kept(path: Path) -> tuple[dict[str, Any], memoryview] | None:
    """(the head, the bytes) of a cache; None if there is none that is sound."""
    try:
        raw = memoryview(path.read_bytes())
    except OSError:
        return None
    start = len(MARK) + 9
    if raw[:start] != MARK + b"%08x\n" % zlib.crc32(raw[start:]):
        return None
    end = raw.obj.find(b"\n", start)  # type: ignore[attr-defined]
    try:
        head = json.loads(bytes(raw[start:end]))
    except (ValueError, RecursionError):
        return None
    return (head, raw[end + 1 :]) if isinstance(head, dict) else None
