"""The table of results: each metric by task, by label, by class, with intervals by bootstrap over rows.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993: percentile intervals, chapter 13; several samples,
chapter 8.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, listed
from ._records import Record
from ._scores import Key, Scorer, scorer

SIGNED = ("pearson", "spearman")
AT_ONCE = 2**22  # weights in memory


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the table: a metric of `n` rows, with its interval.

    task "": the mean over tasks. label "": all rows of the task; a label with the value "": the mean over its values.
    label "class": F1 of one class, or of one type of span.
    """

    task: str
    label: str
    value: str
    metric: str
    estimate: float
    low: float
    high: float
    n: int


def table(
    records: Sequence[Record],
    kinds: Mapping[str, str],
    by: Sequence[str],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Cell]:
    """The metrics of each task, for all its rows, for each value of the labels `by`, and for each class.

    kinds: each task's kind. Macro-F1 is over the classes that occur in the cell's targets. A mean over values, or over
    tasks, counts each alike; its draws are the means of theirs, each resampled within itself, so that its interval is
    of these values, not of values that weren't seen. A metric that is not defined for a cell (the correlation of a
    constant) is left out, and with it the means that would need it. An accuracy of 0 or 1 has Clopper and Pearson's
    bound, for a bootstrap of rows that are all alike can't vary; other metrics at their end have no width.
    Raises DataError for no records, a task without a kind, a label that no row has, and rows that lack what is scored.
    """
    found: dict[tuple[str, str, str, str], Sample] = {}
    for task, rows in by_task(records, kinds, by).items():
        for (label, value), some in groups(rows, by).items():
            score = scorer(kinds[task], task, [rows[i] for i in some])
            generator = stream(seed, "bootstrap", task, label, value)
            for (metric, name), sample in _sampled(score, len(some), draws, generator).items():
                if not name:
                    found[task, label, value, metric] = sample
                elif not label:
                    found[task, "class", name, metric] = sample
    found |= means(found)
    return [
        Cell(*key, s.estimate, *_interval(key, s, level), s.n) for key, s in found.items() if np.isfinite(s.estimate)
    ]


@dataclass(frozen=True, eq=False)
class Sample:
    """A metric's value, its value in each draw (d,), and the rows behind it."""

    estimate: float
    draws: np.ndarray
    n: int
    single: bool = True  # of one group of rows, not a mean over some


def _sampled(score: Scorer, n: int, draws: int, generator: np.random.Generator) -> dict[Key, Sample]:
    plain = score(np.ones((n, 1)))
    drawn = joined(score(w) for w in resampled(n, draws, generator))
    return {key: centred(value, drawn[key], n) for key, value in plain.items()}


def centred(plain: np.ndarray, draws: np.ndarray, n: int) -> Sample:
    """Draws moved to have the estimate as their mean.

    Macro-F1 and correlations of a resample are biased, for it has fewer different rows; in a mean over many groups the
    bias stays while the spread shrinks, until the estimate lies outside of its own percentiles.
    """
    estimate, defined = float(plain[0]), draws[np.isfinite(draws)]
    return Sample(estimate, draws + (estimate - defined.mean()) if len(defined) else draws, n)


def joined(several: Iterable[Mapping[Key, np.ndarray]]) -> dict[Key, np.ndarray]:
    """Scores that came in portions, in one."""
    portions = list(several)
    return {key: np.concatenate([portion[key] for portion in portions]) for key in portions[0]}


def resampled(n: int, draws: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn, (n, d), in portions: n rows drawn from n, with replacement."""
    for several in portions(n, draws):
        rows = generator.integers(0, n, size=(several, n), dtype=np.int32)
        flat = rows.astype(np.int64) * several + np.arange(several)[:, None]
        yield np.bincount(flat.ravel(), minlength=n * several).reshape(n, several).astype(float)


def portions(n: int, draws: int) -> Iterator[int]:
    """Draws in numbers that fit into memory."""
    most = max(1, AT_ONCE // max(n, 1))
    yield from (min(most, draws - done) for done in range(0, draws, most))


def stream(seed: int, *names: str) -> np.random.Generator:
    """Random numbers for one purpose, the same whatever else is computed."""
    return np.random.default_rng([seed, *[zlib.crc32(name.encode("utf-8", "replace")) for name in names]])


def by_task(records: Sequence[Record], kinds: Mapping[str, str], by: Sequence[str]) -> dict[str, list[Record]]:
    """The rows of each task, checked."""
    if not records:
        raise DataError("no records: there is nothing to score.")
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.task, []).append(record)
    lost = [task for task in found if task not in kinds]
    if lost:
        raise DataError(f"kinds={dict(kinds)!r} says nothing of the tasks {listed(lost)}, which have records.")
    labels = {label for record in records for label in record.labels} | {"task"}
    unknown = [label for label in by if label not in labels]
    if unknown:
        raise DataError(
            f"by={list(by)!r}: no record has a label {listed(unknown)}; there are {listed(sorted(labels))}."
        )
    return found


def groups(rows: Sequence[Record], by: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """Which of a task's rows are in each (label, value); ("", ""): all. Rows without the label are in none of its."""
    found: dict[tuple[str, str], list[int]] = {("", ""): list(range(len(rows)))}
    for label in dict.fromkeys(by):
        several: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if label != "task" and row.labels.get(label):  # the task has cells of its own already
                several.setdefault(row.labels[label], []).append(i)
        found |= {(label, value): several[value] for value in sorted(several)}
    return found


def means(found: Mapping[tuple[str, str, str, str], Sample]) -> dict[tuple[str, str, str, str], Sample]:
    """The means over the values of each label, then over tasks."""
    out = _means(found, lambda task, label, value, metric: label not in ("", "class") and (task, label, "", metric))
    return out | _means(
        {**found, **out}, lambda t, label, value, metric: label != "class" and ("", label, value, metric)
    )


def _means(found, to) -> dict[tuple[str, str, str, str], Sample]:
    several: dict[tuple[str, str, str, str], list[Sample]] = {}
    for key, sample in found.items():
        if target := to(*key):
            several.setdefault(target, []).append(sample)
    return {
        key: Sample(
            float(np.mean([s.estimate for s in some])),
            np.mean([s.draws for s in some], 0),
            sum(s.n for s in some),
            False,
        )
        for key, some in several.items()
        if len(some) > 1
    }


def quantiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval; draws in which the metric is not defined don't count. Without any it is NaN."""
    if np.isnan(draws).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _interval(key: tuple[str, ...], sample: Sample, level: float) -> tuple[float, float]:
    if key[3] == "accuracy" and sample.single and sample.estimate in (0, 1):
        bound = ((1 - level) / 2) ** (1 / sample.n)
        return (bound, 1.0) if sample.estimate else (0.0, 1 - bound)
    low, high = quantiles(sample.draws, level)
    least, most = {"rmse": (0, np.inf), "perplexity": (1, np.inf)}.get(key[3], (-1 if key[3] in SIGNED else 0, 1))
    return max(low, least), min(high, most)
