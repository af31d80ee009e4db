"""Paths: the modules that a label has at each site, as evolution or search found them.

Fernando, Banarse, Blundell, Zwols, Ha, Rusu, Pritzel and Wierstra, "PathNet: Evolution Channels Gradient Descent in
Super Neural Networks", 2017 (arXiv 1701.08734).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, LabelError, listed
from ..types import System
from ._tasks import tasks as tasks_of

TESTS = "tests/test_hard.py::"
Genotype = Sequence[Sequence[str]]


class Path(Router):
    """α_l = the modules of the label's path at site l: one choice for the whole path, by name.

        bay = mb.attach(net, at, modules, mb.Path("task"), mb.Mixture(), name="task")
        bay.state.router.set("first", [["m0", "m3"], ["m1"], ["m2", "m0"]])   # or methods.PathNet(bay, …) finds it

    label: the keyword. paths: by label, the names at each site, in the sites' order. A name twice counts once. None is
    no module. One object for all sites; a module that is removed leaves all paths.
    Raises LabelError for a label without a path, CompositionError for a path of other sites or modules.
    """

    reads_x: ClassVar[bool] = False
    systems = (
        System(
            (83,),
            'mb.Path("task")',
            (
                TESTS + "test_a_path_has_modules_of_its_own_at_each_site",
                TESTS + "test_a_tournament_replaces_the_worse_by_a_mutation_of_the_better",
                TESTS + "test_path_net_freezes_the_winner_and_draws_the_rest_anew",
                "tests/test_recipes.py::test_path_net_carries_over",
            ),
            "PathNet",
            "y_l = Σ_{i in path_l} m_i(x), the paths evolved by methods.PathNet(bay): the loser ← mutate(the winner)",
        ),
    )

    def __init__(self, label: str, paths: Mapping[str, Genotype] | None = None):
        super().__init__()
        self.label, self.keywords = label, (label,)
        self.paths: dict[str, list[list[str]]] = {
            key: [list(names) for names in path] for key, path in (paths or {}).items()
        }
        self.device = torch.device("cpu")
        self.tables: dict[Any, Tensor] = {}

    @property
    def labels(self) -> list[str]:
        """The labels that have a path."""
        return list(self.paths)

    def build(self, names: Sequence[str], site: Site) -> None:
        gone = set(self.names) - set(names)
        self.names, self.device, self.tables = tuple(names), site.device, {}
        self.paths = {key: [[n for n in at if n not in gone] for at in path] for key, path in self.paths.items()}
        for label, path in self.paths.items():
            self._check(label, path)

    def rename(self, old: str, new: str) -> None:
        self.names = tuple(new if name == old else name for name in self.names)
        self.paths = {key: [[new if n == old else n for n in at] for at in path] for key, path in self.paths.items()}

    def set(self, label: str, path: Genotype) -> None:
        """Give a label, new or not, this path."""
        self._check(label, path)
        self.paths[label], self.tables = [list(dict.fromkeys(at)) for at in path], {}

    def forget(self, label: str) -> None:
        """Take a label's path away."""
        self.paths.pop(label, None)
        self.tables = {}

    def _check(self, label: str, path: Genotype) -> None:
        places = max(1, len(self.sites))
        unknown = sorted({name for at in path for name in at} - set(self.names))
        if len(path) != places or unknown:
            said = f"names {listed(unknown)}, and the modules are {listed(self.names)}" if unknown else (
                f"has {len(path)} sites, and there are {places}"
            )  # fmt: skip
            raise CompositionError(f"Path: the path of {label!r} {said}.")

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        if not self.paths:
            raise LabelError(f"Path({self.label!r}): no label has a path yet; give one, router.set(label, path).")
        tasks = tasks_of(c.label(self.label), self.labels, self.label, self.device)
        index = self._table()[:, tasks]  # (sites, [b,] k); −1 reads the last row, of none
        return Routing(index=index, sites=self.sites) if self.sites else Routing(index=index[0])

    def _table(self) -> Tensor:
        """(sites, labels + 1, k): the modules of each label's path at each site, −1 filling up; the last has none."""
        if "all" not in self.tables:
            place = {name: i for i, name in enumerate(self.names)}
            rows = [[[place[n] for n in dict.fromkeys(at)] for at in path] for path in self.paths.values()]
            k = max([1, *[len(at) for path in rows for at in path]])
            filled = [[at + [-1] * (k - len(at)) for at in path] for path in rows]
            filled.append([[-1] * k for _ in range(max(1, len(self.sites)))])
            self.tables["all"] = torch.tensor(filled, device=self.device).transpose(0, 1)
        return self.tables["all"]
