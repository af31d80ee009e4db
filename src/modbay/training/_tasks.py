"""A run's data: its tasks read, checked and split, with their classes and the values of their labels."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import data
from ..data import Columns, Row, Splits
from ..errors import ConfigError, listed
from . import _stream
from ._config import Config, Source


@dataclass(frozen=True)
class Tasks:
    """kind: of the network. kinds: of each task. classes: of each task, sorted. values: {label: {value: safe name}}."""

    kind: str
    kinds: dict[str, str]
    classes: dict[str, list[str]]
    values: dict[str, dict[str, str]]
    splits: Splits
    files: list[dict[str, Any]]
    sizes: dict[str, int] = field(default_factory=dict)  # training rows of each task, where they are not held

    @property
    def known(self) -> dict[str, Any]:
        """All but the rows, as JSON takes it."""
        return {"kind": self.kind, "kinds": self.kinds, "classes": self.classes}


def columns(config: Config, source: Source, fixed: Mapping[str, str] | None = None) -> Columns:
    """Which column of a source is what; `fixed` are labels that are the same in all of its rows."""
    text: Any = source.text if isinstance(source.text, str) else tuple(source.text or ())
    target = None if source.kind in ("causal", "masked") else source.target
    by = {label: column for label, column in config.by.items() if label not in (fixed or {})}
    return Columns(text=text, target=target, labels=by, group=config.group, fixed=fixed or {})


def read_tasks(config: Config) -> Tasks:
    """Read all of a run's data; raises DataError or ConfigError before anything is made."""
    kinds = {name: source.kind or "classification" for name, source in config.sources.items()}
    kind = network_kind(kinds)
    if config.streaming:
        return streamed(config, kind, kinds)
    splits, files = Splits(), []
    for name, source in config.sources.items():
        mine = read_source(config, name, source)
        splits += mine
        for part, rows in mine.items():
            said = {"task": name, "split": part, "path": _path(source, part), "rows": len(rows)}
            files.append({**said, "sha256": data.digest(rows)})
    return Tasks(kind, kinds, classes_of(kinds, splits.train), values_of(splits), splits, files)


def streamed(config: Config, kind: str, kinds: dict[str, str]) -> Tasks:
    """What one pass over data that is not held tells."""
    _stream.check(config)
    found = {
        name: _stream.Survey(config, name, source, columns(config, source)) for name, source in config.sources.items()
    }
    splits, files, classes = Splits(), [], {}
    values: dict[str, set[str]] = {}
    for name, one in found.items():
        splits += one.splits
        path = {part: _path(config.sources[name], part) for part in one.counts}
        said = [
            {"task": name, "split": part, "path": path[part], "rows": n, "sha256": one.digest}
            for part, n in one.counts.items()
        ]
        files += said
        if kinds[name] in ("classification", "tagging"):
            classes[name] = sorted(one.classes)
        for label, several in one.values.items():
            values.setdefault(label, set()).update(several)
    for task, several in classes.items():
        _two(task, several)
    sizes = {name: one.counts["train"] for name, one in found.items()}
    return Tasks(kind, kinds, classes, named(values), splits, files, sizes)


def read_source(config: Config, name: str, source: Source) -> Splits:
    """Training, validation and test rows of one task: as its files say, else by share."""
    given = {part: getattr(source, part) for part in ("validation", "test")}
    files = {part: value for part, value in given.items() if isinstance(value, str)}
    share: dict[str, Any] = {part: 0.0 if part in files else float(value) for part, value in given.items()}  # type: ignore[arg-type]
    where = {"train": source.path, **files} if files else source.path
    kind = source.kind or "classification"
    return data.load(where, columns(config, source), kind, name, **share, seed=config.seed)


def network_kind(kinds: dict[str, str]) -> str:
    """The one kind of network that these kinds of tasks can share."""
    needed = {"classification" if kind == "regression" else kind for kind in kinds.values()}
    if len(needed) > 1:
        said = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ConfigError(
            f"data: tasks of these kinds can't share one network ({said}): classification and regression can; "
            f"tagging, causal, masked and seq2seq each need a run of their own."
        )
    return needed.pop()


def _path(source: Source, part: str) -> str:
    given = getattr(source, part, None)
    path = given if isinstance(given, str) else source.path
    return ", ".join(path) if isinstance(path, list) else str(path)


def classes_of(kinds: dict[str, str], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The classes or tags of each task that has such, sorted."""
    found: dict[str, set[str]] = {task: set() for task, kind in kinds.items() if kind in ("classification", "tagging")}
    for row in rows:
        if row.task in found:
            found[row.task].update(row.target if isinstance(row.target, tuple) else [row.target])  # type: ignore[list-item]
    for task, several in found.items():
        _two(task, several)
    return {task: sorted(several) for task, several in found.items()}


def _two(task: str, classes: Collection[str]) -> None:
    if len(classes) < 2:
        raise ConfigError(
            f"task {task!r}: all training rows have the class {listed(classes)}; there is nothing to learn. Is target "
            f"the right column?"
        )


def values_of(splits: Splits) -> dict[str, dict[str, str]]:
    """Each label's values, sorted, with the names that modules may have."""
    seen: dict[str, set[str]] = {}
    for row in [*splits.train, *splits.validation, *splits.test]:
        for label, value in row.labels.items():
            seen.setdefault(label, set()).add(value)
    return named(seen)


def named(seen: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """The names that modules may have, by label and value."""
    tables = {label: data.slugs(sorted(several)) for label, several in seen.items()}
    return {label: {value: name for name, value in table.items()} for label, table in tables.items()}


def absolute(config: Config) -> Config:
    """With paths that do not depend on where the command was given."""

    def whole(path: Any) -> Any:
        if isinstance(path, list):
            return [whole(one) for one in path]
        return str(Path(path).resolve()) if isinstance(path, str) and Path(path).exists() else path

    def source(one: Any) -> Any:
        if not isinstance(one, Source):
            return whole(one)
        return one.model_copy(update={key: whole(getattr(one, key)) for key in ("path", "validation", "test")})

    given = (
        {name: source(one) for name, one in config.data.items()}
        if isinstance(config.data, dict)
        else whole(config.data)
    )
    places = {key: whole(getattr(config, key)) for key in ("base", "validation", "test")}
    return config.model_copy(update={"data": given, **places})
