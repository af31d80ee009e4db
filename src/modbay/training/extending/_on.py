"""Which of a run's modules stand under a newcomer's own, in a bay that is routed by its label."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...abstract import Router
from ...attach import Bay, bays
from ...data import Row
from ...errors import ConfigError, listed
from ...routing import ByLabel
from .._build import Network
from .._predict import predict
from .._probe import probe
from .._progress import Progress, Silent
from .._routes import HEADS
from ._extension import Extension
from ._newcomers import Newcomers

LOOK = 512  # rows by which the nearest is found
AVERAGE = "average-of-all"  # a module's name


def routers_of(bay: Bay) -> list[Router]:
    """The router of a bay, or those of its sites."""
    shared = bay.state.router
    return [shared] if shared is not None else [m.router for m in bay.modulars.values() if m.router is not None]


def allocate(bay: Bay, label: str, names: Sequence[str]) -> None:
    """A label of a bay's ByLabel means these modules, none of them included."""
    for router in routers_of(bay):
        assert isinstance(router, ByLabel)
        router.allocate(label, *names)


def rows_of(bay: Bay) -> dict[str, list[str]]:
    """{label: modules} of a bay's ByLabel."""
    router = routers_of(bay)[0]
    assert isinstance(router, ByLabel)
    own = {name: [name] for name in router.names}
    return own if router.table is None else {label: list(several) for label, several in router.table.items()}


@dataclass
class Under:
    """Chooses them as `on` says."""

    network: Network
    asked: Extension
    came: Newcomers
    progress: Progress
    notes: list[str]

    def kept(self, bay: Bay) -> list[str]:
        """The modules that all labels use: a shared one beside private ones."""
        several = [names for names in rows_of(bay).values() if names]
        return [name for name in several[0] if all(name in names for names in several)] if len(several) > 1 else []

    def choose(self, bay: Bay, label: str, value: str, kept: list[str]) -> list[str]:
        """The modules for a new value."""
        on = self.asked.on
        if on is None or on == "none":
            return kept if on is None else []
        if on == "average":
            return [_average(bay, [name for names in self._known(bay, label).values() for name in names])]
        known = self._known(bay, label)
        if on == "nearest":
            return known[self._nearest(bay, label, value, known)]
        out: list[str] = []
        for name in (one.strip() for one in on.split(",")):
            said = self.asked.run.routes.values[label].get(name, name)
            if said not in known and said not in bay.names():
                raise ConfigError(
                    f"on={name!r}: bay {bay.state.name!r} has no such module; there are {listed(bay.names())}; or say "
                    f"average, nearest or none."
                )
            out += [one for one in known.get(said, [said]) if one not in out]
        return out

    def _known(self, bay: Bay, label: str) -> dict[str, list[str]]:
        """The rows of the values that the run knows, and that have modules."""
        known = set(self.asked.run.routes.values[label].values())
        return {name: names for name, names in rows_of(bay).items() if name in known and names}

    def _nearest(self, bay: Bay, label: str, value: str, known: dict[str, list[str]]) -> str:
        """The known value as which the newcomer's training rows have the lowest loss."""
        rows = [row for row in self.came.splits.train if row.labels.get(label) == value][:LOOK]
        losses: dict[str, float] = {}
        with self.progress.stage(f"Nearest to {value}", len(known)) as bar:
            for name, modules in known.items():
                allocate(bay, self.came.name(label, value), modules)
                losses[name] = self._loss(rows)
                bar.step(len(losses))
        best = sorted(losses, key=lambda name: losses[name])
        said = ", ".join(f"{name} {losses[name]:.3f}" for name in best[:4])
        self.notes.append(f"nearest to {label} {value!r} is {best[0]!r} (loss on its training rows: {said})")
        return best[0]

    def _loss(self, rows: Sequence[Row]) -> float:
        """The mean loss; new tasks' heads are probed first, each time from the same start."""
        new = [row for row in rows if row.task not in self.asked.run.known["kinds"]]
        if new:
            heads = {self.network.routes.heads[row.task]: None for row in new}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.asked.config.seed)
                if HEADS in bays(self.network.model):
                    bays(self.network.model)[HEADS].reset(*heads)
            probe(self.network, self.asked.config, new, Silent())
        told = predict(self.network, rows)
        return sum(one.nll or 0.0 for one in told) / max(1, sum(one.tokens for one in told))


def _average(bay: Bay, names: Sequence[str]) -> str:
    """A frozen module whose parameters are the mean of these."""
    if AVERAGE in bay.names():
        return AVERAGE
    names = list(dict.fromkeys(names))
    parts = [[m.parts._modules.get(name) for name in names] for m in bay.modulars.values()]
    kinds = {part.kind for several in parts for part in several if part is not None}  # type: ignore[union-attr]
    if len(kinds) != 1 or any(part is None for several in parts for part in several):
        raise ConfigError(
            f"on='average': the modules of bay {bay.state.name!r} differ in kind or sites: they have no mean."
        )
    bay.add(AVERAGE, kinds.pop())  # type: ignore[arg-type]
    with torch.no_grad():
        for modular, several in zip(bay.modulars.values(), parts, strict=True):
            for key, target in modular.parts._modules[AVERAGE].named_parameters():  # type: ignore[union-attr]
                target.copy_(torch.stack([dict(part.named_parameters())[key] for part in several]).mean(0))  # type: ignore[union-attr]
    bay.freeze(AVERAGE)
    return AVERAGE
