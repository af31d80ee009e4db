"""Retrieval as routing: the documents that share the query's rarest words are the modules that count.

Robertson, Walker, Jones, Hancock-Beaulieu and Gatford, "Okapi at TREC-3", 1994; with modules that stand in front of
the input, in-context retrieval augmentation: Ram et al., 2023 (arXiv 2302.00083).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, LabelError, listed
from ..types import System
from ._by_label import by_row

WORD = re.compile(r"\w+")
TESTS = ("tests/test_retrieval.py::test_bm25_by_hand", "tests/test_retrieval.py::test_documents_in_front_of_the_input")


class BM25(Router):
    """The k documents d with the highest Σ_{w ∈ q} idf(w) · tf_d(w) (k₁ + 1) / (tf_d(w) + k₁ (1 − b + b |d| / |d̄|)).

        modules = {name: mb.Prompt.of(text, tokenizer, learn=False) for name, text in documents.items()}
        bay = mb.attach(model, modules=modules, router=mb.BM25(documents, k=2), aggregator=mb.Concatenate())
        model(**batch, query=["who wrote Faust?", None])       # [d₁, d₂, x] in the first row, x in the second

    documents: texts by the names of modules; a module without a text is never retrieved. k: how many, best first; fewer
    where fewer share a word with q, and none for None. label: the keyword of a call that holds q. k1, b: k₁ and b.
    idf(w) = log(1 + (N − n_w + ½) / (n_w + ½)), of N documents n_w with w, as in Lucene, so that no word counts against
    a document. Words are runs of letters and digits, in lower case; |d| counts them. Raises LabelError for queries that
    are no texts, or a document that is no module.
    """

    reads_x: ClassVar[bool] = False
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (31,), 'mb.BM25({"faust": "Faust is a play by Goethe."}, k=1)', TESTS, "retrieval augmentation",
            "f([d_1, …, d_k, x]), d_i the k documents of the highest BM25", section="3.2",
        ),
    )  # fmt: skip

    def __init__(
        self, documents: Mapping[str, str], k: int = 1, label: str = "query", k1: float = 1.2, b: float = 0.75
    ):
        super().__init__()
        if k < 1 or not documents:
            raise CompositionError(f"BM25(documents of {len(documents)} names, k={k}): one of each at least.")
        self.documents, self.k, self.label, self.k1, self.b = dict(documents), k, label, k1, b
        self.keywords = (label,)
        self._count()

    def build(self, names: Sequence[str], site: Site) -> None:
        gone = set(self.names).difference(names)
        if gone:  # modules that were removed take their documents along
            self.documents = {name: text for name, text in self.documents.items() if name not in gone}
            self._count()
        self.place = {name: i for i, name in enumerate(names)}
        unknown = [name for name in self.documents if name not in self.place]
        if unknown:
            raise LabelError(f"BM25: the bay lacks the modules {listed(unknown)}, which have documents.")
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = tuple(new if name == old else name for name in self.names)
        self.documents = {new if name == old else name: text for name, text in self.documents.items()}
        self._count()

    def put(self, name: str, text: str) -> None:
        """A document more, or another text, for a module that the bay has."""
        if name not in self.names:
            raise LabelError(f"BM25.put({name!r}, …): no such module; there are {listed(self.names)}.")
        self.documents[name] = text
        self._count()

    def retrieve(self, query: str) -> list[tuple[str, float]]:
        """The k best documents for a query, best first, with their scores; ties in the order of the documents."""
        scores: dict[str, float] = {}
        for word in WORD.findall(query.lower()):
            for name, score in self.words.get(word, {}).items():
                scores[name] = scores.get(name, 0.0) + score
        return sorted(scores.items(), key=lambda pair: (-pair[1], self.order[pair[0]]))[: self.k]

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        given = c.label(self.label)
        if isinstance(given, Tensor):
            raise LabelError(f"{self.label}={tuple(given.shape)} {given.dtype}: a query is a text, one a row, or None.")
        if isinstance(given, str):
            ids = self._ids(given)
            return Routing(index=torch.tensor(ids, dtype=torch.long), host=(ids,))
        return by_row(tuple(self._ids(query) for query in given))

    def _ids(self, query: str | None) -> tuple[int, ...]:
        return () if query is None else tuple(self.place[name] for name, _ in self.retrieve(query))

    def _count(self) -> None:
        """What each word adds to the score of each document that has it."""
        counts = {name: Counter(WORD.findall(text.lower())) for name, text in self.documents.items()}
        self.order = {name: i for i, name in enumerate(counts)}
        mean = sum(count.total() for count in counts.values()) / max(1, len(counts))
        self.words: dict[str, dict[str, float]] = {}
        for name, count in counts.items():
            spread = self.k1 * (1 - self.b + self.b * count.total() / mean) if mean else 0.0
            for word, times in count.items():
                self.words.setdefault(word, {})[name] = times * (self.k1 + 1) / (times + spread)
        for several in self.words.values():
            idf = math.log(1 + (len(counts) - len(several) + 0.5) / (len(several) + 0.5))
            several.update({name: idf * score for name, score in several.items()})
