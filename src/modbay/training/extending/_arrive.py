"""What a newcomer gets in a network whose own parts are frozen: a head, a route in the run's bays, a module of its own.

Progressive: Rusu et al., "Progressive Neural Networks", 2016 (arXiv 1606.04671), whose new columns leave the old ones
as they are, too; here what is new is a module on the others' base.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...abstract import Kind, Replacement
from ...attach import Bay, attach, bays
from ...errors import ConfigError, listed
from ...methods import default_at, default_kind, parse_kind
from ...modules import Head
from ...routing import ByLabel, Skills
from .._base import TextModel
from .._build import Network, encoder_of, method_bays
from .._probe import probe
from .._progress import Progress
from .._routes import ARRIVAL, ARRIVALS, HEADS, Own, Routes
from ._extension import Extension
from ._newcomers import Newcomers
from ._on import Under, allocate, routers_of


@dataclass
class Arrived:
    """What one newcomer, a value of a label within a task, has got."""

    label: str
    value: str
    task: str
    head: str | None = None
    module: str | None = None
    on: dict[str, list[str]] = field(default_factory=dict)  # by bay
    gates: list[str] = field(default_factory=list)  # bays whose gates it learns


def arrive(network: Network, asked: Extension, came: Newcomers, progress: Progress) -> tuple[list[Arrived], list[str]]:
    """Make a place for the newcomers in a run's network; what learns is theirs alone. Returns it, and notes."""
    run, model, notes = asked.run, network.model, list(came.notes)
    _refuse(asked, came, network)
    freeze(model)
    network.encoder = encoder_of(run.config, model, network.encoder.tokenizer, came.known)
    network.routes = Routes(came.values, dict(run.routes.heads), list(run.routes.own))
    who = [Arrived(label, value, task) for label, value, task in came.whose]
    _heads(network, asked, who)
    _routes(network, asked, came, who, notes, progress)
    if any(one.label == "task" for one in who):
        new = [
            row for row in came.splits.train if row.task in came.known["kinds"] and row.task not in run.known["kinds"]
        ]
        probe(network, asked.config, new, progress)
    if asked.ways != "head":
        notes.append(_modules(network, asked, who))
    network.routes.own = [*_own(network, run.routes, who), *run.routes.own]
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"ways={asked.ways!r}: nothing would learn: this run has neither heads nor gates. Use module."
        )
    return who, notes


def _refuse(asked: Extension, came: Newcomers, network: Network) -> None:
    """Raise ConfigError for a way that there is not."""
    text = isinstance(network.model, TextModel)
    if asked.ways == "module" and text and any(label == "task" for label, _, _ in came.whose):
        raise ConfigError("ways='module': a new task needs a head of its own: use 'both', or 'head' alone.")
    if asked.ways == "head" and not text:
        raise ConfigError(f"ways='head': a {came.known['kind']} network has no heads: use 'module'.")
    labels = {*came.new, *(label for label, _, _ in came.whose if label == "task")}
    for name, bay in bays(network.model).items():
        read = [word for word in bay.state.read if word in labels]
        if read:
            raise ConfigError(
                f"bay {name!r}: its modules read {read[0]!r} themselves, so that it can have no new values."
            )


def freeze(model: nn.Module) -> None:
    """All that is there: modules, routers, aggregators."""
    for bay in bays(model).values():
        bay.freeze()
        for part in [
            bay.state.router,
            bay.state.aggregator,
            *(p for m in bay.modulars.values() for p in (m.router, m.aggregator)),
        ]:
            if part is not None:
                part.requires_grad_(False)


def _heads(network: Network, asked: Extension, who: Sequence[Arrived]) -> None:
    """A head for each newcomer: a new task's, drawn anew, or a copy of the head that the task has."""
    if not isinstance(network.model, TextModel):
        return
    bay, routes = bays(network.model)[HEADS], network.routes
    for one in who:
        if one.label == "task":
            name = unused(routes.values["task"][one.task], bay.names())
            bay.add(name, Head(len(network.encoder.classes.get(one.task, "1"))))
            routes.heads[one.task] = one.head = name
        elif asked.ways != "module":
            old = routes.heads[one.task]
            name = unused(f"{old}-{routes.values[one.label][one.value]}", bay.names())
            bay.add(name, Head(len(network.encoder.classes.get(one.task, "1"))))
            with torch.no_grad():
                for new, known in zip(bay.parameters(name), bay.parameters(old), strict=True):
                    new.copy_(known)
            one.head = name


