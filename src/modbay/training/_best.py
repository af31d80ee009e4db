"""The best checkpoint, by module: modules that no row uses together are kept each as it was when its own rows did best.

Private modules of two tasks have a step each; a module that all share, or a head, ties those that use it to one.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..attach import Bay, bays
from ..routing import ByLabel
from ._build import Network
from ._encode import Example
from ._predict import predict
from ._processes import first
from ._run import read_json, write_json
from ._score import score
from ._tasks import Tasks
from ._trainer import load_modules, save_modules

Module = tuple[str, str]  # a bay's name, and the module's
Route = Mapping[str, str | None]


@dataclass(frozen=True)
class Part:
    """Modules that stand or fall together, and the places of the validation rows that use them."""

    modules: frozenset[Module]
    rows: list[int]


class Best:
    """Scores the validation rows, and keeps what did best so far of each part in a folder of its own."""

    def __init__(self, network: Network, folder: Path, tasks: Tasks, examples: Sequence[Example], by: list[str]):
        self.network, self.folder, self.rows, self.kinds, self.by = (
            network,
            folder,
            tasks.splits.validation,
            tasks.kinds,
            by,
        )
        routes = [network.routes.of(row, network.keywords) for row in self.rows]
        self.parts = parts(network, [example.routes for example in examples], routes)

    def __call__(self) -> dict[str, float]:
        records = predict(self.network, self.rows)
        for i, part in enumerate(self.parts):
            said = score([records[row] for row in part.rows], self.kinds, self.by)
            if said["score"] > self.known(i) and first():
                self._keep(i, part, said)
        return score(records, self.kinds, self.by)

    def _keep(self, i: int, part: Part, said: dict[str, float]) -> None:
        aside, final = self.folder / f"{i}.writing", self.folder / str(i)
        shutil.rmtree(aside, ignore_errors=True)
        if len(self.parts) == 1:
            save_modules(self.network.model, aside)
        for name, bay in bays(self.network.model).items() if len(self.parts) > 1 else ():
            mine = [module for where, module in part.modules if where == name]
            if mine:
                bay.save(aside, *sorted(mine))
        write_json(aside / "score.json", said)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)

    def known(self, i: int) -> float:
        """The best score of a part so far."""
        file = self.folder / str(i) / "score.json"
        return read_json(file)["score"] if file.is_file() else float("-inf")

    def restore(self) -> None:
        """Give every part that has validation rows what did best; the others stay as they are."""
        for i, part in enumerate(self.parts):
            place = self.folder / str(i)
            if len(self.parts) == 1:
                load_modules(self.network.model, place)
            for name, bay in bays(self.network.model).items() if len(self.parts) > 1 else ():
                mine = sorted(module for where, module in part.modules if where == name)
                if mine and place.is_dir():
                    bay.load(place, *mine)


def parts(network: Network, train: Iterable[Route], validation: Sequence[Route]) -> list[Part]:
    """The connected parts of the modules that learn, two being connected if a row uses both; those without validation
    rows are left out. Where routers or aggregators learn, all is one part."""
    handles = bays(network.model)
    if any(
        g["name"].endswith((".router", ".aggregator")) for bay in handles.values() for g in bay.parameter_groups(1.0)
    ):
        return [Part(frozenset(), list(range(len(validation))))]
    root: dict[Module, Module] = {}

    def find(one: Module) -> Module:
        while root.setdefault(one, one) != one:
            one = root[one]
        return one

    distinct = {tuple(sorted(route.items(), key=str)): route for route in [*train, *validation]}
    for route in distinct.values():
        together = list(used(handles, route))
        for other in together[1:]:
            root[find(other)] = find(together[0])
    groups: dict[Module, set[Module]] = {}
    for module in list(root) + [m for route in distinct.values() for m in used(handles, route)]:
        groups.setdefault(find(module), set()).add(module)
    rows: dict[Module, list[int]] = {}
    for place, route in enumerate(validation):
        mine = next(iter(used(handles, route)), None)
        if mine is not None:
            rows.setdefault(find(mine), []).append(place)
    return [Part(frozenset(groups[one]), places) for one, places in rows.items()]


def used(handles: Mapping[str, Bay], route: Route) -> Iterable[Module]:
    """The modules that learn and count for a row; all of a bay, where its router does not say which by a label."""
    for name, bay in handles.items():
        router = bay.state.router
        names: Iterable[str] = bay.names()
        if isinstance(router, ByLabel):
            label = route.get(router.label)
            names = () if label is None else (label,) if router.table is None else router.table.get(label, ())
        for module in names:
            if any(p.requires_grad for p in bay.parameters(module)):
                yield name, module
