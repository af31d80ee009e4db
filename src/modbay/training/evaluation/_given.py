"""Data that is given to a finished run: which task it is of, and by which columns it is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ... import data
from ...data import Columns, Row
from ...errors import ConfigError, listed
from .._build import Network
from .._routes import ARRIVAL, HEAD
from .._run import Run

TASK = "task of the row"  # a label while rows are read: "task" itself is never a column's


@dataclass(frozen=True)
class Given:
    """Files of one task of a run; of several, where `task` is None and a column of theirs names each row's."""

    task: str | None
    files: tuple[str, ...]

    @property
    def source(self) -> Any:
        return self.files[0] if len(self.files) == 1 else list(self.files)


@dataclass(frozen=True)
class Reading:
    """How files are read for a run.

    text, target, by: columns where they differ from the run's own. fixed: {label: value} of all rows, for labels that
    no column tells.
    """

    run: Run
    text: str | Sequence[str] | None = None
    target: str | None = None
    by: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        twice = [label for label in self.fixed if label in self.by or label == "task"]
        if twice:
            raise ConfigError(f"value: {twice[0]}={self.fixed[twice[0]]}: the label has a column; a task has --task.")

    @property
    def kinds(self) -> Mapping[str, str]:
        return self.run.known["kinds"]

    def given(self, files: Sequence[str], task: str | None = None) -> list[Given]:
        """FILE, or TASK=FILE, as tasks with their files; raises ConfigError for a task that is none of the run's."""
        several: dict[str | None, list[str]] = {}
        for file in files:
            name, equals, path = file.partition("=")
            named = bool(equals) and not Path(file).exists()
            several.setdefault(self.known(name, file) if named else self._one(file, task), []).append(
                path if named else file
            )
        return [Given(name, tuple(some)) for name, some in several.items()]

    def _one(self, file: str, task: str | None) -> str | None:
        if task is not None:
            return self.known(task, f"task={task!r}")
        if "task" in self.by:
            return None
        if len(self.kinds) > 1:
            raise ConfigError(
                f"{file}: the run has the tasks {listed(self.kinds)}. Say of which one this is, "
                f"{next(iter(self.kinds))}={file}; for rows of several, which column names it, --by task=COLUMN."
            )
        return next(iter(self.kinds))

    def known(self, task: str, where: str) -> str:
        """A task's name; raises ConfigError if the run has none of it."""
        if task not in self.kinds:
            near = get_close_matches(task, self.kinds, 1)
            more = f"did you mean {near[0]!r}?" if near else f"there are {listed(self.kinds)}."
            raise ConfigError(f"{where}: the run has no task {task!r}; {more}")
        return task

    def columns(self, task: str | None, labels: Sequence[str], wanted_target: bool) -> Columns:
        """The columns of a task, the run's own where nothing else is said."""
        config = self.run.config
        source = config.sources.get(task or next(iter(self.kinds)))
        text: Any = self.text or (config.text if source is None else source.text)
        target = self.target or (config.target if source is None else source.target)
        by = {
            label: self.by.get(label, config.by.get(label, label))
            for label in labels
            if label not in ("task", *self.fixed)
        }
        own = {TASK: self.by["task"]} if task is None else {}
        wanted = wanted_target and self.kind(task) not in ("causal", "masked")
        text = text if isinstance(text, str) else tuple(text)
        return Columns(text, target if wanted else None, {**by, **own}, fixed=self.fixed)

    def fits(self, labels: Sequence[str]) -> None:
        """Raise ConfigError for a label that is told of rows, but is not among those that rows are routed by."""
        known = {*labels, *self.run.config.by, "task"}
        for label, said in (*self.by.items(), *self.fixed.items()):
            if label not in known:
                near = get_close_matches(label, known, 1)
                more = f"did you mean {near[0]!r}?" if near else f"there are {listed(sorted(known))}."
                raise ConfigError(f"{label}={said}: no module is routed by a label {label!r}; {more}")

    def kind(self, task: str | None) -> str:
        return self.kinds[task] if task is not None else self.run.known["kind"]

    def stream(self, given: Given, labels: Sequence[str], patient: bool = False) -> Iterator[Row]:
        """The rows one at a time, without targets."""
        columns, kind = self.columns(given.task, labels, False), self.kind(given.task)
        rows = data.stream(given.source, columns, kind, given.task or "", wanted_target=False, patient=patient)
        return rows if given.task is not None else map(self._own, rows)

    def _own(self, row: Row) -> Row:
        """A row whose task a column told."""
        labels = dict(row.labels)
        task = self.known(labels.pop(TASK), row.where)
        return replace(row, task=task, labels={**labels, "task": task}, kind=self.kinds[task])

    def read(self, given: Given, labels: Sequence[str]) -> list[Row]:
        """All rows of one task, with targets, whose classes must be the run's."""
        assert given.task is not None, "a column that names tasks is for `stream`"
        columns, kind = self.columns(given.task, labels, True), self.kind(given.task)
        classes = self.run.known["classes"].get(given.task)
        return data.read(given.source, columns, kind, given.task, classes=classes, whole=False)


def routed_by(network: Network) -> list[str]:
    """The labels, beside the task, that rows need to find their modules."""
    words = [word for word in network.keywords if word not in ("task", HEAD, ARRIVAL)]
    return list(dict.fromkeys([*words, *(own.label for own in network.routes.own if own.label != "task")]))


def routes(network: Network, row: Row, unknown: str = "error") -> dict[str, str | None]:
    """The labels of a call for a row. unknown: with "base" a row whose label is new has its head, and no module."""
    try:
        return network.routes.of(row, network.keywords)
    except ConfigError as error:
        if unknown == "base":
            heads = network.routes.heads
            return {word: heads.get(row.task) if word == HEAD else None for word in network.keywords}
        raise ConfigError(f"{error} `--unknown base` takes the base with the task's head alone.") from None
