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
        columns, rows = fields(file, separator, bad)
        return columns, ((where, dict(zip(columns, row, strict=True))) for where, row in rows)
    if separator is not None:
        raise DataError(f"separator={separator!r} is for .csv and .tsv; {file.path} has none.")
    if file.form == "parquet":
        return _parquet(file.path)
    return None, _lines(file.path, bad) if file.form == "jsonl" else _list(file.path, bad)


def fields(file: File, separator: str | None, bad: Bad) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """(the columns; where each row begins, and its fields) of a text table."""
    rows = _table(file.path, separator or ("\t" if file.form == "tsv" else ","), bad)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file.path}: the file is empty: the first line names the columns, the rows follow.")
    return _head(file.path, first[1]), rows


def _table(path: Path, separator: str, bad: Bad) -> Iterator[tuple[str, list[str]]]:
    """First the columns, then the rows that have as many fields, each with its first line: a field may have many."""
    csv.field_size_limit(max(FIELD, csv.field_size_limit()))
    width = 0
    with text(path, newline="") as lines:
        reader = csv.reader(lines, delimiter=separator, strict=True)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                if not width:
                    raise DataError(f"{where}: in the names of the columns, {_quoting(error)}.") from None
                bad(where, f"{_quoting(error)}; what follows was not read")
                return
            if row is None:
                return
            if not row:  # an empty line
                continue
            width = width or len(row)
            if len(row) == width:
                yield where, row
            else:
                more = f"; a text with {separator!r} in it must stand in quotation marks" if len(row) > width else ""
                bad(where, f"{len(row)} fields, where the first line has {width}{more}")


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
