"""Who is new in rows that are given to a run, found from the rows themselves; and which rows the run was tested on."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ... import data
from ...data import Row, Splits
from ...errors import ConfigError, listed
from ...metrics import records
from .._config import Config, Source
from .._run import Run
from .._tasks import classes_of, columns, named, network_kind, read_tasks
from ._extension import Extension, arrived

FEW = {"validation": 16, "test": 4}  # rows a class up to which none is set aside, unless that is said


@dataclass(frozen=True)
class Newcomers:
    """new: {label: its new values}, of "task" the new tasks. whose: (label, value, task) of each that comes.

    known, values: the run's, with theirs. splits: their rows. notes: what a reader should know.
    """

    new: dict[str, list[str]]
    whose: list[tuple[str, str, str]]
    known: dict[str, Any]
    values: dict[str, dict[str, str]]
    splits: Splits
    files: list[dict[str, Any]]
    notes: list[str]

    def name(self, label: str, value: str) -> str:
        """What routers and modules call it."""
        return self.values[label][value]


def newcomers(asked: Extension) -> Newcomers:
    """Read the data, and find who is new in it. Raises DataError, or ConfigError if nobody is."""
    run, notes, parts, files = asked.run, [], {}, []
    for task, source in asked.config.sources.items():
        parts[task] = Splits(
            **{part: _new_rows(run, task, rows, notes) for part, rows in _read(asked, task, source).items()}
        )
    if not any(rows for one in parts.values() for _, rows in one.items()):
        raise ConfigError(_nobody(asked))
    whose = [one for task, split in parts.items() for one in _whose(run, task, split)]
    kinds = {**run.known["kinds"], **{task: source.kind for task, source in asked.config.sources.items()}}
    known: dict[str, Any] = {"kind": network_kind(kinds), "kinds": kinds, "classes": dict(run.known["classes"])}
    splits = Splits()
    for task, given in parts.items():
        mine = _parted(asked, task, given, notes)
        if task in run.known["kinds"]:
            _same_classes(run, task, mine)
        else:
            known["classes"] |= classes_of({task: kinds[task]}, mine.train)
        splits += mine
        for part, rows in mine.items():
            path = asked.config.sources[task].path
            where = ", ".join(path) if isinstance(path, list) else path
            files.append({"task": task, "split": part, "path": where, "rows": len(rows), "sha256": data.digest(rows)})
    new, values = _values(run, splits)
    return Newcomers(new, whose, known, values, splits, files, list(dict.fromkeys(notes)))


def _read(asked: Extension, task: str, source: Source) -> Splits:
    """All rows, parted only where files are."""
    return whole(asked.config, asked.fixed, task, source)


def whole(config: Config, fixed: dict[str, str], task: str, source: Source) -> Splits:
    """All rows of a source, parted only where its files are."""
    files = {part: one for part in ("validation", "test") if isinstance(one := getattr(source, part), str)}
    where: Any = {"train": source.path, **files} if files else source.path
    kind = source.kind or "classification"
    return data.load(where, columns(config, source, fixed), kind, task, validation=0.0, test=0.0, seed=config.seed)


def _new_values(run: Run, row: Row) -> list[tuple[str, str]]:
    """The (label, value) of a row that the run has nothing for: neither modules nor what came later."""
    values = run.routes.values
    new = [(label, value) for label, value in row.labels.items() if value not in values.get(label, (value,))]
    own = {(one.label, one.value) for one in run.routes.own if one.task == row.task} if new else ()
    return [one for one in new if one not in own]


def _is_new(run: Run, row: Row) -> bool:
    return bool(_new_values(run, row))


def _new_rows(run: Run, task: str, rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """Those that are new; that others are left out is noted."""
    if task not in run.known["kinds"]:
        return list(rows)
    new = [row for row in rows if _is_new(run, row)]
    if new and len(new) < len(rows):
        left = Counter(_said(row) for row in rows if not _is_new(run, row))
        named = ", ".join(f"{said}: {n:,}" for said, n in left.most_common(4)) + (" …" if len(left) > 4 else "")
        notes.append(f"{left.total():,} rows of task {task!r} are of values that the run knows ({named}): left out")
    return new


def _said(row: Row) -> str:
    return " ".join(f"{label}={value}" for label, value in row.labels.items() if label != "task")


def _nobody(asked: Extension) -> str:
    """That nothing is new, and what to do."""
    run, by = asked.run, asked.config.by
    know = "; ".join(f"{label}: {listed(run.routes.values.get(label, ()), 12)}" for label in ["task", *by])
    ways = "--task NAME makes the rows a task of their own"
    if by:
        label = next(iter(by))
        ways += f"; a new {label} is named by its column (--by {label}=COLUMN) or for all rows (--value {label}=VALUE)"
    return (
        f"data: nothing in it is new to {run.folder}, which knows {know}. {ways}. `modbay evaluate` tells how the run "
        f"does on such rows."
    )


def _whose(run: Run, task: str, given: Splits) -> list[tuple[str, str, str]]:
    """(label, value, task) of each newcomer among the rows of a task."""
    if task not in run.known["kinds"]:
        return [("task", task, task)]
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for _, rows in given.items():
        for row in rows:
            for label, value in _new_values(run, row):
                found[label][value] = None
    if len(found) > 1:
        said = "; ".join(f"{label}: {listed(values)}" for label, values in found.items())
        raise ConfigError(
            f"data: values of several labels are new ({said}): extend by those of one, then by the others."
        )
    return [(label, value, task) for label, values in found.items() for value in sorted(values)]


def _values(run: Run, splits: Splits) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """(the new values of each label, all values with the names of their modules)."""
    new: dict[str, dict[str, None]] = defaultdict(dict)
    for _, rows in splits.items():
        for row in rows:
            for label, value in row.labels.items():
                if label in run.routes.values and value not in run.routes.values[label]:
                    new[label][value] = None
    values = {label: named({label: [*table, *new.get(label, ())]})[label] for label, table in run.routes.values.items()}
    return {label: sorted(several) for label, several in new.items()}, values


def _same_classes(run: Run, task: str, given: Splits) -> None:
    """Raise ConfigError for classes that the task's head does not have."""
    have = run.known["classes"].get(task)
    if have is None:
        return
    first: dict[str, str] = {}
    for _, rows in given.items():
        for row in rows:
            for one in row.target if isinstance(row.target, tuple) else [row.target]:
                if one not in have:
                    first.setdefault(str(one), row.where)
    if first:
        name, where = next(iter(first.items()))
        raise ConfigError(
            f"data: {len(first)} classes are new to task {task!r}, {name!r} ({where}) the first; it knows "
            f"{listed(have)}. Its heads can't tell others: make the rows a task of their own (--task NAME), or give "
            f"known classes alone."
        )


