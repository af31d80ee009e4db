"""Who is new to a run: a task, or a value of a label that the run routes by; and the few rows that there are of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ... import data
from ...data import Row
from ...errors import ConfigError, DataError, listed
from .._config import Config, Source
from .._run import Run
from .._tasks import absolute, columns, network_kind


@dataclass(frozen=True)
class Newcomer:
    """label, value: what is new, ("task", its name) or ("language", "pt"). task, kind, classes: of its rows.

    few: the rows to learn from; test: those to judge by, if any. fixed, read: how they are read again.
    """

    label: str
    value: str
    task: str
    kind: str
    classes: tuple[str, ...]
    few: list[Row]
    test: list[Row]
    files: list[dict[str, Any]]
    warnings: list[str]
    fixed: dict[str, str]
    read: Config

    @property
    def new_task(self) -> bool:
        return self.label == "task"


def read_newcomer(
    run: Run, source: str, *, task: str | None, value: str | None, text: Any, target: str | None, kind: str | None,
    test: str | float | None, shots: int | None, seed: int,
) -> Newcomer:  # fmt: skip
    """The rows of a file, folder or `datasets` id; raises ConfigError or DataError for what makes no sense."""
    if isinstance(test, float) and not 0 <= test < 1:
        raise ConfigError(f"test={test}: a share of the rows, from 0 to below 1, or a file.")
    if shots is not None and shots < 1:
        raise ConfigError(f"shots={shots}: at least one row of each class.")
    label, value, task = named(run, source, task, value)
    kind = kind_of(run, label, task, kind)
    parts, fixed, read = load(run, source, label, value, task, kind, text, target, test, seed)
    few = drawn([*parts.train, *parts.validation], kind, shots, seed)
    parts = data.Splits(few, [], parts.test)
    path = {"test": test} if isinstance(test, str) else {}
    files = [
        {"task": task, "split": "few" if name == "train" else name, "path": str(path.get(name, source)),
         "rows": len(rows), "sha256": data.digest(rows)} for name, rows in parts.items() if rows
    ]  # fmt: skip
    classes = classes_of(run, few, label, task, kind)
    warnings = list(data.survey(parts).warnings)
    return Newcomer(label, value, task, kind, classes, few, parts.test, files, warnings, fixed, read)


def named(run: Run, source: str, task: str | None, value: str | None) -> tuple[str, str, str]:
    """(label, value, task) of what is new; raises ConfigError for what the run knows already."""
    kinds = run.known["kinds"]
    if value is None:
        name = task or Path(source).name.split(".")[0] or "task"
        if name in kinds:
            by = next(iter(run.config.by), "language")
            raise ConfigError(
                f"task {name!r}: the run has it already ({listed(kinds)}). task=NAME (--task) names a new one; rows of "
                f"a new {by} are given as value='{by}=…' (--value)."
            )
        return "task", name, name
    label, equals, name = value.partition("=")
    if not equals or not name or label not in run.config.by:
        raise ConfigError(
            f"value={value!r}: LABEL=VALUE is wanted, the label being one that the run has, "
            f"{listed(run.config.by) if run.config.by else 'but it has none'}."
        )
    if task is None and len(kinds) > 1:
        raise ConfigError(f"value={value!r}: of which task are the rows? task= is one of {listed(kinds)}.")
    task = task or next(iter(kinds))
    if task not in kinds:
        raise ConfigError(f"task={task!r}: a new {label} is of a task that the run knows, {listed(kinds)}.")
    if name in run.routes.values.get(label, {}) or any(
        (one.label, one.value, one.task) == (label, name, task) for one in run.routes.own
    ):
        raise ConfigError(f"value={value!r}: the run knows that {label} already; there is nothing to adapt.")
    return label, name, task


def kind_of(run: Run, label: str, task: str, kind: str | None) -> str:
    """What kind of task the rows are of, which must be one that the run's network serves."""
    kinds = run.known["kinds"]
    if label != "task":
        if kind is not None and kind != kinds[task]:
            raise ConfigError(f"kind={kind!r}: task {task!r} is {kinds[task]}.")
        return kinds[task]
    made = kind or run.known["kind"]
    if made not in data.KINDS:
        raise ConfigError(f"kind={made!r}: there are {listed(data.KINDS)}.")
    network_kind({**kinds, task: made})
    return made


