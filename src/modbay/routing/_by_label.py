"""Routing by label: metadata known before the call says which modules count (survey section 3.1)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import LabelError, listed

REMEMBERED = 32  # routings kept, so that the steps of a generation sort their examples once


class ByLabel(Router):
    """α = A_label: fixed routing by a label of the call.

        mb.ByLabel("language")                                      # the module of that name
        mb.ByLabel("task", {"ner": ["shared", "ner"], "pos": ["shared", "pos"]})   # an allocation of your own

    label: the keyword. table: modules by label; without it each module is its own label. None: no module.
    Raises LabelError for a label that is in no table.
    """

    reads_x: ClassVar[bool] = False

    def __init__(self, label: str, table: Mapping[str, Sequence[str] | str] | None = None):
        super().__init__()
        self.label, self.keywords = label, (label,)
        self.table = None if table is None else {k: [v] if isinstance(v, str) else list(v) for k, v in table.items()}
        self.place: dict[str, int] = {}
        self.remembered: dict = {}

    def build(self, names: Sequence[str], site: Site) -> None:
        gone = set(self.names).difference(names) if self.table is not None else ()
        self.place = self._places(tuple(names))
        self.names, self.remembered = tuple(names), {}
        if self.table is None:
            self.labels: Sequence[str] = self.names
            return
        if gone:  # modules that were removed leave the table, too
            kept = {label: [name for name in several if name not in gone] for label, several in self.table.items()}
            self.table = {label: several for label, several in kept.items() if several or not self.table[label]}
        unknown = [name for several in self.table.values() for name in several if name not in self.place]
        if unknown:
            raise LabelError(f"ByLabel({self.label!r}, table=…) names modules that the bay lacks: {listed(unknown)}.")
        self.labels = tuple(self.table)

    def _places(self, names: tuple[str, ...]) -> dict[str, int]:
        """Index by name. Where the last of a thousand modules came or went, the others are not counted again."""
        if names and names[:-1] == self.names:
            return self.place | {names[-1]: len(self.names)}
        if self.names and names == self.names[:-1]:
            place = self.place.copy()
            del place[self.names[-1]]
            return place
        return {name: i for i, name in enumerate(names)}

    def rename(self, old: str, new: str) -> None:
        self.names = tuple(new if name == old else name for name in self.names)
        if self.table is not None:
            self.table = {k: [new if name == old else name for name in v] for k, v in self.table.items()}

    def allocate(self, label: str, *names: str) -> None:
        """Let a label, new or not, mean these modules, which must be in the bay."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise LabelError(f"allocate({label!r}, …): no modules {listed(unknown)}; there are {listed(self.names)}.")
        own: Mapping[str, Sequence[str]] = {name: [name] for name in self.names} if self.table is None else self.table
        self.table = {**own, label: list(names)}
        self.labels, self.remembered = tuple(self.table), {}

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        given = c.label(self.label)
        if isinstance(given, Tensor):
            return self._of_tensor(given)
        return self._remember(given if isinstance(given, str) else tuple(given))

    def _remember(self, given: str | tuple[str | None, ...] | None) -> Routing:
        if given not in self.remembered:
            if len(self.remembered) >= REMEMBERED:
                self.remembered.pop(next(iter(self.remembered)))
            self.remembered[given] = self._of_names(given)
        return self.remembered[given]

    def _of_names(self, given: str | tuple[str | None, ...] | None) -> Routing:
        if not isinstance(given, tuple):
            ids = self._lookup(given)
            return Routing(index=torch.tensor(ids, dtype=torch.long), host=(ids,))
        return by_row(tuple(self._lookup(label) for label in given))

    def _lookup(self, label: str | None) -> tuple[int, ...]:
        if label is None:
            return ()
        if label not in (self.place if self.table is None else self.table):
            raise LabelError(
                f"{self.label}={label!r}: no such label. Known: {listed(self.labels)}; None runs the base alone. "
                f"bay.add({label!r}, …) adds a module of that name."
            )
        return (self.place[label],) if self.table is None else tuple(self.place[name] for name in self.table[label])

    def _of_tensor(self, given: Tensor) -> Routing:
        """Labels as indices into the names, −1 for the base alone; on the host if they are, else never read there."""
        if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
            raise LabelError(
                f"{self.label}={tuple(given.shape)} {given.dtype}: labels as a tensor are integers (b,), indices into "
                f"{listed(self.labels)}, −1 for the base alone."
            )
        if given.device.type == "cpu" and not torch.compiler.is_compiling():
            numbers: list[int] = given.reshape(-1).tolist()
            bad = [i for i in numbers if not -1 <= i < len(self.labels)]
            if bad:
                raise LabelError(
                    f"{self.label} has indices {listed(bad)}; there are {len(self.labels)} labels, from 0."
                )
            names = [None if i < 0 else self.labels[i] for i in numbers]
            return self._remember(tuple(names)) if given.ndim else self._remember(names[0])
        if self.table is not None:
            rows = [self._lookup(label) for label in self.labels]
            k = max(len(ids) for ids in rows)
            table = torch.tensor([[*ids, *[-1] * (k - len(ids))] for ids in rows] + [[-1] * k])
            return Routing(index=table.to(given.device)[given])
        return Routing(index=given.unsqueeze(-1))


def by_row(host: tuple[tuple[int, ...], ...]) -> Routing:
    """The routing of rows that have these modules each, in this order; known on the host."""
    k = max((len(ids) for ids in host), default=1) or 1
    index = torch.tensor([[*ids, *[-1] * (k - len(ids))] for ids in host], dtype=torch.long)
    return Routing(index=index, host=host)
