"""Files as records, one at a time: (where it begins, {column: value})."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, listed
from ._files import File, text

FIELD = 1 << 26  # bytes of one field: beyond it, a quotation mark was surely never closed
BATCH = 1000  # rows of a Parquet file in memory

Record = tuple[str, dict[str, Any]]
Bad = Callable[[str, object], None]  # (where, why): notes a row that is no record


def records(file: File, separator: str | None, bad: Bad) -> tuple[list[str] | None, Iterator[Record]]:
    """(the columns, where the file names them at its head; its records). Rows that are none go to `bad`."""
    if file.form in ("csv", "tsv"):
        rows = _table(file.path, separator or (";,\t"[2] if file.form == "tsv" else ","), bad)
        return next(rows)[1]["columns"], rows
    if separator is not None:
        raise DataError(f"separator={separator!r} is for .csv and .tsv; {file.path} has none.")
    if file.form == "parquet":
        return _parquet(file.path)
    return None, _lines(file.path, bad) if file.form == "jsonl" else _list(file.path, bad)


def _table(path: Path, separator: str, bad: Bad) -> Iterator[Record]:
    """First the columns, then the rows. Line numbers are those where a row begins: a field may have many lines."""
    csv.field_size_limit(max(FIELD, csv.field_size_limit()))
    with text(path, newline="") as lines:
        reader = csv.reader(lines, delimiter=separator, strict=True)
        columns: list[str] | None = None
        while True:
            begins = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                bad(f"{path}:{begins}", f"{_quoting(error)}; what follows it was not read")
                if columns is None:
                    raise DataError(f"{path}:{begins}: the head of the table: {_quoting(error)}") from None
                return
            if fields is None:
                break
            if not fields:  # an empty line
                continue
            if columns is None:
                columns = _head(path, fields)
                yield "", {"columns": columns}
            elif len(fields) != len(columns):
                quoted = (
                    f" A text that holds {separator!r} must stand in quotation marks."
                    if len(fields) > len(columns)
                    else ""
                )
                bad(f"{path}:{begins}", f"{len(fields)} fields, where the head has {len(columns)}.{quoted}")
            else:
                yield f"{path}:{begins}", dict(zip(columns, fields, strict=True))
    if columns is None:
        raise DataError(f"{path}: the file is empty: the first line names the columns, the rows follow.")


def _quoting(error: csv.Error) -> str:
    if "limit" in str(error):
        return f"a field of more than {FIELD >> 20} MiB: a quotation mark that is never closed?"
    if "unexpected end" in str(error):
        return 'a quotation mark is opened here and never closed (one inside a quoted text is written twice, "")'
    return f'wrong quotation marks ({error}): one inside a quoted text is written twice, ""'


def _head(path: Path, names: list[str]) -> list[str]:
    twice = [name for name, n in Counter(names).items() if n > 1 and name]  # an empty one can't be asked for
    if twice:
        raise DataError(f"{path}:1: columns named twice: {listed(twice)}. Give each a name of its own.")
    return names


def _lines(path: Path, bad: Bad) -> Iterator[Record]:
    with text(path, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad(f"{path}:{number}", f"not JSON ({error})")
                continue
            if isinstance(record, dict):
                yield f"{path}:{number}", record
            else:
                bad(f"{path}:{number}", f"a JSON {type(record).__name__}, where an object {{…}} with columns is wanted")


def _list(path: Path, bad: Bad) -> Iterator[Record]:
    """A whole file as one JSON list: it is read at once."""
    with text(path, newline="\n") as file:
        try:
            said = json.load(file)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}). One object a line? Call it .jsonl.") from error
    if not isinstance(said, list):
        raise DataError(f"{path}: a JSON {type(said).__name__}, where a list of objects is wanted: [{{…}}, {{…}}].")
    for number, record in enumerate(said, 1):
        if isinstance(record, dict):
            yield f"{path}, row {number}", record
        else:
            bad(
                f"{path}, row {number}", f"a JSON {type(record).__name__}, where an object {{…}} with columns is wanted"
            )


def _parquet(path: Path) -> tuple[list[str], Iterator[Record]]:
    try:
        import pyarrow.parquet as parquet  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'modbay[train]'.") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise DataError(f"{path}: not a sound Parquet file ({error}). Copy it again.") from error
    columns = _head(path, file.schema_arrow.names)

    def rows() -> Iterator[Record]:
        number = 0
        with file:
            for batch in file.iter_batches(BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record

    return columns, rows()
