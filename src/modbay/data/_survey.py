"""What there is in the data, and what is wrong with it, before a step is taken."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import listed
from ._files import SPLITS
from ._row import Row
from ._split import Splits

FEW = 5  # training rows: a class with fewer is near-empty
SHOWN = 5  # examples of each thing
LONG = 100_000  # characters
SAME = "the same but for case and white space"  # what counts as one text here; nothing looser is looked for


@dataclass(frozen=True)
class Survey:
    """Figures and warnings about splits.

    counts: {task, split, label, value, rows}; label "" is all rows of the task. classes: {task, class, train,
    validation, test}. few: classes with less than five training rows. duplicates: {task, split, rows, examples}.
    leaks: {task, splits, rows, examples}, texts of one split in another. across: as leaks, in another task's split.
    conflicts: {task, texts, examples}, one text under different targets. unseen: {task, what, value, rows}, classes and
    label values outside train alone. longest: {where, characters, words}. warnings: sentences about all of these.
    """

    counts: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    few: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]
    leaks: list[dict[str, Any]]
    across: list[dict[str, Any]]
    conflicts: list[dict[str, Any]]
    unseen: list[dict[str, Any]]
    longest: list[dict[str, Any]]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def lines(self) -> Iterator[str]:
        """For a person: the counts by task, label and split, then the warnings."""
        rows: Mapping[tuple[str, str, str], Counter] = defaultdict(Counter)
        for cell in self.counts:
            rows[cell["task"], cell["label"], cell["value"]][cell["split"]] += cell["rows"]
        for (task, label, value), n in rows.items():
            name = f"  {label} {value}" if label else f"task {task}"
            yield f"{name}: " + ", ".join(f"{n[split]:,} {split}" for split in SPLITS)
            if not label:
                own = [c for c in self.classes if c["task"] == task]
                if own:
                    most = ", ".join(f"{c['class']} {c['train']:,}" for c in own[:8])
                    yield f"  {len(own)} classes: {most}{' …' if len(own) > 8 else ''}"
        yield from (f"warning: {warning}" for warning in self.warnings)


def survey(splits: Splits) -> Survey:
    """Count and compare all rows. Texts are the same if they are so but for case and white space; no others."""
    classes = _classes(splits)
    few = [c for c in classes if 0 < c["train"] < FEW]
    texts = _texts(splits)
    duplicates, leaks = _repeated(texts)
    found: dict[str, list[dict[str, Any]]] = {
        "counts": _counts(splits),
        "classes": classes,
        "few": few,
        "duplicates": duplicates,
        "leaks": leaks,
        "across": _across(texts),
        "conflicts": _conflicts(splits),
        "unseen": _unseen(splits),
        "longest": _longest(splits),
    }
    return Survey(**found, warnings=list(_warnings(found)))


def _counts(splits: Splits) -> list[dict[str, Any]]:
    counts: Counter = Counter()
    for split, rows in splits.items():
        for row in rows:
            counts[row.task, split, "", ""] += 1
            for label, value in row.labels.items():
                if label != "task":
                    counts[row.task, split, label, value] += 1
    order = sorted(counts.items(), key=lambda c: (c[0][0], c[0][2], c[0][3], SPLITS.index(c[0][1])))
    return [dict(zip(("task", "split", "label", "value"), key, strict=True), rows=n) for key, n in order]


def _classes(splits: Splits) -> list[dict[str, Any]]:
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for split, rows in splits.items():
        for row in rows:
            if row.kind == "classification" and row.target is not None:
                counts[row.task, str(row.target)][split] += 1
            elif row.kind == "tagging" and isinstance(row.target, tuple):
                for tag in row.target:
                    counts[row.task, tag][split] += 1
    order = sorted(counts.items(), key=lambda c: (c[0][0], -c[1].total(), c[0][1]))
    return [{"task": task, "class": name, **{s: n[s] for s in SPLITS}} for (task, name), n in order]


Texts = dict[str, list[tuple[str, Row]]]


def _texts(splits: Splits) -> Texts:
    """Each text that is there more than once, with (split, row) of all its places."""
    texts: Texts = defaultdict(list)
    for split, rows in splits.items():
        for row in rows:
            texts[row.normal].append((split, row))
    return {text: places for text, places in texts.items() if len(places) > 1}


def _repeated(texts: Texts) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(duplicates inside a split, leaks from one split to a later one), of the same task."""
    inside: dict[tuple, dict[str, Any]] = {}
    leaks: dict[tuple, dict[str, Any]] = {}
    for places in texts.values():
        first: dict[tuple[str, str], Row] = {}
        for split, row in places:
            here = (row.task, split)
            if here in first:
                entry = inside.setdefault(here, {"task": row.task, "split": split, "rows": 0, "examples": []})
                _note(entry, first[here], row)
            for earlier in SPLITS[: SPLITS.index(split)]:
                if (other := first.get((row.task, earlier))) is not None:
                    entry = leaks.setdefault(
                        (row.task, earlier, split),
                        {"task": row.task, "splits": [earlier, split], "rows": 0, "examples": []},
                    )
                    _note(entry, other, row)
            first.setdefault(here, row)
    return [inside[key] for key in sorted(inside)], [leaks[key] for key in sorted(leaks)]