def _routes(
    network: Network, asked: Extension, came: Newcomers, who: Sequence[Arrived], notes: list[str], progress: Progress
) -> None:
    """A route for the new values in each of the run's bays that is routed by their label."""
    new = {label: [came.name(label, value) for value in values] for label, values in came.new.items()}
    tasks = [came.name("task", one.task) for one in who if one.label == "task"]
    new |= {"task": tasks} if tasks else {}
    open_bays: list[tuple[Bay, str]] = []
    for bay in bays(network.model).values():
        if bay.state.name in (HEADS, ARRIVALS):
            continue
        for router in routers_of(bay):
            names = [name for label in router.keywords for name in new.get(label, ())]
            if names and isinstance(router, Skills):
                _gates(router, names)
                _note(who, came, router.label, lambda one, bay=bay: one.gates.append(bay.state.name))
            elif names and isinstance(router, ByLabel):
                open_bays += [(bay, router.label)] if router is routers_of(bay)[0] else []
            elif names:
                raise ConfigError(
                    f"bay {bay.state.name!r}: its router {type(router).__name__} can't be given new values of "
                    f"{listed(router.keywords)}; ByLabel and Skills can."
                )
    if asked.on is not None and not open_bays:
        raise ConfigError(
            f"on={asked.on!r}: no bay of the run takes its modules by {listed(new)}, so that none can be chosen."
        )
    under = Under(network, asked, came, progress, notes)
    kept = {(bay.state.name, label): under.kept(bay) for bay, label in open_bays}
    for bay, label in open_bays:  # first the base alone, so that the newcomer's rows can be run
        for name in new[label]:
            allocate(bay, name, kept[bay.state.name, label])
    for bay, label in open_bays:
        for value in [*came.new.get(label, ())] + (
            [one.task for one in who if one.label == "task"] if label == "task" else []
        ):
            chosen = under.choose(bay, label, value, kept[bay.state.name, label])
            allocate(bay, came.name(label, value), chosen)
            _note(who, came, label, lambda one, bay=bay, chosen=chosen: one.on.update({bay.state.name: chosen}), value)


def _note(who: Sequence[Arrived], came: Newcomers, label: str, say: Any, value: str | None = None) -> None:
    """Say of those of a label, and value, what they got."""
    for one in who:
        if one.label == label and value in (None, one.value):
            say(one)


def _gates(router: Skills, names: Sequence[str]) -> None:
    """Rows of gates for new names, which alone learn."""
    old = len(router.labels)
    with quiet():
        router.extend(*names)
    router.logits.requires_grad_(True)
    router.logits.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:old]), gradient[old:]]))


def _modules(network: Network, asked: Extension, who: Sequence[Arrived]) -> str:
    """A module for each newcomer, in the bay of those that came later. Returns what is to be said of it."""
    model, given = network.model, asked.config.module
    there = bays(model).get(ARRIVALS)
    names: dict[tuple[str, str], str] = {}
    for one in who:
        if (one.label, one.value) not in names:
            taken = [*(there.names() if there else ()), *names.values()]
            names[one.label, one.value] = unused(network.routes.values[one.label][one.value], taken)
        one.module = names[one.label, one.value]
    kind = None if given is None else parse_kind(given)
    if there is not None:
        kind = kind or next(m.order[0].kind for m in there.modulars.values() if m.order and m.order[0] is not None)
        for name in names.values():
            there.add(name, kind)
        return f"a module of their own: {kind}, at the {len(there.modulars)} sites of bay {ARRIVALS!r}"
    at, like, whose = place(asked, network)
    kind = kind or like
    made = attach(model, at, dict.fromkeys(names.values(), kind), ByLabel(ARRIVAL), name=ARRIVALS, add_losses=False)
    return f"a module of their own: {kind}, at {whose} ({len(made.modulars)} sites), in a new bay {ARRIVALS!r}"


def place(asked: Extension, network: Network) -> tuple[Any, Kind, str]:
    """(sites, kind, whose they are) of a newcomer's module: those of the method's first bay, else the default's."""
    specs = method_bays(asked.run.config, replace(network, routes=asked.run.routes))
    for spec in specs[:1]:
        kind = next(iter(spec.modules.values()))
        if not isinstance(kind, Replacement):
            more = ", the first of several bays" if len(specs) > 1 else ""
            return spec.at, kind, f"the sites of bay {spec.name!r}{more}"
    return default_at(network.model), default_kind(), "the default sites"


def _own(network: Network, old: Routes, who: Sequence[Arrived]) -> list[Own]:
    """Their entries in the routes. A new value of a task that came later keeps that task's module under its own."""
    out = []
    bay = bays(network.model).get(ARRIVALS)
    for one in who:
        under = next((o.arrival for o in old.own if o.task == one.task and o.label == "task" and o.arrival), None)
        arrival = one.module or under
        if bay is not None and one.module is not None and under is not None and one.label != "task":
            arrival = f"{under}+{one.module}"
            allocate(bay, arrival, [*_table(bay, under), one.module])
            one.on[ARRIVALS] = _table(bay, under)
        elif bay is not None and one.module is not None:
            allocate(bay, one.module, [one.module])
        head = None if one.label == "task" else one.head
        if head is not None or arrival is not None:
            out.append(Own(one.label, one.value, one.task, head, arrival))
    return out


def _table(bay: Bay, label: str) -> list[str]:
    router: Any = routers_of(bay)[0]
    return [label] if router.table is None else list(router.table[label])


def unused(name: str, taken: Sequence[str]) -> str:
    """The name, or with a number behind it if it is taken."""
    return next(one for i in range(1, 10_000) if (one := name if i == 1 else f"{name}-{i}") not in taken)


@contextmanager
def quiet() -> Iterator[None]:
    """Without modbay's word to those who have an optimiser already: here it is made afterwards."""
    log = logging.getLogger("modbay")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
