"""Parts for training, validation and test: as given, or drawn by a seed so that no text and no group is in two."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import DataError, listed
from ._files import SPLITS, Source
from ._read import check, given, read
from ._row import Columns, Row

BINS = 5  # of a number to be predicted, with as many rows in each


@dataclass(frozen=True)
class Splits:
    """The rows to learn from, to choose by, and to judge by."""

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)

    def items(self) -> list[tuple[str, list[Row]]]:
        """(name, rows) of each."""
        return [(name, getattr(self, name)) for name in SPLITS]

    def __add__(self, other: "Splits") -> "Splits":
        """The rows of both, as for two tasks."""
        return Splits(*(rows + getattr(other, name) for name, rows in self.items()))


def load(
    source: Source | Mapping[str, Source],
    columns: Columns,
    kind: str,
    task: str,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    stratified: bool = True,
    revision: str | None = None,
) -> Splits:
    """Read a source as three parts: those that it names are taken as they are, the others are drawn from train.

    source: as for `read`, or one for each part, {"train": …, "test": …}. Raises DataError as `read` and `split` do.
    """
    parts = _parts(source, columns, kind, task, revision)
    if parts is None:
        rows = read(source, columns, kind, task, revision=revision)  # type: ignore[arg-type]
        return split(rows, validation=validation, test=test, seed=seed, stratified=stratified)
    check([row for rows in parts.values() for row in rows], columns, kind, task, str(source), whole=False)
    drawn = {"validation": validation, "test": test}
    wanted = {name: 0.0 if name in parts else fraction for name, fraction in drawn.items()}
    if any(wanted.values()):
        made = split(parts["train"], **wanted, seed=seed, stratified=stratified)
        parts = {name: parts.get(name, rows) if name != "train" else rows for name, rows in made.items()}
    return Splits(**parts)


def _parts(source, columns: Columns, kind: str, task: str, revision: str | None) -> dict[str, list[Row]] | None:
    """The rows by the parts that a source names; None if it names none."""
    if isinstance(source, Mapping):
        unknown = [name for name in source if name not in SPLITS]
        if unknown or "train" not in source:
            raise DataError(f"data by part has {listed(source)}: the parts are {listed(SPLITS)}, train among them.")
        where = {name: (one, None) for name, one in source.items()}
    else:
        where = {name: (source, name) for name in given(source, revision)}
    if not where:
        return None
    if "train" not in where:
        raise DataError(f"{source} has {listed(where)} but no train: there is nothing to learn from.")
    parts = {}
    for name in [name for name in SPLITS if name in where]:
        one, inner = where[name]
        parts[name] = read(one, columns, kind, task, split=inner, revision=revision, whole=name == "train")
    return parts


def split(
    rows: Sequence[Row],
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    stratified: bool = True,
) -> Splits:
    """Draw validation and test from rows.

    Rows of one group, and rows of the same text (but for case and white space), stay together, in all tasks.
    stratified: each task, class (of a number: fifth) and combination of labels has its share in each part, as far as
    counts allow; a class or label value that has rows at all has some in train. The same rows and seed give the same
    parts, in whatever order the rows come. Raises DataError for
    fractions that leave no training data, and for too few rows.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise DataError(f"validation={validation}, test={test}: fractions from 0 that leave something to train on.")
    units = sorted(_units(rows), key=lambda unit: _draw(rows, unit, seed))
    strata = _strata(rows) if stratified else [(row.task,) for row in rows]
    fractions = {"train": 1 - validation - test, "validation": validation, "test": test}
    fractions = {name: f for name, f in fractions.items() if f > 0}
    part = _assign(rows, units, strata, fractions)
    _none_empty(rows, units, part, fractions)
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    of = {i: part[u] for u, unit in enumerate(units) for i in unit}
    for i, row in enumerate(rows):
        parts[of[i]].append(row)
    return Splits(**parts)


