"""The ledger of a bay: its routers' choices, summed on the device as calls come.

Nothing is looked into during a forward: what routers gave is kept until the next call begins, and then summed for all
levels at once, with no value read back to the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing
from ..errors import CompositionError, LabelError, listed
from ..types import Labels
from ._book import NOBODY, Book
from ._routes import Seen, by_example
from ._tokens import Tokens

WHEN = ("always", "training", "evaluation")
WINDOWS = 32  # of time, at most; then each two become one
Names = Callable[[], Sequence[str]]


class Ledger:
    """What comes: routes, by level. known: what the indices of a label mean."""

    def __init__(self, when: str, tokens: int, known: Mapping[str, Names]):
        if when not in WHEN:
            raise CompositionError(f"record(when={when!r}): one of {listed(WHEN)}.")
        self.when, self.known = when, dict(known)
        self.books: dict[str, Book] = {}  # by what chooses among the same modules: "" the bay, else a level
        self.names: dict[str, Names] = {}
        self.owners: dict[str, str] = {}  # the book of each level
        self.learned: dict[str, bool] = {}
        self.beside: dict[str, Labels] = {}
        self.calls, self.each = 0, 1  # calls so far, and in a window
        self.sample = Tokens(tokens)
        self._waiting: list[Seen] = []
        self._call: Any = None
        self._modules: dict[str, list[str]] = {}  # of this call, by book: they may have changed before it is summed

    def label(self, labels: Mapping[str, Labels]) -> None:
        """Labels of the next calls, beside theirs."""
        self.settle()  # what waits had the labels before
        self.beside = dict(labels)

    def watch(self, level: str, router: Router, names: Names, own: bool = True) -> Any:
        """Look at a router until the handle that this returns is removed."""
        book = "" if own else level
        self.owners[level], self.names[book] = book, names
        self.learned[level] = any(True for _ in router.parameters())

        def keep(one: Any, args: tuple, routing: Routing) -> None:
            if one is router:  # a copy of the model has the hook, too
                self._keep(level, one, args[1], routing)

        quiet: Any = torch.compiler.disable(keep)  # a break in the graph: what is recorded is Python's
        return router.register_forward_hook(quiet)

    def _keep(self, level: str, router: Router, c: Context, routing: Routing) -> None:
        if self.when != "always" and router.training != (self.when == "training"):
            return
        if c.recomputing():
            return
        if c.losses is not self._call:  # of one call, whichever rows are in sight
            self.settle()
            self._call, self._modules = c.losses, {}
        owner = self.owners[level]
        if owner not in self._modules:
            self._modules[owner] = list(self.names[owner]())
        n = len(self._modules[owner])
        several = {level: routing} if routing.sites is None else {name: routing.at(name) for name in routing.sites}
        for name, route in several.items():
            self.owners.setdefault(name, owner)
            self.learned.setdefault(name, self.learned[level])
            self._waiting.append(Seen(name, route, c, n))

    def settle(self) -> None:
        """Sum what waits: the routes of one call."""
        waiting, self._waiting, self._call = self._waiting, [], None
        if not waiting:
            return
        groups: dict[tuple, list[Seen]] = {}
        for one in waiting:
            groups.setdefault((self.owners[one.level], *one.key), []).append(one)
        with torch.no_grad():
            for (owner, *_), some in groups.items():
                self._sum(owner, some)
            self.sample.add(list(groups.values()))
        self.calls += 1
        if self.calls == WINDOWS * self.each:
            self.each *= 2
            for book in self.books.values():
                book.merge()

    def _sum(self, owner: str, some: Sequence[Seen]) -> None:
        names = self._modules[owner]
        book = self.books.setdefault(owner, Book(names))
        c, window, levels = some[0].c, self.calls // self.each, [one.level for one in some]
        rows = by_example(some, c.mask)
        columns = book.columns(names)
        if columns is not None:  # modules have come or gone
            wide = rows.new_zeros(*rows.shape[:2], len(book.modules), 2)
            wide[:, :, columns] = rows[:, :, : len(names)]
            rows = torch.cat([wide, rows[:, :, len(names) :]], 2)
        first = torch.full((rows.shape[1],), book.place("", "all"), device=rows.device)
        book.add(window, "", levels, rows, first)
        for label, places in self._places(book, c, rows.device).items():
            if rows.shape[1] == 1 and len(places) > 1:  # one route for all
                mine = rows.expand(-1, len(places), -1, -1)
            elif len(places) == 1:
                mine, places = rows, places.expand(rows.shape[1])
            elif len(places) == rows.shape[1]:
                mine = rows
            else:
                raise LabelError(f"{label}={len(places)} labels for the routes of {rows.shape[1]} examples.")
            book.add(window, label, levels, mine, places)

    def _places(self, book: Book, c: Context, device: torch.device) -> dict[str, Tensor]:
        """The place of each example's value (b,), or of all (1,), by label."""
        out = {}
        c = replace(c, labels={**c.labels, **self.beside}) if self.beside else c
        for label in c.labels:
            given = c.label(label)
            if not isinstance(given, Tensor):
                given = [given] if isinstance(given, str) else given
                places = torch.tensor([book.place(label, value) for value in given], dtype=torch.long)
                out[label] = places.to(device, non_blocking=True)
            elif label in self.known:
                ids = [NOBODY, *(book.place(label, value) for value in self.known[label]())]
                table = torch.tensor(ids).to(device, non_blocking=True)
                out[label] = table[given.reshape(-1).to(device, non_blocking=True) + 1]
            elif label in self.beside:
                raise LabelError(
                    f"label({label}=…) with a tensor: what its numbers mean is said by record(values={{{label!r}: …}})."
                )
        return out
