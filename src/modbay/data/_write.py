"""Predictions beside their rows: the original files with further columns, written whole or not at all."""

import csv
import gzip
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError, listed
from . import _hub, _tables
from ._bad import BadRows
from ._files import File, Hub, Source, form_of, opened, resolve, text


def write_rows(
    out: str | Path,
    source: Source,
    columns: Mapping[str, Sequence[Any]],
    *,
    split: str | None = None,
    separator: str | None = None,
    revision: str | None = None,
) -> list[Path]:
    """Write a source again with further columns, a value for each row in the order of `read`; return the files made.

        write_rows("out.csv", "in.csv", {"prediction": said, "confidence": sure})

    Of one file, `out` is a file of the same format; of several, a folder where each keeps its name. The rows of a
    dataset of the hub become JSON lines. All columns stay, and in JSON lines every character does. Files appear when
    all are complete. Raises DataError for a column that is there already, for another number of values than rows, for
    another format, and where nothing can be written.
    """
    values, jobs = _Values(columns), _jobs(out, source, split, separator, revision)
    with ExitStack() as stack:
        temporaries = [stack.enter_context(_beside(place)) for place, _ in jobs]
        for (place, write), temporary in zip(jobs, temporaries, strict=True):
            try:
                write(temporary, values)
            except OSError as error:
                raise DataError(f"{place}: can't be written ({error.strerror or error}).") from error
        values.end(str(source))
        for (place, _), temporary in zip(jobs, temporaries, strict=True):
            try:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, place)
            except OSError as error:
                raise DataError(f"{place}: can't be written ({error.strerror or error}).") from error
    return [place for place, _ in jobs]


def written(
    out: str | Path,
    source: Source,
    columns: Sequence[str],
    *,
    split: str | None = None,
    separator: str | None = None,
    revision: str | None = None,
) -> list[Path]:
    """The files that `write_rows` would make; raises DataError where it would, as far as names and heads tell."""
    places = [place for place, _ in _jobs(out, source, split, separator, revision)]
    found = resolve(source, revision)
    for file in [] if isinstance(found, Hub) else found:
        if split is None or file.split == split:
            head, rows = _tables.records(file, separator, BadRows().add)
            there = next(([*record] for _, record in rows), []) if head is None else head
            _Values(dict.fromkeys(columns, ())).refuse(file.path, there)
    return places


def _jobs(out, source, split, separator, revision) -> list[tuple[Path, "Write"]]:
    """(a file to be made, how it is written) of each file of a source."""
    found = resolve(source, revision)
    if isinstance(found, Hub):
        if form_of(Path(out)) != "jsonl":
            raise DataError(f"{out}: rows of {found} are written as JSON lines: call it {Path(out).stem}.jsonl.")
        return [(Path(out), _hub_writer(found, split))]
    files = [file for file in found if split is None or file.split == split]
    if not files:
        raise DataError(f"{source} has no split {split!r}.")
    single = len(files) == 1 and form_of(Path(out)) is not None
    places = [Path(out)] if single else _places(Path(out), files)
    return [(place, _file_writer(file, place, separator)) for file, place in zip(files, places, strict=True)]


