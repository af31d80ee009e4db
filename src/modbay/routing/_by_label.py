"""Routing by label: metadata known before the call says which modules count (survey section 3.1).

A module for each task: Houlsby et al., 2019 (arXiv 1902.00751). Shared and private: Bousmalis et al., "Domain
Separation Networks", 2016 (arXiv 1608.06019); Liu, Qiu and Huang, 2017 (arXiv 1704.05742).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import LabelError, listed
from ..types import System

REMEMBERED = 32  # routings kept, so that the steps of a generation sort their examples once


class ByLabel(Router):
    """α = A_label: fixed routing by a label of the call.

        mb.ByLabel("language")                                      # the module of that name
        mb.ByLabel("task", {"ner": ["shared", "ner"], "pos": ["shared", "pos"]})   # an allocation of your own

        mb.ByLabel("language", {"de": {"germanic": 0.5, "de": 0.5}})                # and with weights

    label: the keyword. table: modules by label, in the order in which mb.Sequence("routed") runs them, or their weights
    by name; without it each module is its own label. None: no module.
    Raises LabelError for a label that is in no table.
    """

    reads_x: ClassVar[bool] = False
    systems = (
        System(
            (69,),
            'mb.ByLabel("task", {"ner": ["a", "b"], "pos": ["b"]})',
            ("tests/test_tasks.py::test_an_allocation_is_a_row_of_the_matrix",),
        ),
        System(
            (70,),
            'mb.ByLabel("task", {"ner": ["shared", "ner"], "pos": ["shared", "pos"]})',
            (
                "tests/test_tasks.py::test_shared_and_private_modules_add_up",
                "tests/test_tasks.py::test_the_difference_loss_parts_shared_and_private",
            ),
            "shared and private",
            "α = [1, A_label]: y = f(x) + Δ_shared + Δ_label",
        ),
        System(
            (146,),
            'mb.ByLabel("adapter")',
            (
                "tests/test_outputs.py::test_parallel_outputs_are_those_of_each_alone",
                "tests/test_laws.py::test_2_rows_that_are_sorted_already_are_a_loop",
            ),
            "a batch that is split",
            "y_r = f(x_r) + Δ_i(r): the first rows to one module, the next to another",
            "Poth, Sterz, Paul, Purkayastha, Engländer, Imhof, Vulić, Ruder, Gurevych and Pfeiffer, "
            '"Adapters", 2023 (arXiv 2311.11077)',
            section="5.4",
        ),
    )

    def __init__(self, label: str, table: Mapping[str, Sequence[str] | Mapping[str, float] | str] | None = None):
        super().__init__()
        self.label, self.keywords = label, (label,)
        self.table = None if table is None else {k: _several(v) for k, v in table.items()}
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
            kept = {label: _chosen(several, lambda name: name not in gone) for label, several in self.table.items()}
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
            other = lambda name: new if name == old else name
            self.table = {
                k: {other(name): w for name, w in v.items()} if isinstance(v, dict) else [other(name) for name in v]
                for k, v in self.table.items()
            }

    def allocate(self, label: str, *names: str) -> None:
        """Let a label, new or not, mean these modules, which must be in the bay."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise LabelError(f"allocate({label!r}, …): no modules {listed(unknown)}; there are {listed(self.names)}.")
        own: Mapping[str, list[str] | dict[str, float]] = (
            {name: [name] for name in self.names} if self.table is None else self.table
        )
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
        labels = given if isinstance(given, tuple) else (given,)
        host = tuple(self._lookup(label) for label in labels)
        one = Routing(index=torch.tensor(host[0] if host else (), dtype=torch.long), host=host[:1])
        route = by_row(host) if isinstance(given, tuple) else one
        if not self._weighs():
            return route
        weights = torch.tensor(_filled([self._weights(label) for label in labels], 0.0))
        return replace(route, weights=weights if isinstance(given, tuple) else weights[0, : len(host[0])], cache={})

    def _weighs(self) -> bool:
        return self.table is not None and any(isinstance(several, dict) for several in self.table.values())

    def _weights(self, label: str | None) -> tuple[float, ...]:
        several = () if label is None else self.table[label]  # type: ignore[index]
        return tuple(several.values()) if isinstance(several, dict) else (1.0,) * len(several)

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
            table = torch.tensor(_filled([*(self._lookup(label) for label in self.labels), ()], -1))
            index = table.to(given.device)[given]
            if not self._weighs():
                return Routing(index=index)
            weights = torch.tensor(_filled([*(self._weights(label) for label in self.labels), ()], 0.0))
            return Routing(index=index, weights=weights.to(given.device)[given])
        return Routing(index=given.unsqueeze(-1))


def by_row(host: tuple[tuple[int, ...], ...]) -> Routing:
    """The routing of rows that have these modules each, in this order; known on the host."""
    index = torch.tensor(_filled(host, -1), dtype=torch.long)
    return Routing(index=index, host=host)


def _filled(rows: Sequence[Sequence], fill: float) -> list[list]:
    """The rows, all as long as the longest, and one at least."""
    k = max([1, *[len(row) for row in rows]])
    return [[*row, *[fill] * (k - len(row))] for row in rows]


def _several(names: Sequence[str] | Mapping[str, float] | str) -> list[str] | dict[str, float]:
    """One row of a table: names in order, or their weights."""
    if isinstance(names, Mapping):
        return {name: float(w) for name, w in names.items()}
    return [names] if isinstance(names, str) else list(names)


def _chosen(several: list[str] | dict[str, float], keep: Callable[[str], bool]) -> list[str] | dict[str, float]:
    """The part of a row whose names are kept."""
    if isinstance(several, dict):
        return {name: w for name, w in several.items() if keep(name)}
    return [name for name in several if keep(name)]
