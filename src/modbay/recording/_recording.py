"""The recording of a bay, as it is read: tables by site, label and time, figures and sentences of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from ..abstract import Router
from ..core import Modular
from ..errors import CallError, LabelError, listed
from ..types import Labels
from ._alarms import alarms
from ._book import Book
from ._ledger import Ledger, Names
from ._table import Table


class Recording:
    """What the routers of a bay chose. `label` says labels of the calls that follow, beside those they have.

    A level is a place where a route is made: "" for a router that all sites share, else the site's name, and for a
    layer inside a module the site's name and the path in it. An example counts as one, however many tokens it has.
    """

    def __init__(self, bay: str, ledger: Ledger):
        self.bay, self.ledger = bay, ledger

    def label(self, **labels: Labels) -> "Recording":
        """Labels of the next calls: a name for all examples, a list with one an example (None: of none), or indices."""
        self.ledger.label(labels)
        return self

    @property
    def calls(self) -> int:
        """How many calls were recorded."""
        self.ledger.settle()
        return self.ledger.calls

    def labels(self) -> list[str]:
        """The labels that examples had."""
        self.ledger.settle()
        return list(dict.fromkeys(label for book in self.ledger.books.values() for label in book.values if label))

    def sites(self) -> list[str]:
        """The levels that were recorded, in order: "" is a router for all sites."""
        self.ledger.settle()
        return [level for book in self.ledger.books.values() for level in book.levels]

    def table(self, site: str | None = None, label: str | None = None) -> Table:
        """The joint table at a site, or over all sites that choose among the bay's modules; of a label, by default the
        only one there is; "" takes all examples together. Raises LabelError or CallError for what was not recorded."""
        return self._table(site, self._label(label))

    def over_time(self, site: str | None = None, label: str | None = "") -> list[tuple[int, int, Table]]:
        """(first call, last call, the table) of each window, oldest first."""
        label, book = self._label(label), self._book(site)
        last = [
            (k * self.ledger.each + 1, min((k + 1) * self.ledger.each, self.ledger.calls)) for k in sorted(book.windows)
        ]
        return [(*span, self._table(site, label, k)) for span, k in zip(last, sorted(book.windows), strict=True)]

    def tokens(self, site: str | None = None) -> dict[str, Counter[int]]:
        """How often each token id of the sample went to each module; `record(tokens=…)` keeps one."""
        self.ledger.settle()
        book = self._book(site)
        out: dict[str, Counter[int]] = {name: Counter() for name in book.modules}
        for level in book.levels if site is None else [site]:
            for name, counter in self.ledger.sample.read(level, book.modules).items():
                out[name] += counter
        return out

    def metrics(self) -> list[dict[str, Any]]:
        """A row for each site and label, "" being all examples: every figure of `Table.metrics`."""
        return [self.table(site, label).metrics() for site in self.sites() for label in self._labels(site)]

    def rows(self) -> list[dict[str, Any]]:
        """The mean weights, as `metrics.routes` has them: a row for each site and label, "" being all examples."""
        out = []
        for site in self.sites():
            for label in self._labels(site):
                told = self.table(site, label)
                row = {"bay": self.bay, "site": site, "label": label, "values": told.values, "modules": told.modules}
                out.append({**row, "weights": told.weights.tolist()})
        return out

    def alarms(self) -> list[str]:
        """What looks wrong with routers that learn, in sentences; none is no proof of health."""
        learned = [site for site in self.sites() if self.ledger.learned[site]]
        return alarms([[self.table(site, label) for label in self._labels(site)] for site in learned])

    def _labels(self, site: str) -> list[str]:
        """All examples first, then the labels in order."""
        return sorted(self._book(site).values)

    def _book(self, site: str | None) -> Book:
        self.ledger.settle()
        if not self.ledger.books:
            raise CallError(
                f"recording of bay {self.bay!r}: no router was called (when={self.ledger.when!r}). Calls of a compiled "
                f"model are seen if record() began before the first of them; what use() sets is no router's."
            )
        owner = self.ledger.owners.get(site, site) if site is not None else ""
        if owner not in self.ledger.books or (site is not None and site not in self.ledger.books[owner].levels):
            raise CallError(f"site={site!r} was not recorded; there are {listed(self.sites())}.")
        return self.ledger.books[owner]

    def _label(self, label: str | None) -> str:
        there = self.labels()
        if label is None and len(there) > 1:
            raise LabelError(f"table(label=None): {listed(there)} were recorded: name one, or '' for all examples.")
        label = (there or [""])[0] if label is None else label
        if label and label not in there:
            raise LabelError(f"label={label!r} was not recorded; there are {listed(there) or 'none'}.")
        return label

    def _table(self, site: str | None, label: str, window: int | None = None) -> Table:
        book = self._book(site)
        sums = book.read(label, window)[:, 1:]  # (levels, values, n + EXTRA, 2)
        sums = sums.sum(0) if site is None else sums[book.levels[site]]
        values = list(book.values.get(label, ()))
        order = sorted(range(len(values)), key=values.__getitem__)
        sums, n = sums[order], len(book.modules)
        examples = sums[:, n, 1]
        many = np.maximum(examples, 1)
        levels = len(book.levels) if site is None else 1  # an example is seen once at each
        return Table(
            self.bay, "all sites" if site is None else site, label, [values[i] for i in order], list(book.modules),
            sums[:, :n, 1] / levels, sums[:, :n, 0] / many[:, None], examples / levels, sums[:, n, 0] / many,
            sums[:, n + 1, 0] / levels,
        )  # fmt: skip


@contextmanager
def record(
    bay: str,
    names: Names,
    shared: Router | None,
    modulars: Mapping[str, Modular],
    *,
    when: str = "always",
    tokens: int = 0,
    values: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Recording]:
    """Record the routers of a bay for the length of a with-block: the shared one, each site's, and nested layers'."""
    own = [one for one in (shared, *(modular.router for modular in modulars.values())) if one is not None]
    known = {keyword: partial(_labels_of, one, names) for one in own for keyword in one.keywords}
    known |= {label: partial(list, several) for label, several in (values or {}).items()}
    ledger = Ledger(when, tokens, known)
    with ExitStack() as stack:
        stack.callback(ledger.label, {})  # sums what waits
        if shared is not None:
            stack.callback(ledger.watch("", shared, names).remove)
        for site, modular in modulars.items():
            for path, inner in modular.named_modules():
                if isinstance(inner, Modular) and inner.router is not None:
                    level = f"{site}.{path}" if path else site
                    inside = partial(getattr, inner.inventory, "names")
                    handle = ledger.watch(level, inner.router, inside if path else names, own=not path)
                    stack.callback(handle.remove)
        yield Recording(bay, ledger)


def _labels_of(router: Router, names: Names) -> Sequence[str]:
    """What a router's labels are as indices: its own list, else the modules."""
    return list(getattr(router, "labels", None) or names())
