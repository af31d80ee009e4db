"""Several methods on the same rows, each with one run a seed: their figures, and the difference of every two.

Rows and seeds drawn independently of each other: Owen, "The pigeonhole bootstrap", 2007 (arXiv 0712.1111). One cluster
fewer than there are, for an unbiased variance: Rao and Wu, 1988. Correction: Holm, 1979.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..errors import DataError, listed
from ._paired import holm
from ._records import Record
from ._scores import metrics_of, scorer
from ._table import Sample, centred, quantiles, resampled, stream

Runs = Mapping[str, Sequence[Sequence[Record]]]
"""The test records of each method, those of one seed after those of another."""

DRAWS = 10_000


@dataclass(frozen=True, eq=False)
class Standing:
    """A method's figure: the mean over tasks, and in each over the values of the label; then by (task, value).

    estimate and all: NaN where the metric is not defined. sample: the draws, the same rows and seeds for every method.
    """

    metric: str
    estimate: float
    low: float
    high: float
    by: dict[tuple[str, str], Sample]
    sample: Sample


@dataclass(frozen=True, slots=True)
class Gap:
    """a − b: its interval, and its p, corrected over all pairs of methods."""

    difference: float
    low: float
    high: float
    p: float


def standings(
    runs: Runs, kinds: Mapping[str, str], label: str | None, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> dict[str, Standing]:
    """Each method's figure with its interval, by its tasks' main metric; "score" where tasks have different ones.

    A draw takes rows with replacement within each value of the label, a row that several seeds test being one row; and,
    of S seeds, S − 1 with replacement: what two trainings of one method differ by is in the interval, though of few
    seeds it is known badly. All methods get the same draws, so that differences of draws are paired.
    Raises DataError if methods were not tested on the same rows.
    """
    seeds = _seeds(runs)
    draws = max(draws, math.ceil(4 * math.comb(len(runs), 2) / (1 - level)))  # so that no corrected p is out of reach
    counts = _counts(seeds, draws, stream(seed, "seeds"))
    found: dict[str, dict[tuple[str, str], Sample]] = {name: {} for name in runs}
    for task, value in _cells(runs, label):
        here = {
            name: [[r for r in one if r.task == task and _value(r, label) == value] for one in several]
            for name, several in runs.items()
        }
        metric = metrics_of(kinds[task])[0]
        several = _sampled(here, kinds[task], task, metric, counts, stream(seed, "rows", task, value))
        for name, sample in several.items():
            found[name][task, value] = sample
    names = {metrics_of(kinds[task])[0] for task, _ in next(iter(found.values()))}
    metric = names.pop() if len(names) == 1 else "score"
    return {name: _standing(metric, by, level) for name, by in found.items()}


def gaps(found: Mapping[str, Standing], *, level: float = 0.95) -> dict[tuple[str, str], Gap]:
    """The difference of every two methods, both ways.

    p: how often the draws are as far from their mean as that is from nought. It is corrected by Holm's method over all
    pairs, so that one may look at any of them, at the best one's too.
    """
    pairs = [pair for pair in combinations(found, 2) if all(np.isfinite(found[name].estimate) for name in pair)]
    out, ps = {}, []
    for a, b in pairs:
        difference = found[a].estimate - found[b].estimate
        away = found[a].sample.draws - found[b].sample.draws
        away = away[np.isfinite(away)]
        ps.append(float((1 + np.sum(np.abs(away - difference) >= abs(difference) - 1e-12)) / (1 + len(away))))
        out[a, b] = (difference, *quantiles(away, level))
    made: dict[tuple[str, str], Gap] = {}
    for (a, b), p in zip(pairs, holm(ps), strict=True):
        difference, low, high = out[a, b]
        made[a, b], made[b, a] = Gap(difference, low, high, p), Gap(-difference, -high, -low, p)
    return made


def differ(gap: Gap | None, level: float = 0.95) -> bool:
    """Whether a difference is shown."""
    return gap is not None and gap.p < 1 - level and (gap.low > 0 or gap.high < 0)


def _seeds(runs: Runs) -> int:
    """How many seeds there are; raises DataError where two methods were not tested on the same rows."""
    first, *others = runs
    keys = [{(r.task, r.where): r.target for r in one} for one in runs[first]]
    for name in others:
        mine = [{(r.task, r.where): r.target for r in one} for one in runs[name]]
        if mine != keys:
            raise DataError(f"{name!r} was not tested on the same rows as {first!r}, so that they can't be compared.")
    if not keys or not all(keys):
        raise DataError(f"{listed(runs)}: there are no test rows, so that nothing can be compared.")
    return len(keys)


def _value(record: Record, label: str | None) -> str:
    return record.labels.get(label, "") if label else ""


def _cells(runs: Runs, label: str | None) -> list[tuple[str, str]]:
    """The tasks and values that there are, in order."""
    return sorted({(r.task, _value(r, label)) for one in next(iter(runs.values())) for r in one})


def _counts(seeds: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """How much each seed counts in each draw, (S, d); they sum to 1."""
    if seeds == 1:
        return np.ones((1, draws))
    chosen = generator.integers(0, seeds, (seeds - 1, draws))
    return np.stack([(chosen == s).mean(0) for s in range(seeds)])


def _sampled(
    here: Runs, kind: str, task: str, metric: str, counts: np.ndarray, generator: np.random.Generator
) -> dict[str, Sample]:
    """A cell's metric for each method: its mean over seeds, and that of each draw."""
    first = next(iter(here.values()))
    places = {where: i for i, where in enumerate(dict.fromkeys(r.where for one in first for r in one))}
    scores = {
        name: [(scorer(kind, task, rows), [places[r.where] for r in rows]) for rows in several if rows]
        for name, several in here.items()
    }
    seen = [s for s, rows in enumerate(first) if rows]  # seeds that test any row of the cell
    drawn: dict[str, list] = {name: [[] for _ in seen] for name in here}
    for w in resampled(len(places), counts.shape[1], generator):
        for name, several in scores.items():
            for i, (score, rows) in enumerate(several):
                drawn[name][i].append(score(w[rows])[metric, ""])
    out = {}
    for name, several in scores.items():
        plain = np.mean([score(np.ones((len(rows), 1)))[metric, ""] for score, rows in several], 0)
        values = np.stack([np.concatenate(portions) for portions in drawn[name]])
        out[name] = centred(plain, _weighed(values, counts[seen]), len(places))
    return out


def _weighed(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over the seeds of a draw, (d,), of those in which the metric is defined; NaN if it is in none."""
    known = np.isfinite(values) & (counts > 0)
    total = np.where(known, counts, 0).sum(0)
    return np.divide(
        np.where(known, values * counts, 0).sum(0), total, out=np.full(len(total), np.nan), where=total > 0
    )


def _standing(metric: str, by: Mapping[tuple[str, str], Sample], level: float) -> Standing:
    """The mean over values, then over tasks."""
    tasks: dict[str, list[Sample]] = {}
    for (task, _), sample in by.items():
        tasks.setdefault(task, []).append(sample)
    estimate = float(np.mean([np.mean([s.estimate for s in several]) for several in tasks.values()]))
    drawn = np.mean([np.mean([s.draws for s in several], 0) for several in tasks.values()], 0)
    sample = Sample(estimate, drawn, sum(s.n for s in by.values()), False)
    low, high = quantiles(drawn, level) if np.isfinite(estimate) else (math.nan, math.nan)
    return Standing(metric, estimate, low, high, dict(by), sample)