def _note(entry: dict[str, Any], one: Row, other: Row) -> None:
    entry["rows"] += 1
    if len(entry["examples"]) < SHOWN:
        entry["examples"].append([one.where, other.where])


def _across(texts: Texts) -> list[dict[str, Any]]:
    """Training texts of one task among another's validation or test."""
    found: dict[tuple, dict[str, Any]] = {}
    for places in texts.values():
        trained = {row.task: row for split, row in reversed(places) if split == "train"}
        for split, row in places:
            for task, other in trained.items() if split != "train" else ():
                if task != row.task:
                    blank = {"tasks": [task, row.task], "splits": ["train", split], "rows": 0, "examples": []}
                    _note(found.setdefault((task, row.task, split), blank), other, row)
    return [found[key] for key in sorted(found)]


def _conflicts(splits: Splits) -> list[dict[str, Any]]:
    """One text of one task, with the same labels, under different targets."""
    first: dict[tuple, Row] = {}
    found: dict[str, dict[str, Any]] = {}
    counted = set()
    for _, rows in splits.items():
        for row in rows:
            if row.target is None or row.kind == "seq2seq":  # a text has many translations
                continue
            key = (row.task, row.normal, *sorted(row.labels.items()))
            other = first.setdefault(key, row)
            if other.target != row.target and key not in counted:
                counted.add(key)
                entry = found.setdefault(row.task, {"task": row.task, "texts": 0, "examples": []})
                entry["texts"] += 1
                if len(entry["examples"]) < SHOWN:
                    told = lambda r: r.target if isinstance(r.target, str | float) else " ".join(r.target)
                    entry["examples"].append([other.where, told(other), row.where, told(row)])
    return [found[task] for task in sorted(found)]


def _unseen(splits: Splits) -> list[dict[str, Any]]:
    def named(row: Row) -> Iterator[tuple[str, str, str]]:
        if row.kind == "classification" and row.target is not None:
            yield row.task, "class", str(row.target)
        elif row.kind == "tagging" and isinstance(row.target, tuple):
            yield from ((row.task, "tag", tag) for tag in sorted(set(row.target)))
        yield from ((row.task, label, value) for label, value in row.labels.items())

    learned = {name for row in splits.train for name in named(row)}
    rows = [*splits.validation, *splits.test]
    missed = Counter(name for row in rows for name in named(row) if name not in learned)
    return [{"task": t, "what": what, "value": v, "rows": n} for (t, what, v), n in sorted(missed.items())]


def _longest(splits: Splits) -> list[dict[str, Any]]:
    rows = [row for _, several in splits.items() for row in several]
    longest = sorted(rows, key=lambda row: -len(row.whole))[:SHOWN]
    return [{"where": r.where, "characters": len(r.whole), "words": len(r.whole.split())} for r in longest]


def _warnings(found: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    for leak in found["leaks"]:
        (one, other), n = leak["splits"], leak["rows"]
        yield (
            f"task {leak['task']!r}: {n:,} {other} {_rows(n)} of which the text is in {one}, too ({SAME}): figures on "
            f"them flatter. {_places(leak)}"
        )
    for leak in found["across"]:
        (one, other), n = leak["tasks"], leak["rows"]
        yield (
            f"{n:,} {leak['splits'][1]} {_rows(n)} of task {other!r} of which the text is in the training data of task "
            f"{one!r} ({SAME}): what the tasks share has seen it. {_places(leak)}"
        )
    for twice in found["duplicates"]:
        n = twice["rows"]
        yield f"task {twice['task']!r}: {n:,} {twice['split']} {_rows(n)} repeat a text ({SAME}). {_places(twice)}"
    for clash in found["conflicts"]:
        one, target, other, wrong = clash["examples"][0]
        yield (
            f"task {clash['task']!r}: {clash['texts']:,} text(s) with different targets, as {one} ({target!r}) and "
            f"{other} ({wrong!r}): no model can have both right."
        )
    for task in dict.fromkeys(few["task"] for few in found["few"]):
        own = [f"{few['class']!r} ({few['train']})" for few in found["few"] if few["task"] == task]
        more = f" … ({len(own)} in all)" if len(own) > SHOWN else ""
        yield f"task {task!r}: classes with fewer than {FEW} training rows: {', '.join(own[:SHOWN])}{more}."
    for task, what in dict.fromkeys((new["task"], new["what"]) for new in found["unseen"]):
        own = [new["value"] for new in found["unseen"] if (new["task"], new["what"]) == (task, what)]
        yield f"task {task!r}: {what} {listed(own, SHOWN)}: in validation or test, never in train."
    for long in found["longest"]:
        if long["characters"] > LONG:
            yield f"{long['where']}: a text of {long['characters']:,} characters; past the model's length it is cut."


def _rows(n: int) -> str:
    return "row" if n == 1 else "rows"


def _places(entry: Mapping[str, Any]) -> str:
    shown = "; ".join(" and ".join(pair) for pair in entry["examples"])
    return shown + (" …" if entry["rows"] > len(entry["examples"]) else "") + "."