def _units(rows: Sequence[Row]) -> list[list[int]]:
    """Rows that must stay together: components of those that share a text or a group."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        for key in [("text", row.normal)] + ([] if row.group is None else [("group", row.group)]):
            parent[root(i)] = root(seen.setdefault(key, i))
    units: dict[int, list[int]] = defaultdict(list)
    for i in range(len(rows)):
        units[root(i)].append(i)
    return list(units.values())


def _strata(rows: Sequence[Row]) -> list[tuple]:
    """What has its share in each part: (task, class or fifth, labels)."""
    edges: dict[str, list[float]] = {}
    numbers: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if isinstance(row.target, float):
            numbers[row.task].append(row.target)
    for task, values in numbers.items():
        values.sort()
        edges[task] = [values[len(values) * k // BINS] for k in range(1, BINS)]
    out = []
    for row in rows:
        target = row.target if row.kind == "classification" else ""
        if isinstance(row.target, float):
            target = str(sum(row.target >= edge for edge in edges[row.task]))
        out.append((row.task, str(target), *sorted(row.labels.items())))
    return out


def _assign(rows, units, strata, fractions: Mapping[str, float]) -> list[str]:
    """The part of each unit. Those of several rows go where most is wanting, the largest first; the single rows then
    fill each stratum's share, fractions of a row carried on to the next, so that small strata count together. The last
    unit of a class or label value is train's."""
    quota = Counter(strata)
    have: dict[tuple, Counter] = {s: Counter() for s in quota}
    total: Counter = Counter()
    names = [{name for i in unit for name in _names(rows[i])} for unit in units]
    free = Counter(name for several in names for name in several)  # units that may yet be train's
    part = ["train"] * len(units)
    singles: dict[tuple, list[int]] = defaultdict(list)

    def fill(name: str, inside: Counter, size: int) -> float:
        of = sum(n / size * (have[s][name] + n) / (quota[s] * fractions[name]) for s, n in inside.items())
        return of + (total[name] + size) / (len(rows) * fractions[name])

    for u in sorted(range(len(units)), key=lambda u: -len(units[u])):
        if len(units[u]) == 1:
            singles[strata[units[u][0]]].append(u)
            continue
        inside, size = Counter(sorted(strata[i] for i in units[u])), len(units[u])
        if all(free[name] > 1 for name in names[u]):
            part[u] = min(fractions, key=lambda name: fill(name, inside, size))
        if part[u] != "train":
            free.subtract(names[u])
        total[part[u]] += size
        for s, n in inside.items():
            have[s][part[u]] += n
    carry = dict.fromkeys(fractions, 0.5)
    for s in sorted(singles):
        at = 0
        for name in [name for name in ("test", "validation") if name in fractions]:
            due = quota[s] * fractions[name] - have[s][name] + carry[name]
            for u in singles[s][at:]:
                if due < 1:
                    break
                at += 1
                if all(free[n] > 1 for n in names[u]):
                    part[u] = name
                    free.subtract(names[u])
                    due -= 1
            carry[name] = min(due, 1.0)  # what could not be had here is not taken from others
    return part


def _draw(rows: Sequence[Row], unit: Sequence[int], seed: int) -> bytes:
    """A number for a unit by the seed and its texts, whatever the order of rows."""
    first = min((rows[i].task, rows[i].normal) for i in unit)
    return hashlib.blake2b("\0".join((str(seed), *first)).encode(), digest_size=12).digest()


def _none_empty(rows, units, part: list[str], fractions: Mapping[str, float]) -> None:
    """Every task has rows in every part that is wanted, moved out of train if need be."""
    of: dict[str, list[int]] = defaultdict(list)
    for u, unit in enumerate(units):
        for task in sorted({rows[i].task for i in unit}):
            of[task].append(u)
    for task, own in of.items():
        if len(own) < len(fractions):
            raise DataError(
                f"task {task!r} has {len(own)} rows or groups that can be parted (same texts and groups stay "
                f"together), too few for {listed(fractions)}: add rows, or give validation and test files of their own."
            )
        for name in fractions:
            if all(part[u] != name for u in own):
                counts = Counter(part[u] for u in own)
                beside = Counter((part[u], rows[i].target) for u in own for i in units[u])
                several = [u for u in own if counts[part[u]] > 1]  # a target that stays without a row is missed most
                part[
                    min(several, key=lambda u: (-min(beside[part[u], rows[i].target] for i in units[u]), len(units[u])))
                ] = name


def _names(row: Row) -> Iterable[tuple]:
    """What must have been seen in training: the class and the label values of a task."""
    if row.kind == "classification":
        yield row.task, "", row.target
    for label, value in row.labels.items():
        yield row.task, label, value