def load(
    run: Run, source: str, label: str, value: str, task: str, kind: str, text: Any, target: str | None,
    test: str | float | None, seed: int,
) -> tuple[data.Splits, dict[str, str], Config]:  # fmt: skip
    """(the rows by part, labels that are the same in all of them, how they are read).

    A file without the label's column is all of the new value; of one with it, its rows of that value count.
    """
    mine = run.config.sources.get(task)
    text = text or (mine.text if mine else run.config.text)
    target = target or (mine.target if mine else None) or run.config.target
    given = Source(path=source, text=text, target=target, kind=kind, validation=0.0, test=test or 0.0)  # type: ignore[arg-type]
    by = {} if label == "task" else dict(run.config.by)
    how = absolute(run.config.model_copy(update={"data": {task: given}, "by": by, "seed": seed}))
    read = lambda fixed: read_source(how, task, how.sources[task], fixed)
    if label == "task":
        return read({}), {}, how
    fixed: dict[str, str] = {}
    try:
        parts = read({})
    except DataError as error:
        try:
            parts, fixed = read({label: value}), {label: value}
        except DataError:
            raise error from None
    kept = {name: [row for row in rows if row.labels[label] == value] for name, rows in parts.items()}
    if not kept["train"]:
        there = sorted({row.labels[label] for row in parts.train})
        raise DataError(f"{source}: no row has {label}={value!r}; there are {listed(there)}.")
    return data.Splits(**kept), fixed, how


def read_source(how: Config, task: str, source: Source, fixed: dict[str, str]) -> data.Splits:
    """A task's rows by part: as files say, and the test by share where one is given."""
    files = {"test": source.test} if isinstance(source.test, str) else {}
    share = 0.0 if files else float(source.test or 0.0)
    where: Any = {"train": source.path, **files} if files else source.path
    made = columns(how, source, fixed)
    return data.load(where, made, source.kind or "classification", task, validation=0.0, test=share, seed=how.seed)


def drawn(rows: list[Row], kind: str, shots: int | None, seed: int) -> list[Row]:
    """`shots` rows of each class, in the order of the file; of a kind without classes, so many rows in all."""
    if shots is None:
        return rows
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.target if kind == "classification" else "", []).append(i)
    rng = Random(f"shots-{seed}")
    kept = [i for name in sorted(groups, key=str) for i in rng.sample(groups[name], min(shots, len(groups[name])))]
    return [rows[i] for i in sorted(kept)]


def classes_of(run: Run, rows: Sequence[Row], label: str, task: str, kind: str) -> tuple[str, ...]:
    """The classes or tags of the rows' task; raises ConfigError where they are not ones to learn."""
    if kind not in ("classification", "tagging"):
        return ()
    several = [(name, row.where) for row in rows
               for name in (row.target if isinstance(row.target, tuple) else [row.target])]  # fmt: skip
    if label == "task":
        found = sorted({str(name) for name, _ in several})
        if len(found) < 2:
            raise ConfigError(f"task {task!r}: all rows have the class {listed(found)}; there is nothing to learn.")
        return tuple(found)
    known = run.known["classes"][task]
    strange = {str(name): where for name, where in several if name not in known}
    if strange:
        said = ", ".join(f"{name!r} ({where})" for name, where in list(strange.items())[:8])
        raise ConfigError(
            f"task {task!r} has no classes {said}; its head knows {listed(known, 20)}. A head of other classes is a "
            f"task of its own: task=NAME (--task) instead of value=."
        )
    return tuple(known)
