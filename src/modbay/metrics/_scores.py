"""Scores of rows that are weighed: one function gives a metric's value, its bootstrap, and its permutations.

A scorer maps weights W (n, d), how often each of n rows counts in each of d draws, to {(metric, class): (d,)}. Nearly
all metrics are functions of sums over rows, so that a draw is a column of S W, with S (k, n) what a row adds.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import DataError, listed
from ._records import Record
from ._spans import spans

Key = tuple[str, str]  # (metric, class; "" for all)
Scorer = Callable[[np.ndarray], dict[Key, np.ndarray]]

LOWER = ("rmse", "perplexity")  # less is better


def scorer(kind: str, task: str, rows: Sequence[Record]) -> Scorer:
    """The scorer of a task's rows. kind: "classification", "regression", "tagging", "causal", "masked" or "seq2seq".

    Raises DataError for a kind that there isn't, and for records that lack what the kind's metrics need.
    """
    if kind not in SCORERS:
        raise DataError(f"task {task!r} has the kind {kind!r}; the kinds are {listed(SCORERS)}.")
    return SCORERS[kind](task, rows)


def metrics_of(kind: str) -> tuple[str, ...]:
    """The metrics of a kind of task, the most telling first; those of single classes left out."""
    names = {"classification": ("accuracy", "macro_f1"), "regression": ("pearson", "spearman", "rmse")}
    return names.get(kind) or (("span_f1", "token_accuracy") if kind == "tagging" else ("perplexity",))


def _classification(task: str, rows: Sequence[Record]) -> Scorer:
    """Accuracy, and F1 by class and as a mean over the classes that occur in the targets.

    scikit-learn's macro average counts those that are only predicted, too; with `labels=` the targets' it is this one.
    """
    _need(task, rows, lambda r: isinstance(r.target, str) and isinstance(r.prediction, str), "a class and a prediction")
    classes = sorted({str(r.target) for r in rows})
    number, n = {name: i for i, name in enumerate(classes)}, len(classes)
    cells = []
    for i, r in enumerate(rows):
        said, true = number.get(r.prediction, -1), number[r.target]  # type: ignore[arg-type]
        cells += [(2 * n + true, i)] + ([(n + said, i)] if said >= 0 else []) + ([(true, i)] if said == true else [])
    sums = _summing(cells, 3 * n, len(rows))

    def score(w: np.ndarray) -> dict[Key, np.ndarray]:
        hit, said, true = np.split(sums @ w, 3)
        f1 = _ratio(2 * hit, said + true)
        macro = _ratio(np.where(true > 0, f1, 0).sum(0), (true > 0).sum(0))
        out = {("accuracy", ""): _ratio(hit.sum(0), true.sum(0)), ("macro_f1", ""): macro}
        return out | {("f1", name): f1[i] for i, name in enumerate(classes)}

    return score


def _regression(task: str, rows: Sequence[Record]) -> Scorer:
    """Pearson's and Spearman's correlation, and the root of the mean squared error."""
    _need(task, rows, lambda r: _number(r.target) and _number(r.prediction), "a number and a predicted number")
    x, y = (np.array([getattr(r, name) for r in rows], float) for name in ("target", "prediction"))
    centred = [v - v.mean() for v in (x, y)]  # sums of squares lose digits where the mean is large
    u, v = centred
    sums = np.stack([np.ones_like(x), u, v, u * u, v * v, u * v, (x - y) ** 2])
    places = [np.unique(values, return_inverse=True)[1] for values in (x, y)]

    def score(w: np.ndarray) -> dict[Key, np.ndarray]:
        n, u, v, uu, vv, uv, error = sums @ w
        spread = np.sqrt(_spread(uu, u, n) * _spread(vv, v, n))
        return {
            ("pearson", ""): _ratio(uv - u * v / n, spread),
            ("spearman", ""): _correlated(w, *[_ranks(w, place) for place in places]),
            ("rmse", ""): np.sqrt(error / n),
        }

    return score


def _spread(squares: np.ndarray, total: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Σ (u − ū)², exactly 0 where only rounding is left of it."""
    spread = squares - total * total / n
    return np.where(spread > 1e-12 * squares, spread, 0)


