"""A place in a run's network for who is new: a module, a head, and the way there; the old rows keep theirs."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...attach import Bay, attach, bays
from ...data import slug
from ...errors import ConfigError, listed
from ...modules import Head
from ...routing import ByLabel
from .._base import TextModel
from .._build import Network
from .._routes import ARRIVAL, ARRIVALS, HEADS, Own, Routes
from .._run import Run
from ._bench import copied, parameters
from ._rows import Newcomer


@dataclass(frozen=True)
class Source:
    """The bay whose modules are had, their names, their kind; always: those that every row goes to, besides."""

    bay: Bay
    names: tuple[str, ...]
    kind: Any
    always: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.bay.state.keywords[0]


@dataclass(frozen=True)
class Place:
    """Where who is new goes: a module in the bay of arrivals; its head, and that of the known task it is a copy of."""

    arrival: tuple[Bay, str]
    head: tuple[Bay, str] | None
    own: str | None


def source_of(network: Network) -> Source:
    """The modules to adapt over; raises ConfigError for a run whose modules are none to choose among."""
    there = [bay for name, bay in bays(network.model).items() if name not in (HEADS, ARRIVALS)]
    more = "`modbay extend` adds a module of its own."
    if len(there) != 1:
        said = f"has {len(there)} bays of modules ({listed(bay.state.name for bay in there)})" if there else "has none"
        raise ConfigError(f"adapt chooses among the modules of one bay, and the run {said}. {more}")
    bay = there[0]
    router: Any = bay.state.router or next(iter(bay.modulars.values())).router
    if router.reads_x or len(router.keywords) != 1:
        raise ConfigError(
            f"adapt chooses among modules that belong to labels; those of bay {bay.state.name!r} "
            f"({listed(bay.names(), 4)}) are routed by {type(router).__name__}, whatever the label. {more}"
        )
    always = common(router)
    names = tuple(name for name in bay.names() if name not in always)
    if len(names) < 2:
        raise ConfigError(f"adapt chooses among modules, and the run has one alone, {listed(names)}. {more}")
    parts = [modular.parts._modules.get(name) for modular in bay.modulars.values() for name in names]
    kinds = list({repr(part.kind): part.kind for part in parts if part is not None}.values())  # type: ignore[union-attr]
    if len(kinds) != 1 or None in parts or any(part._buffers for part in parts if part is not None):
        raise ConfigError(
            f"adapt averages modules of one kind, all of whose numbers are learned, at the same sites; those of bay "
            f"{bay.state.name!r} are not such ({listed(map(repr, kinds))}). {more}"
        )
    return Source(bay, names, kinds[0], always)


def common(router: Any) -> tuple[str, ...]:
    """The modules that every label of a table means, as `shared` in shared+private."""
    if not isinstance(router, ByLabel) or not router.table or len(router.table) < 2:
        return ()
    first, *others = router.table.values()
    return tuple(name for name in first if all(name in several for several in others))


def make_place(network: Network, run: Run, source: Source, who: Newcomer) -> Place:
    """Add the module and the head; the network's routes and classes know who is new from then on."""
    name = slug(who.value)
    arrival = add_module(network, source, name)
    routes = Routes.parse(run.routes.dump())
    head, own = add_head(network, routes, who, name)
    instead = None
    if source.always:
        instead = unused(name, source.bay.state.router.labels)  # type: ignore[union-attr]
        source.bay.state.router.allocate(instead, *source.always)  # type: ignore[union-attr]
    routes.own.append(
        Own(who.label, who.value, who.task, head[1] if head and own else None, arrival[1], {source.label: instead})
    )
    network.routes, encoder = routes, network.encoder
    if who.new_task:
        classes = {**encoder.classes, who.task: who.classes} if who.classes else encoder.classes
        measured = encoder.measured | ({who.task} if who.kind == "regression" else set())
        network.encoder = replace(encoder, classes=classes, measured=measured)
    return Place(arrival, head, own)


def add_module(network: Network, source: Source, name: str) -> tuple[Bay, str]:
    """A new module of the kind, at the sites of the others."""
    sites, known = list(source.bay.modulars), bays(network.model).get(ARRIVALS)
    if known is None:
        made = attach(network.model, sites, {name: source.kind}, ByLabel(ARRIVAL), name=ARRIVALS, add_losses=False)
        return made, name
    name = unused(name, known.names())
    return known.add(name, source.kind, sites), name


def add_head(network: Network, routes: Routes, who: Newcomer, name: str) -> tuple[tuple[Bay, str] | None, str | None]:
    """((the bay of heads, the new one's name), the head it is a copy of): of a new task, a head of its own."""
    if not isinstance(network.model, TextModel):
        return None, None
    heads = bays(network.model)[HEADS]
    if who.new_task:
        name = unused(name, heads.names())
        heads.add(name, Head(len(who.classes) or 1))
        routes.heads[who.task] = routes.values.setdefault("task", {})[who.task] = name
        return (heads, name), None
    own = routes.heads[who.task]
    name = unused(f"{own}-{name}", heads.names())
    heads.add(name, next(iter(heads.modulars.values())).parts._modules[own].kind)  # type: ignore[union-attr]
    given = copied(heads, own)
    with torch.no_grad():
        for key, parameter in parameters(heads, name).items():
            parameter.copy_(given[key])
    return (heads, name), own


def keep_own_head(network: Network, place: Place) -> None:
    """The copy of a known head is not needed: the rows go to the head itself."""
    if place.head is None or place.own is None:
        return
    heads, name = place.head
    heads.remove(name)
    network.routes.own[-1] = replace(network.routes.own[-1], head=None)


def unused(name: str, taken: Any) -> str:
    """The name, with underscores until it is none of those."""
    while name in taken:
        name += "_"
    return name
