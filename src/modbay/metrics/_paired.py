"""Two runs on the same rows: the difference of each metric, its interval, and whether it is shown.

Paired bootstrap: Efron and Tibshirani, 1993; Berg-Kirkpatrick, Burkett and Klein, 2012 (aclanthology.org/D12-1091).
Permutation (approximate randomisation): Noreen, 1989; Yeh, 2000 (aclanthology.org/C00-2137); p of drawn permutations:
Phipson and Smyth, 2010 (arXiv 1603.05766). Correction: Holm, 1979.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, listed
from ._records import Record
from ._scores import LOWER, Key, metrics_of, scorer
from ._table import Sample, by_task, centred, groups, joined, means, portions, quantiles, resampled, stream


@dataclass(frozen=True, slots=True)
class Difference:
    """a − b of a metric, for a cell as `Cell` has them.

    low, high: the interval of the difference. p: two-sided, corrected over the table. n: rows that both have; missing:
    rows of the cell that only one has, which don't count.
    """

    task: str
    label: str
    value: str
    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    n: int
    missing: int = 0


@dataclass(frozen=True, eq=False)
class Test:
    """A metric in both runs, its differences in bootstrap draws and under flips of sign, and an exact p if there is."""

    a: Sample
    b: Sample
    null: np.ndarray
    exact: float | None = None

    def p(self) -> float:
        """The share of permutations in which the difference is as large as it is."""
        if self.exact is not None:
            return self.exact
        smaller = (
            np.abs(self.null) < abs(self.a.estimate - self.b.estimate) - 1e-12
        )  # what is not defined isn't smaller
        return float((1 + np.sum(~smaller)) / (1 + len(self.null)))


def paired(
    records_a: Sequence[Record],
    records_b: Sequence[Record],
    kinds: Mapping[str, str],
    by: Sequence[str],
    *,
    metrics: Sequence[str] | None = None,
    draws: int = 1000,
    flips: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Difference]:
    """The differences a − b of each metric, by task and by the values of labels, on the rows that both runs have.

    Rows are joined on (task, where). The interval is of a bootstrap that draws rows for both runs alike. p is of a
    permutation test: if the two were one, what they say of a row could change sides; all 2^m changes are made if they
    are no more than `flips`, m being the rows of which they say different things. p is corrected by Holm's method over
    all differences that are returned; the more there are, the more flips are drawn, so that no p is out of reach.
    metrics: only these. A label of a single value is left out, for it asks nothing that the task does not ask.
    Raises DataError if no row joins, if a row comes twice, or if the two runs tell different targets of one row.
    """
    a, b, lost = _join(records_a, records_b)
    tasks_a, tasks_b = by_task(a, kinds, by), by_task(b, kinds, by)
    cells = {task: _groups(rows, by) for task, rows in tasks_a.items()}
    wanted = {task: [m for m in metrics_of(kinds[task]) if metrics is None or m in metrics] for task in cells}
    if not any(wanted.values()):
        raise DataError(f"metrics={list(metrics or ())!r}: no task has any of these.")
    tests = 2 * sum(len(cells[task]) * len(wanted[task]) for task in cells)  # at most
    flips = max(flips, math.ceil(4 * tests / (1 - level)))
    found: dict[tuple[str, str, str, str], Test] = {}
    for task in cells:
        for (label, value), some in cells[task].items():
            pair = [[rows[task][i] for i in some] for rows in (tasks_a, tasks_b)]
            tested = _tested(kinds[task], task, pair, draws, flips, (seed, task, label, value))
            found |= {(task, label, value, m): tested[m, ""] for m in wanted[task]}
    found |= _means(found)
    found = {k: t for k, t in found.items() if np.isfinite(t.a.estimate) and np.isfinite(t.b.estimate)}
    ps = holm([test.p() for test in found.values()])
    return [
        Difference(*key, t.a.estimate, t.b.estimate, t.a.estimate - t.b.estimate,
                   *quantiles(t.a.draws - t.b.draws, level), p, t.a.n, _missing(lost, *key[:3]))
        for (key, t), p in zip(found.items(), ps, strict=True)
    ]  # fmt: skip


def _join(records_a: Sequence[Record], records_b: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """(rows of a, the same rows of b, rows that only one has)."""
    both: list[dict[tuple[str, str], Record]] = []
    for name, several in (("a", records_a), ("b", records_b)):
        both.append({(r.task, r.where): r for r in several})
        if len(both[-1]) < len(several):
            seen: set[tuple[str, str]] = set()
            twice = {key for r in several if (key := (r.task, r.where)) in seen or seen.add(key)}
            raise DataError(f"records_{name}: rows come twice: {listed(sorted(where for _, where in twice), 5)}.")
    one, other = both
    keys = [key for key in one if key in other]
    if not keys:
        some = [listed((f"{task} {where}" for task, where in side), 2) for side in both]
        raise DataError(
            f"the two runs have no row in common, so that nothing can be compared: the first has {some[0] or 'none'}, "
            f"the second {some[1] or 'none'}. Evaluate both on the same files, called by the same paths."
        )
    said = lambda r: (r.target, r.tokens if r.nll is not None else 0)
    unlike = [key[1] for key in keys if said(one[key]) != said(other[key])]
    if unlike:
        raise DataError(
            f"the two runs tell different targets (or numbers of tokens) of {len(unlike)} rows: {listed(unlike, 5)}. "
            f"They were not tested on the same data, or not with the same tokeniser."
        )
    lost = [r for key, r in (one | other).items() if not (key in one and key in other)]
    return [one[key] for key in keys], [other[key] for key in keys], lost


def _missing(lost: Sequence[Record], task: str, label: str, value: str) -> int:
    return sum(
        (not task or r.task == task) and (not label or (r.labels.get(label) == value if value else label in r.labels))
        for r in lost
    )


def _groups(rows: Sequence[Record], by: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    found = groups(rows, by)
    values = [label for label, _ in found]
    return {key: some for key, some in found.items() if not key[0] or values.count(key[0]) > 1}


def _tested(kind: str, task: str, pair: Sequence[Sequence[Record]], draws: int, flips: int, names) -> dict[Key, Test]:
    """Every metric of one group of rows, tested. The scorer has the rows of a, then those of b: (2n, d)."""
    seed, *cell = names
    n, score = len(pair[0]), scorer(kind, task, [*pair[0], *pair[1]])
    both = lambda w: (score(np.concatenate([w, 0 * w])), score(np.concatenate([0 * w, w])))
    plain = both(np.ones((n, 1)))
    drawn = [both(w) for w in resampled(n, draws, stream(seed, "paired", *cell))]
    a, b = joined(one for one, _ in drawn), joined(other for _, other in drawn)
    differ = np.array([_says(r) != _says(s) for r, s in zip(*pair, strict=True)])
    null = _under(score, _flipped(differ, flips, stream(seed, "flips", *cell)))
    exact: dict[Key, float] = {}
    if 2 ** int(differ.sum()) <= flips:
        every = _under(score, _every(differ))
        size = {key: abs(plain[0][key] - plain[1][key]) - 1e-12 for key in every}
        exact = {key: float(np.mean(~(np.abs(value) < size[key]))) for key, value in every.items()}
    return {
        key: Test(centred(plain[0][key], a[key], n), centred(plain[1][key], b[key], n), null[key], exact.get(key))
        for key in plain[0]
    }


def _says(r: Record) -> tuple:
    return r.prediction, r.nll


def _under(score, several: Iterator[np.ndarray]) -> dict[Key, np.ndarray]:
    """The differences where the rows with a 1 have changed sides; each of `several` is (n, d)."""
    out = []
    for f in several:
        one, other = score(np.concatenate([1 - f, f])), score(np.concatenate([f, 1 - f]))
        out.append({key: one[key] - other[key] for key in one})
    return joined(out)


def _flipped(differ: np.ndarray, flips: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Which rows change sides, (n, d), by the toss of a coin; where both say the same, a change is none."""
    rows = np.flatnonzero(differ)
    for several in portions(len(differ), flips):
        f = np.zeros((len(differ), several))
        bits = generator.integers(0, 256, (len(rows), -(-several // 8)), np.uint8)
        f[rows] = np.unpackbits(bits, axis=1, count=several)
        yield f


def _every(differ: np.ndarray) -> Iterator[np.ndarray]:
    """All 2^m changes of sides, m the rows that differ."""
    rows = np.flatnonzero(differ)
    f = np.zeros((len(differ), 2 ** len(rows)))
    f[rows] = (np.arange(2 ** len(rows)) >> np.arange(len(rows))[:, None]) & 1
    yield f


def _means(found: Mapping[tuple[str, str, str, str], Test]) -> dict[tuple[str, str, str, str], Test]:
    """The means over values and tasks, as the table has them: every group is permuted in itself."""
    sides = [means({key: getattr(test, side) for key, test in found.items()}) for side in ("a", "b")]
    null = means({key: Sample(0.0, test.null, 0) for key, test in found.items()})
    return {key: Test(sides[0][key], sides[1][key], null[key].draws) for key in null}


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction: the i-th smallest p of m times m − i, from i = 0, never less than one before, at most 1."""
    corrected, most = [0.0] * len(ps), 0.0
    for i, place in enumerate(sorted(range(len(ps)), key=lambda j: ps[j])):
        most = max(most, min(1.0, (len(ps) - i) * ps[place]))
        corrected[place] = most
    return corrected


def verdict(differences: Sequence[Difference], a: str = "a", b: str = "b", *, level: float = 0.95) -> str:
    """What the differences show, in sentences, for all rows and then by the values of each label.

    A difference is shown if its corrected p is below 1 − level and its interval is to one side of zero. a, b: the names
    of the two. That none is shown is said as that, with the interval: it does not say that there is none.
    """
    if not differences:
        return "Nothing was compared: no metric is defined on the rows that both have."
    tasks = {d.task for d in differences}
    top = [d for d in differences if not d.label and (d.task == "" or "" not in tasks)]
    lines = [_sentence(d, a, b, level) for d in top]
    for task, label, metric in dict.fromkeys((d.task, d.label, d.metric) for d in differences if d.value):
        if task or "" not in tasks or not any(d.task and d.label == label and d.value for d in differences):
            some = [d for d in differences if (d.task, d.label, d.metric) == (task, label, metric) and d.value]
            lines.append(_by_value(some, a, b, level))
    missing = max(d.missing for d in differences)
    if missing:
        lines.append(f"{missing:,} rows are in only one of the two and don't count.")
    return "\n".join(lines)


def shown(d: Difference, level: float = 0.95) -> bool:
    """Whether a difference is shown."""
    return d.p < 1 - level and (d.low > 0 or d.high < 0)


def _sentence(d: Difference, a: str, b: str, level: float) -> str:
    what = f"{d.metric} of {d.task}" if d.task else d.metric
    facts = (
        f"{_plain(d.a)} against {_plain(d.b)}, a difference of {_signed(d.difference)} "
        f"({level:.0%} interval {_signed(d.low)} to {_signed(d.high)}, n = {d.n:,}, corrected p {_p(d.p)})"
    )
    if not shown(d, level):
        return f"{what}: no difference between {a} and {b} is shown: {facts}."
    better = (d.difference > 0) != (d.metric in LOWER)
    return f"{what}: {a} is {'better' if better else 'worse'} than {b}: {facts}."


def _by_value(some: Sequence[Difference], a: str, b: str, level: float) -> str:
    """One sentence for all values of a label."""
    clear = [d for d in some if shown(d, level)]
    head = f"{some[0].metric}{f' of {some[0].task}' if some[0].task else ''} by {some[0].label}: "
    if not clear:
        return f"{head}no difference between {a} and {b} is shown for any of {len(some)}."
    sides = []
    for word, good in (("better", True), ("worse", False)):
        here = [d for d in clear if ((d.difference > 0) != (d.metric in LOWER)) == good]
        if here:
            each = ", ".join(f"{d.value} ({_signed(d.difference)}, p {_p(d.p)})" for d in here)
            sides.append(f"{word} for {len(here)} of {len(some)}, {each}")
    rest = len(some) - len(clear)
    return f"{head}{a} is {'; '.join(sides)}" + (f"; none is shown for the other {rest}." if rest else ".")


def _plain(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.4g}"


def _signed(x: float) -> str:
    return ("−" if x < 0 else "+") + _plain(abs(x))


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"
