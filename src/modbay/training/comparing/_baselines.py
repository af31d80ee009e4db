"""What needs no base: the most frequent answer, and TF-IDF under a linear model, as references for what does.

TF-IDF: Spärck Jones, 1972; character n-grams within words: Cavnar and Trenkle, 1994. Add-one: Laplace; as a unigram
model: Jurafsky and Martin, "Speech and Language Processing", chapter 3.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline

from ...data import Row
from ...metrics import Record
from .._build import Network
from .._encode import IGNORED
from .._predict import batches
from .._score import score
from .._tasks import Tasks

PENALTIES = (1.0, 10.0, 100.0)  # C of logistic regression, 1/α of ridge regression
FEATURES = ("characters", "words")


@dataclass
class Said:
    """What a baseline says of the test rows, how many numbers it learned, and what it chose."""

    records: list[Record]
    parameters: int
    chosen: dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """title, and for which kinds of tasks there is one. run(tasks, label, network): label is the first to route by."""

    title: str
    kinds: tuple[str, ...]
    run: Callable[[Tasks, str | None, Network], Said]
    each: bool = False  # whether it has a model for each value of the label


Group = tuple[str, str]  # a task, and a value of the label


def _group(row: Row, label: str | None) -> Group:
    return row.task, row.labels.get(label, "") if label else ""


def majority(tasks: Tasks, label: str | None, network: Network) -> Said:
    """The most frequent class of the row's task and label value, and the mean of what is measured.

    Of tagged texts, each word's most frequent tag, and the most frequent of all for a word that is new. Of language
    models, every piece by its frequency, one added to each count.
    """
    if tasks.kind == "tagging":
        return _tags(tasks)
    if tasks.kind in ("causal", "masked", "seq2seq"):
        return _unigrams(tasks, network)
    known: dict[Group, list[Any]] = defaultdict(list)
    for row in tasks.splits.train:
        known[_group(row, label)].append(row.target)
        known[row.task, ""].append(row.target)  # for values that training has not seen
    most = {
        (task, value): fmean(several) if tasks.kinds[task] == "regression" else Counter(several).most_common(1)[0][0]
        for (task, value), several in known.items()
    }
    said = [most.get(_group(row, label), most[row.task, ""]) for row in tasks.splits.test]
    return Said([_record(row, one) for row, one in zip(tasks.splits.test, said, strict=True)], len(most), {})


def _tags(tasks: Tasks) -> Said:
    words: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for row in tasks.splits.train:
        for word, tag in zip(row.text, row.target or (), strict=True):  # type: ignore[arg-type]
            words[row.task, word.casefold()][tag] += 1
            words[row.task, ""][tag] += 1
    most = {key: counts.most_common(1)[0][0] for key, counts in words.items()}
    tell = lambda row: [most.get((row.task, word.casefold()), most[row.task, ""]) for word in row.text]
    return Said([_record(row, tell(row)) for row in tasks.splits.test], len(most), {})


def _unigrams(tasks: Tasks, network: Network) -> Said:
    """Each piece that is to be told, by how often the targets of training have it."""
    counts, size = Counter[int](), len(network.encoder.tokenizer)
    for told in _told(network, tasks.splits.train):
        counts.update(told)
    total = sum(counts.values()) + size
    out = []
    for row, told in zip(tasks.splits.test, _told(network, tasks.splits.test), strict=True):
        nll = sum(log(total / (counts[piece] + 1)) for piece in told)
        target: Any = row.target
        out.append(Record(row.where, row.task, dict(row.labels), target, None, None, nll, len(told)))
    return Said(out, size, {})


def _told(network: Network, rows: Sequence[Row]) -> list[list[int]]:
    """The pieces of each row that a model is to tell, as `predict` asks for them."""
    encoder = network.encoder
    examples = encoder.encode(rows, [{} for _ in rows])
    out: list[list[int]] = [[]] * len(rows)
    for places in batches(examples, 64):
        labels = encoder.collate([examples[i] for i in places], places[0])["labels"]
        for i, one in zip(places, labels[:, 1:] if encoder.kind == "causal" else labels, strict=True):
            out[i] = one[one != IGNORED].tolist()
    return out


def tfidf(tasks: Tasks, label: str | None, network: Network) -> Said:
    """One linear model a task on TF-IDF, for all values of the label."""
    return _chosen(tasks, None, label)


def tfidf_each(tasks: Tasks, label: str | None, network: Network) -> Said:
    """One linear model on TF-IDF for each task and value of the label, from its own rows."""
    return _chosen(tasks, label, label)


def _chosen(tasks: Tasks, each: str | None, by: str | None) -> Said:
    """First the features, then the penalty that do best on validation; without validation rows, the middle ones."""
    splits, tried = tasks.splits, {}
    asked = [*splits.validation, *splits.test]

    def learned(features: str, penalty: float) -> tuple[list[Record], int]:
        if (features, penalty) not in tried:
            tried[features, penalty] = linear(splits.train, asked, tasks.kinds, each, features, penalty)
        return tried[features, penalty]

    def how_good(features: str, penalty: float) -> float:
        said = learned(features, penalty)[0][: len(splits.validation)]
        return score(said, tasks.kinds, [by] if by else [])["score"]

    features, penalty = FEATURES[0], PENALTIES[1]
    if splits.validation:
        features = max(FEATURES, key=lambda one: how_good(one, penalty))
        penalty = max(PENALTIES, key=lambda one: how_good(features, one))
    records, parameters = learned(features, penalty)
    return Said(records[len(splits.validation) :], parameters, {"features": features, "penalty": penalty})


def linear(
    train: Sequence[Row],
    test: Sequence[Row],
    kinds: Mapping[str, str],
    each: str | None,
    features: str,
    penalty: float,
) -> tuple[list[Record], int]:
    """(records of the test rows, weights) of a linear model on TF-IDF for each task, and for each value of `each`.

    A value without training rows is told by all rows of its task.
    """
    groups: dict[Group, list[Row]] = defaultdict(list)
    for row in train:
        groups[_group(row, each)].append(row)
    asked: dict[Group, list[int]] = defaultdict(list)
    for i, row in enumerate(test):
        asked[_group(row, each)].append(i)
    records: list[Any] = [None] * len(test)
    weights = 0
    for (task, value), places in asked.items():
        own = groups.get((task, value)) or [row for row in train if row.task == task]
        said, count = _one(own, [test[i] for i in places], kinds[task], features, penalty)
        weights += count
        for i, record in zip(places, said, strict=True):
            records[i] = record
    return records, weights


def _one(
    train: Sequence[Row], test: Sequence[Row], kind: str, features: str, penalty: float
) -> tuple[list[Record], int]:
    target: list[Any] = [row.target for row in train]
    if len(set(target)) == 1:
        return [_record(row, target[0]) for row in test], 1
    last = Ridge(1 / penalty) if kind == "regression" else LogisticRegression(C=penalty, max_iter=200, tol=1e-3)
    model = make_pipeline(vectors(features), last)
    with warnings.catch_warnings():
        # One row a class: scikit-learn asks whether this is a regression. And 200 iterations are near enough.
        warnings.filterwarnings("ignore", "The number of unique classes is greater", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit([row.whole for row in train], target)
    learned = vars(last)
    return _records(model, test, kind), int(np.size(learned["coef_"]) + np.size(learned["intercept_"]))


def vectors(features: str) -> TfidfVectorizer:
    """n-grams of 1 to 4 characters within words, or words and pairs of words."""
    if features == "characters":
        return TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    return TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), sublinear_tf=True)


def _records(model: Pipeline, rows: Sequence[Row], kind: str) -> list[Record]:
    texts = [row.whole for row in rows]
    if kind == "regression":
        return [_record(row, float(one)) for row, one in zip(rows, model.predict(texts), strict=True)]
    likely = model.predict_proba(texts)
    names = [str(name) for name in model.classes_]
    place = {name: i for i, name in enumerate(names)}
    out = []
    for row, one in zip(rows, likely, strict=True):
        at = place.get(row.target)  # type: ignore[arg-type]
        nll = None if at is None else -log(max(float(one[at]), 1e-30))
        best = int(one.argmax())
        out.append(_record(row, names[best], float(one[best]), nll))
    return out


def _record(row: Row, said: Any, sure: float | None = None, nll: float | None = None) -> Record:
    target: Any = list(row.target) if isinstance(row.target, tuple) else row.target
    return Record(row.where, row.task, dict(row.labels), target, said, sure, nll, int(nll is not None))


MOST = ("classification", "regression", "tagging", "causal", "masked", "seq2seq")
BASELINES: dict[str, Baseline] = {
    "tfidf": Baseline("TF-IDF, one for all", MOST[:2], tfidf),
    "tfidf-each": Baseline("TF-IDF, one a value", MOST[:2], tfidf_each, each=True),
    "majority": Baseline("Most frequent answer", MOST, majority),
}
