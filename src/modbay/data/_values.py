"""One record to one Row: every value is checked here, and nothing is guessed."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ._bad import BadRow
from ._row import WITHOUT_TARGET, Columns, Row


def row(record: Mapping[str, Any], where: str, columns: Columns, kind: str, task: str, wanted_target: bool) -> Row:
    """The row that a record is; raises BadRow with the reason where it is none."""
    first, *second = columns.texts
    text = words(record[first], first) if kind == "tagging" else string(record[first], first)
    pair = string(record[second[0]], second[0]) if second else None
    target = None
    if wanted_target and kind not in WITHOUT_TARGET and columns.target is not None:
        target = _target(record[columns.target], columns, kind, text)
    labels = {"task": task, **columns.fixed}
    for label, column in columns.labels.items():
        labels[label] = name(record[column], f"label {label!r} (column {column!r})")
    group = None if columns.group is None else name(record[columns.group], f"group (column {columns.group!r})")
    return Row(text, pair, target, task, labels, where, group, kind)


def _target(value: Any, columns: Columns, kind: str, text: str | tuple[str, ...]) -> str | float | tuple[str, ...]:
    column = str(columns.target)
    if kind == "regression":
        return number(value, column)
    if kind == "seq2seq":
        return string(value, column)
    if kind == "tagging":
        tags = words(value, column)
        if len(tags) != len(text):
            raise BadRow(f"{len(text)} words but {len(tags)} tags: each word has one tag")
        return tags
    said = name(value, f"target (column {column!r})")
    if columns.strict and said.strip().casefold() == "nan":
        raise BadRow(f"the target (column {column!r}) is {said!r}: no class. If it is one, say strict=False")
    return said


def string(value: Any, column: str) -> str:
    """A text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise BadRow(f"no text in column {column!r}")
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} holds {_shown(value)}, a {type(value).__name__}, where a text is wanted")
    if not value.strip():
        raise BadRow(f"the text in column {column!r} is empty")
    return _whole(value, column)


def _whole(value: str, column: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                f"column {column!r} holds half of a surrogate pair, {value[error.start]!r}: write the character whole"
            ) from None
    return value


def name(value: Any, what: str) -> str:
    """A class or label: a string, a whole number, or a truth value."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise BadRow(f"the {what} is missing")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # a whole number in a column that once had gaps
        return str(int(value))
    if isinstance(value, float):
        raise BadRow(f"the {what} is {value!r}, a fraction: names and whole numbers are wanted (or kind regression)")
    if not isinstance(value, str | int):
        raise BadRow(f"the {what} is {_shown(value)}, a {type(value).__name__}: names and whole numbers are wanted")
    if isinstance(value, str) and not value.strip():
        raise BadRow(f"the {what} is blank")
    return _whole(str(value), what)


def number(value: Any, column: str) -> float:
    """A finite number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"the target (column {column!r}) is missing")
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or "_" in str(value):
            raise ValueError
        said = float(value)
    except (ValueError, OverflowError):
        comma = ": write a decimal point" if isinstance(value, str) and _number(value.replace(",", ".")) else ""
        raise BadRow(f"the target (column {column!r}) is {_shown(value)}, no number{comma}") from None
    if not math.isfinite(said):
        raise BadRow(f"the target (column {column!r}) is {value}, where a finite number is wanted")
    return said


def _number(said: str) -> bool:
    try:
        return math.isfinite(float(said))
    except ValueError:
        return False


def words(value: Any, column: str) -> tuple[str, ...]:
    """Words or tags: a list of strings, such a list in JSON, or a text with spaces between them."""
    said = value
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            said = json.loads(value)
        except ValueError:
            if value.strip().startswith(("['", '["')) and value.strip().endswith("]"):
                raise BadRow(
                    f'column {column!r} holds {_shown(value)}, a list as Python prints it: write JSON, ["a", "b"]'
                ) from None
    if isinstance(said, str):
        said = string(said, column).split()
    elif said is None or (isinstance(said, float) and math.isnan(said)):
        raise BadRow(f"no words in column {column!r}")
    if not isinstance(said, list | tuple):
        raise BadRow(
            f"column {column!r} holds {_shown(value)}, a {type(value).__name__}, where a list of strings is wanted"
        )
    if not said:
        raise BadRow(f"the list in column {column!r} is empty")
    for i, word in enumerate(said, 1):
        if not isinstance(word, str) or not word.strip():
            raise BadRow(f"column {column!r}: item {i} of the list is {_shown(word)}, where a string is wanted")
        _whole(word, column)
    return tuple(said)


def _shown(value: Any, most: int = 40) -> str:
    said = repr(value)
    return said if len(said) <= most else f"{said[:most]}…"
