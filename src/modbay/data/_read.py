"""Reading: a source to rows, all at once with every bad row told, or as a stream."""

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ..errors import DataError, listed
from . import _hub, _tables
from ._bad import BadRow, BadRows
from ._files import SPLITS, Hub, Source, resolve
from ._row import Columns, Row
from ._values import row


def read(
    source: Source,
    columns: Columns,
    kind: str,
    task: str,
    *,
    split: str | None = None,
    wanted_target: bool = True,
    revision: str | None = None,
    classes: Sequence[str] | None = None,
    whole: bool = True,
) -> list[Row]:
    """All rows of a source, checked.

        rows = read("data/", Columns("text", "intent", {"language": "lang"}), "classification", "intents")

    source: a file (.csv, .tsv, .jsonl, .json with a list, .parquet, text also as .gz), a folder, a pattern, a list of
    these, or a dataset of the hub ("owner/name", "hf:owner/name:config@revision"). split: only that part, where files
    or the hub name parts (train.*, validation.*, test.*). wanted_target: False leaves every target None. classes: those
    that a model knows; others are bad rows then. whole: False for a part, such as a test file, that may have one class.
    Raises DataError: for bad rows all in one, ten shown, each with its file and line.
    """
    got = list(_rows(source, columns, kind, task, split, wanted_target, revision, classes))
    check(got, columns, kind, task, str(source), whole and wanted_target and classes is None)
    return got


def stream(
    source: Source,
    columns: Columns,
    kind: str,
    task: str,
    *,
    split: str | None = None,
    wanted_target: bool = True,
    revision: str | None = None,
    patient: bool = False,
) -> Iterator[Row]:
    """The rows of a source one at a time, as `read` gives them, none kept.

    A dataset of the hub streams over the network; a .json list alone is read whole. Nothing is known of what follows:
    the first bad row raises DataError, and classes are not compared. patient: all bad rows raise it together, at the
    end, as in `read`.
    """
    yield from _rows(source, columns, kind, task, split, wanted_target, revision, None, True, patient)


def _rows(
    source, columns, kind, task, split, wanted_target, revision, classes, streaming=False, patient=False
) -> Iterator[Row]:
    bad = BadRows(first=streaming and not patient)
    for where, record in _records(source, columns, kind, split, wanted_target, revision, bad, streaming):
        try:
            made = row(record, where, columns, kind, task, wanted_target)
            if classes is not None:
                _known(made, classes)
        except BadRow as why:
            bad.add(where, why)
        else:
            yield made
    bad.stop()


def _known(made: Row, classes: Sequence[str]) -> None:
    said = made.target if isinstance(made.target, tuple) else (made.target,)
    for target in said:
        if isinstance(target, str) and made.kind in ("classification", "tagging") and target not in classes:
            near = difflib.get_close_matches(target, classes, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {listed(classes)}"
            raise BadRow(f"class {target!r} is not one that the model knows; {hint}")


def _records(source, columns, kind, split, wanted_target, revision, bad, streaming) -> Iterator[_tables.Record]:
    """The records of all the files or parts, each of which has the columns that are needed."""
    needed = columns.needed(kind, wanted_target)
    for place, head, rows in _tabled(source, columns, split, revision, bad.add, streaming):
        if head is not None:
            missing = [name for name in needed if name not in head]
            if missing:
                raise DataError(f"{place}: {_missing(missing, head)}{_separated(head)}")
        some = False
        for where, record in rows:
            some = True
            absent = [name for name in needed if name not in record]
            if absent:
                bad.add(where, _missing(absent, list(record)))
            else:
                yield where, record
        if not some and not bad.count:
            raise DataError(f"{place}: no rows{'' if head is None else ' below the names of the columns'}.")


def _tabled(source, columns, split, revision, bad, streaming) -> Iterator[tuple]:
    """(place, columns or None, records) of each file or part of a source."""
    found = resolve(source, revision)
    if isinstance(found, Hub):
        for name, part in _hub.chosen(found, _hub.parts(found, streaming), split).items():
            yield (f"{found} {name}", *_hub.records(found, name, part))
        return
    named = {file.split for file in found}
    if split is not None and split not in named:
        there = listed(sorted(name for name in named if name)) or "none: name them train.*, validation.*, test.*"
        raise DataError(f"{source} has no split {split!r}; it has {there}.")
    for file in found:
        if split is None or file.split == split:
            yield (str(file.path), *_tables.records(file, columns.separator, bad))


def _missing(missing: Sequence[str], there: Sequence[str]) -> str:
    near = {name: difflib.get_close_matches(name, there, n=1, cutoff=0.5) for name in missing}
    fold = {str(name).strip().casefold(): name for name in there}
    near = {
        name: found or [fold[name.casefold()]] if name.casefold() in fold else found for name, found in near.items()
    }
    hints = [f"{found[0]!r} for {name!r}" for name, found in near.items() if found]
    meant = f" Did you mean {', '.join(hints)}?" if hints else ""
    what = "no column" if len(missing) == 1 else "no columns"
    return f"{what} {listed(missing)}; there are {listed(there, 20)}.{meant}"


def _separated(head: Sequence[str]) -> str:
    """A hint for a table whose fields another character separates."""
    other = next((c for c in ";\t|," if len(head) == 1 and c in head[0]), None)
    return "" if other is None else f" Its fields seem to be separated by {other!r}: say separator={other!r}."


# What only all rows together show


def check(rows: Sequence[Row], columns: Columns, kind: str, task: str, source: str, whole: bool) -> None:
    """Raise DataError for names that differ only by case or space, and, of a `whole` task, for one class alone."""
    if columns.strict:
        for label in {*columns.labels}:
            _twins(((row.labels[label], row.where) for row in rows), f"values of the label {label!r}", source)
    if kind not in ("classification", "tagging"):
        return
    targets = [(target, row.where) for row in rows for target in _several(row.target)]
    if columns.strict:
        _twins(targets, "classes" if kind == "classification" else "tags", source)
    if whole and targets and len({target for target, _ in targets}) == 1:
        raise DataError(
            f"{source}: all {len(rows):,} rows of task {task!r} have the class {targets[0][0]!r}: with one class there "
            f"is nothing to learn. Is column {columns.target!r} the right one, is the file sorted and cut short?"
        )


def _several(target: str | float | tuple[str, ...] | None) -> tuple[str, ...]:
    return target if isinstance(target, tuple) else (target,) if isinstance(target, str) else ()


def _twins(said: Iterator | Sequence, what: str, source: str) -> None:
    counts, first = Counter(), {}
    for name, where in said:
        counts[name] += 1
        first.setdefault(name, where)
    alike: Mapping[str, list[str]] = defaultdict(list)
    for name in counts:
        alike[" ".join(name.casefold().split())].append(name)
    pairs = [names for names in alike.values() if len(names) > 1]
    if pairs:
        shown = "\n".join(
            "  " + ", ".join(f"{name!r} ({counts[name]:,} rows, first at {first[name]})" for name in names)
            for names in pairs[:10]
        )
        raise DataError(
            f"{source}: {what} that differ only by case or space:\n{shown}\nSpell each one way; if they are meant to "
            f"be different, say strict=False."
        )


def given(source: Source, revision: str | None = None) -> set[str]:
    """The splits that a source names: of train, validation and test; empty if it names none."""
    found = resolve(source, revision)
    names = set(_hub.parts(found)) if isinstance(found, Hub) else {file.split for file in found}
    return {name for name in SPLITS if name in names}