def _parted(asked: Extension, task: str, given: Splits, notes: list[str]) -> Splits:
    """Training, validation and test rows: as files say, else by share, where there are enough; then the shots."""
    source, rows = asked.config.sources[task], given.train
    if not rows:
        raise ConfigError(f"data: no new rows of task {task!r} to learn from: all are in its validation or test files.")
    each = len(rows) / len({row.target if row.kind == "classification" else "" for row in rows})
    share = {}
    for part, few in FEW.items():
        value = getattr(source, part)
        share[part] = 0.0 if getattr(given, part) or isinstance(value, str) else float(value)
        scarce = each <= few or (part == "validation" and asked.shots is not None)
        if share[part] and scarce and part not in asked.more:
            share[part] = 0.0
            if part == "test":
                notes.append(f"task {task!r} has {each:.1f} rows a class: none is set aside for a test (--test judges)")
    drawn = data.split(rows, **share, seed=asked.config.seed) if any(share.values()) else Splits(list(rows))
    train = drawn.train if asked.shots is None else shots(drawn.train, asked.shots, asked.config.seed, notes)
    return Splits(train, given.validation or drawn.validation, given.test or drawn.test)


def shots(rows: Sequence[Row], k: int, seed: int, notes: list[str]) -> list[Row]:
    """k rows of each class and label value, or of each label value where there are no classes, drawn by the seed."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        target = row.target if row.kind == "classification" else ""
        groups[*sorted(row.labels.items()), target].append(row)
    short = sum(len(several) < k for several in groups.values())
    if short:
        notes.append(f"{short:,} of {len(groups):,} classes have fewer than {k} rows: all of theirs are taken")
    out: list[Row] = []
    for name in sorted(groups, key=str):
        several = groups[name]
        out += Random(f"shots-{seed}-{name}").sample(several, min(k, len(several)))
    return out


def tested(run: Run) -> tuple[list[Row], list[str]]:
    """(the rows that a run was tested on, read again, notes): those whose place, target and labels are still the same.

    Where it was tested on none, all of its rows that it can route. Raises ConfigError if there is none left.
    """
    splits, notes = read_tasks(run.config).splits, []
    for fixed, config in arrived(run):
        for task, source in config.sources.items():
            splits += whole(config, fixed, task, source)
    every = {(row.task, row.where): row for _, rows in splits.items() for row in rows}
    kept = records(run.folder / "predictions.jsonl")
    found = [
        row
        for one in kept
        if (row := every.get((one.task, one.where))) is not None
        and row.target == one.target
        and {label: row.labels.get(label) for label in one.labels} == dict(one.labels)
    ]
    if len(found) < len(kept):
        notes.append(
            f"{len(kept) - len(found):,} of {len(kept):,} test rows of the run are no longer in its files as they were"
        )
    if not kept:
        notes.append("the run has no test rows: the proof is on all of its rows")
        found = [row for row in every.values() if row.task in run.known["kinds"] and not _is_new(run, row)]
    if not found:
        files = ", ".join(dict.fromkeys(str(one["path"]) for one in run.facts.get("data", [])))
        raise ConfigError(
            f"{run.folder}: none of the rows that it was tested on is in its files any more ({files}), so that "
            f"nothing could be proved. Put the files back."
        )
    return found, notes
