"""Records: test rows with what was said about them, as JSON lines."""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import DataError, listed

MOST = 10  # bad lines that one error names


@dataclass(frozen=True, slots=True)
class Record:
    """A test row, and what a model said about it.

    where: the row's place ("data/intents.csv:17"), by which two runs are joined. target, prediction: a string, a
    number, or one tag a word. confidence: the probability of the prediction. nll: −log p of the target, summed over
    its `tokens` tokens.
    """

    where: str
    task: str
    labels: dict[str, str] = field(default_factory=dict)
    target: str | float | tuple[str, ...] | None = None
    prediction: str | float | tuple[str, ...] | None = None
    confidence: float | None = None
    nll: float | None = None
    tokens: int = 0


NAMES = tuple(f.name for f in fields(Record))


def write_records(path: str | Path, records: Iterable[Record]) -> Path:
    """Write records, one JSON object a line; the file appears whole or not at all.

    Raises DataError for a number that is not finite, which JSON has no way to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # A lone surrogate (of a file's name) is written as JSON escapes it, which is what backslashreplace does.
        with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for record in records:
                file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's own is for its maker alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _line(record: Record) -> str:
    try:
        return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        bad = [key for key, value in asdict(record).items() if isinstance(value, float) and not math.isfinite(value)]
        raise DataError(
            f"{record.where}: {listed(bad)} of the record is not a finite number, and JSON has none such. A model that "
            f"gives NaN has diverged: a lower learning rate helps."
        ) from error


def records(path: str | Path) -> list[Record]:
    """The records of a file that `write_records` wrote. Raises DataError that names the bad lines."""
    path, out, bad = Path(path), [], []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    out.append(_record(json.loads(line)))
                except (ValueError, TypeError) as error:
                    bad.append(f"  {path}:{number}: {error}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no records can be read from it ({error}).") from error
    if bad:
        more = f"\n  … {len(bad)} lines in all" if len(bad) > MOST else ""
        raise DataError(f"{path} is not a file of records:\n" + "\n".join(bad[:MOST]) + more)
    return out


def _record(found: Any) -> Record:
    if not isinstance(found, Mapping):
        raise ValueError(f"a record is a JSON object, not {type(found).__name__}.")
    unknown, lacks = sorted(set(found) - set(NAMES)), [name for name in NAMES[:2] if name not in found]
    if unknown or lacks:
        raise ValueError(f"a record has {listed(NAMES)}; unknown {unknown}, lacking {lacks}.")
    listings = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
    return Record(**{**found, **listings})