class _Values:
    """The further columns, taken from row by row."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        counts = {name: len(values) for name, values in columns.items()}
        if len(set(counts.values())) != 1:
            raise DataError(f"columns to add with {counts} values: give at least one, all of one length.")
        self.columns, self.names, self.at, self.count = columns, list(columns), 0, next(iter(counts.values()))

    def take(self, n: int = 1) -> list[Sequence[Any]]:
        """The next n values of each column; raises DataError if there are not so many."""
        if self.at + n > self.count:
            raise DataError(f"{self.count:,} values for more rows than that: give one for each row that read() gives.")
        self.at += n
        return [values[self.at - n : self.at] for values in self.columns.values()]

    def one(self) -> list[Any]:
        """The next value of each column."""
        return [values[0] for values in self.take()]

    def end(self, source: str) -> None:
        """Raise DataError if values are left."""
        if self.at != self.count:
            raise DataError(f"{self.count:,} values for the {self.at:,} rows of {source}: give one for each row.")

    def refuse(self, place: Path, there: Sequence[str]) -> None:
        """Raise DataError if a column is there already."""
        twice = [name for name in self.names if name in there]
        if twice:
            raise DataError(f"{place} has columns {listed(twice)} already: give the new ones other names.")


Write = Callable[[Path, _Values], None]


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A name beside a file to be made, gone at the end if it was not put in its place."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise DataError(f"{place}: can't be written ({error.strerror or error}).") from error
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _places(out: Path, files: Sequence[File]) -> list[Path]:
    """Each file under its own name in a folder."""
    if form_of(out) is not None:
        raise DataError(f"{out}: {len(files)} files are written into a folder: name one.")
    names = [file.path.name for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"files of one name from several folders, {listed(twice)}, can't be written into {out}.")
    return [out / name for name in names]


def _file_writer(file: File, place: Path, separator: str | None) -> Write:
    packed = file.path.suffix.lower() == ".gz"
    if form_of(place) != file.form or (place.suffix.lower() == ".gz") != packed:
        kept = "".join(file.path.suffixes[-2:] if packed else file.path.suffixes[-1:])
        raise DataError(f"{place}: {file.path} is written in its own format: call it {place.name.split('.')[0]}{kept}.")
    if file.form == "parquet":
        return lambda temporary, values: _parquet(temporary, file.path, values)
    write = {"csv": _table, "tsv": _table, "jsonl": _lines, "json": _list}[file.form]

    def whole(temporary: Path, values: _Values) -> None:
        with (
            gzip.open(temporary, "wb") if packed else open(temporary, "wb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8", newline="") as said,  # type: ignore[arg-type]
        ):
            write(said, file, values, separator)

    return whole


def _table(out: io.TextIOWrapper, file: File, values: _Values, separator: str | None) -> None:
    with opened(file.path) as raw:
        first = raw.readline()
    if first.startswith(b"\xef\xbb\xbf"):  # as Excel wants it
        out.write("\ufeff")
    end = "\r\n" if first.endswith(b"\r\n") else "\n"
    bad = BadRows()
    character = separator or ("\t" if file.form == "tsv" else ",")
    columns, rows = _tables.fields(file, character, bad.add)
    values.refuse(file.path, columns)
    write = csv.writer(out, delimiter=character, lineterminator=end)
    write.writerow([*columns, *values.names])
    for _, row in rows:
        write.writerow([*row, *map(_cell, values.one())])
    bad.stop()


def _cell(value: Any) -> Any:
    """A value in a text table: lists as JSON."""
    if isinstance(value, list | tuple | dict | bool):
        return json.dumps(value, ensure_ascii=False)
    return value


def _lines(out: io.TextIOWrapper, file: File, values: _Values, separator: str | None) -> None:
    with text(file.path, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                there = json.loads(line)
                values.refuse(Path(f"{file.path}:{number}"), list(there))
            except (ValueError, TypeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{file.path}:{number}: not a JSON object ({error}).") from error
            more = _json(dict(zip(values.names, values.one(), strict=True)), values)
            kept = line.rstrip()[:-1].rstrip()
            out.write(f"{kept}{', ' if there else ''}{more[1:]}\n")


def _list(out: io.TextIOWrapper, file: File, values: _Values, separator: str | None) -> None:
    with text(file.path, newline="\n") as said:
        rows = json.load(said)
    for record in rows:
        values.refuse(file.path, list(record))
        record.update(zip(values.names, values.one(), strict=True))
    out.write("[\n" + ",\n".join(_json(record, values) for record in rows) + "\n]\n")


def _json(record: Mapping[str, Any], values: _Values) -> str:
    try:
        return json.dumps(record, ensure_ascii=False)
    except TypeError as error:
        raise DataError(f"row {values.at:,} can't be written as JSON ({error}).") from error


def _hub_writer(hub: Hub, split: str | None) -> Write:
    def write(temporary: Path, values: _Values) -> None:
        with open(temporary, "w", encoding="utf-8") as out:
            for name, part in _hub.chosen(hub, _hub.parts(hub), split).items():
                columns, rows = _hub.records(hub, name, part)
                values.refuse(Path(str(hub)), columns or [])
                for _, record in rows:
                    out.write(_json({**record, **dict(zip(values.names, values.one(), strict=True))}, values) + "\n")

    return write


def _parquet(temporary: Path, path: Path, values: _Values) -> None:
    import pyarrow as pa  # noqa: PLC0415 (an optional dependency)
    import pyarrow.parquet as parquet  # noqa: PLC0415

    columns, _ = _tables.records(File(path, "parquet"), None, BadRows().add)
    values.refuse(path, columns or [])
    with parquet.ParquetFile(path) as file:
        left, parts = file.metadata.num_rows, []
        while left or not parts:  # no more than a batch as Python's objects
            n = min(left, _tables.BATCH)
            parts.append(pa.table(dict(zip(values.names, map(pa.array, map(list, values.take(n))), strict=True))))
            left -= n
        try:
            more = pa.concat_tables(parts, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"{path}: a column of a Parquet file has values of one type ({error}).") from error
        schema, at = pa.schema([*file.schema_arrow, *more.schema], file.schema_arrow.metadata), 0
        with parquet.ParquetWriter(temporary, schema) as out:
            for batch in file.iter_batches(_tables.BATCH):
                mine = more.slice(at, len(batch))
                out.write_table(pa.Table.from_arrays([*batch.columns, *mine.columns], schema=schema))
                at += len(batch)