def _ranks(w: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The mean rank of each row in each draw, less the mean of all; ties share one. place: a row's, by value."""
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    several = np.add.reduceat(w[order], starts, axis=0)  # how many rows have each value
    return (np.cumsum(several, 0) - (several - 1) / 2 - (w.sum(0) + 1) / 2)[place]


def _correlated(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The correlation of what is centred, weighed."""
    return _ratio((w * x * y).sum(0), np.sqrt((w * x * x).sum(0) * (w * y * y).sum(0)))


def _tagging(task: str, rows: Sequence[Record]) -> Scorer:
    """F1 of spans, over all types and by type, and the share of tags that are right."""
    _need(task, rows, _paired_tags, "one tag and one predicted tag a word")
    pairs = [(spans(r.target), spans(r.prediction)) for r in rows]  # type: ignore[arg-type]
    types = sorted({kind for pair in pairs for found in pair for *_, kind in found})
    number, n, true = {name: i for i, name in enumerate(types)}, len(types), {t for p in pairs for *_, t in p[0]}
    cells = []
    for i, (r, (gold, said)) in enumerate(zip(rows, pairs, strict=True)):
        for block, found in enumerate((gold & said, said, gold)):
            cells += [(block * n + number[kind], i) for *_, kind in found]
        cells += [(3 * n, i)] * sum(a == b for a, b in zip(r.target, r.prediction, strict=True))  # type: ignore
        cells += [(3 * n + 1, i)] * len(r.target)  # type: ignore[arg-type]
    sums = _summing(cells, 3 * n + 2, len(rows))

    def score(w: np.ndarray) -> dict[Key, np.ndarray]:
        total = sums @ w
        hit, said, gold = np.split(total[: 3 * n], 3)
        out = {
            ("span_f1", ""): _ratio(2 * hit.sum(0), said.sum(0) + gold.sum(0)),
            ("token_accuracy", ""): _ratio(total[-2], total[-1]),
        }
        each = _ratio(2 * hit, said + gold)
        return out | {("f1", name): each[i] for i, name in enumerate(types) if name in true}

    return score


def _language(task: str, rows: Sequence[Record]) -> Scorer:
    """Perplexity, exp(Σ −log p / tokens): a ratio of sums over rows."""
    _need(task, rows, lambda r: _number(r.nll), "an nll, summed over its tokens")
    sums = np.array([[r.nll for r in rows], [r.tokens for r in rows]], float)

    def score(w: np.ndarray) -> dict[Key, np.ndarray]:
        nll, tokens = sums @ w
        return {("perplexity", ""): np.exp(_ratio(nll, tokens))}

    return score


SCORERS: dict[str, Callable[[str, Sequence[Record]], Scorer]] = {
    "classification": _classification,
    "regression": _regression,
    "tagging": _tagging,
    "causal": _language,
    "masked": _language,
    "seq2seq": _language,
}


def _paired_tags(r: Record) -> bool:
    a, b = r.target, r.prediction
    return isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b)


def _summing(cells: Sequence[tuple[int, int]], k: int, n: int):
    """S (k, n), one for each pair (what, row), added where a pair comes twice."""
    where = np.array(cells, dtype=np.int64).reshape(-1, 2).T
    from scipy.sparse import coo_array  # noqa: PLC0415 (slow to import)

    return coo_array((np.ones(where.shape[1]), (where[0], where[1])), shape=(k, n)).tocsr()


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and NaN where b is 0: the metric is not defined there."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _need(task: str, rows: Sequence[Record], has: Callable[[Record], bool], what: str) -> None:
    bad = [r.where for r in rows if not has(r)]
    if bad:
        raise DataError(f"task {task!r}: {len(bad)} of {len(rows)} records lack {what}: {listed(bad, 5)}.")
