"""SHA-256 of data: of files as they lie, or of rows wherever they were read from."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ._files import Hub, resolve
from ._row import Row


def digest(what: str | Path | Sequence[str | Path] | Sequence[Row]) -> str:
    """SHA-256 in hex. A file: of its bytes. Several, or a folder: of their names and digests. Rows: of all but `where`.

    Raises DataError for what can't be read, and for a dataset of the hub, whose rows are to be given.
    """
    if not isinstance(what, str | Path) and all(isinstance(row, Row) for row in what):
        return _of_rows(what)  # type: ignore[arg-type]
    found = resolve(what)  # type: ignore[arg-type]
    if isinstance(found, Hub):
        raise DataError(f"digest({str(found)!r}): a dataset of the hub is no file: read it, and give the rows.")
    if len(found) == 1:
        return _of_file(found[0].path)
    return hashlib.sha256("".join(f"{_of_file(f.path)}  {f.path.name}\n" for f in found).encode()).hexdigest()


def _of_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error


def _of_rows(rows: Sequence[Row]) -> str:
    said = hashlib.sha256()
    for row in rows:
        line = [row.task, row.kind, row.text, row.pair, row.target, sorted(row.labels.items()), row.group]
        said.update(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return said.hexdigest()
