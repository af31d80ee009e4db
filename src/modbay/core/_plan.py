"""Which rows go to which module: sorted once a routing, so that each site only slices.

A plan orders the (row, slot) pairs of a routing by module. Modules of one kind that get equally many rows stand side by
side and are run as one batched product; the others are segments of their own.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..abstract import Routing


@dataclass(frozen=True)
class Group:
    """g modules of one kind with `each` rows, the sorted rows from `start` on."""

    ids: tuple[int, ...]
    start: int
    each: int

    @property
    def stop(self) -> int:
        return self.start + len(self.ids) * self.each


@dataclass(frozen=True, eq=False)
class Plan:
    """order (N,): the row of each sorted pair, None where rows are in order already; back (rows, k): where each pair
    went, N for none, None where `order` is None; idle: whether some pair has no module."""

    groups: tuple[Group, ...]
    order: Tensor | None
    back: Tensor | None
    idle: bool
    slots: int
    alone: bool = False  # whether every row has one module, and all are of one kind


class Arrangement:
    """The numbers of the kinds of a site's modules, in order, −1 where a module has no part.

    Sites that are alike share one object, whatever comes or goes, so that a plan made at one of them serves at all.
    """

    __slots__ = ("__weakref__", "_next", "live", "numbers")

    def __init__(self, numbers: tuple[int, ...] = ()):
        self.numbers = numbers
        everywhere = -1 not in numbers
        # Found now, not when asked for: compiled code would see it change.
        self.live = range(len(numbers)) if everywhere else [i for i, number in enumerate(numbers) if number >= 0]
        self._next: Any = WeakValueDictionary()

    def __getitem__(self, i: int) -> int:
        return self.numbers[i]

    def __len__(self) -> int:
        return len(self.numbers)

    def __reduce__(self):
        return Arrangement, (self.numbers,)

    def plus(self, number: int) -> "Arrangement":
        """With one module more."""
        return self._after(number, lambda: (*self.numbers, number))

    def without(self, i: int) -> "Arrangement":
        """Without module i."""
        return self._after(("without", i), lambda: self.numbers[:i] + self.numbers[i + 1 :])

    def _after(self, change: Any, numbers: Callable[[], tuple[int, ...]]) -> "Arrangement":
        found = self._next.get(change)
        if found is None:
            found = self._next[change] = Arrangement(numbers())
        return found


def of_lists(rows: Sequence[Sequence[int]], kinds: Arrangement | Sequence[int], device: torch.device) -> Plan:
    """The plan of module ids by example, known on the host."""
    where: dict[int, list[int]] = {}
    slots = max((len(ids) for ids in rows), default=0) or 1
    for row, ids in enumerate(rows):
        for slot, i in enumerate(ids):
            if i >= 0 and kinds[i] >= 0:
                where.setdefault(i, []).append(row * slots + slot)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, pairs in where.items():
        alike[kinds[i], len(pairs)].append(i)
    groups, start = [], 0
    for (_, each), ids in alike.items():
        groups.append(Group(tuple(sorted(ids)), start, each))  # in order, so that a pool is sliced, not copied
        start = groups[-1].stop
    order = [pair for group in groups for i in group.ids for pair in where[i]]
    alone = slots == 1 and len(order) == len(rows) and len({kind for kind, _ in alike}) == 1
    if slots == 1 and order == list(range(len(rows))):
        return Plan(tuple(groups), None, None, False, 1, alone)
    back = [len(order)] * (len(rows) * slots)
    for place, pair in enumerate(order):
        back[pair] = place
    take = torch.tensor([pair // slots for pair in order], dtype=torch.long, device=device)
    places = torch.tensor(back, device=device).view(-1, slots)
    return Plan(tuple(groups), take, places, len(order) < len(back), slots, alone)


def of_index(index: Tensor, kinds: Arrangement) -> Plan:
    """The plan of an index (rows, k) that lives on the device. Reads the number of rows a module back to the host."""
    rows, slots = index.shape
    flat = index.flatten()
    n = len(kinds)
    dead = [i for i in range(n) if kinds[i] < 0]
    if dead:
        flat = torch.where(torch.isin(flat, torch.tensor(dead, device=flat.device)), -1, flat)
    sort = torch.argsort(flat % (n + 1), stable=True)  # −1 becomes n: last
    counts = torch.bincount(flat % (n + 1), minlength=n + 1).tolist()
    groups: list[Group] = []
    start = 0
    for i, each in enumerate(counts[:n]):
        if not each:
            continue
        last = groups[-1] if groups else None
        if last and last.each == each and kinds[last.ids[-1]] == kinds[i]:
            groups[-1] = Group((*last.ids, i), last.start, each)
        else:
            groups.append(Group((i,), start, each))
        start += each
    back = torch.empty_like(sort).scatter_(0, sort, torch.arange(len(sort), device=sort.device)).clamp(max=start)
    return Plan(tuple(groups), sort[:start] // slots, back.view(rows, slots), start < len(sort), slots)


def plan(routing: Routing, kinds: Arrangement, rows: int, device: torch.device) -> Plan:
    """The plan of a sparse routing of examples or tokens; made once for each arrangement of kinds, then remembered."""
    found = routing.cache.get(kinds)
    if found is None:
        if routing.host is not None:
            found = of_lists(routing.host, kinds, device)
        else:
            assert routing.index is not None
            found = of_index(routing.index.reshape(rows, -1), kinds)
        routing.cache[kinds] = found
    return found
