"""What the files of an adapted module and head say of their making: as `train` has it, and what they were made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...attach import Bay
from ...data import Splits
from ...metrics import Record
from .._about import about
from .._best import Module
from .._build import Network
from .._config import Config
from .._tasks import Tasks
from ._place import Place, Source
from ._rows import Newcomer
from ._ways import Found


def told_of(
    network: Network, config: Config, known: Mapping[str, Any], who: Newcomer, records: Sequence[Record], seed: int,
    how: str, made: Mapping[Module, Sequence[str]],
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """{bay: {module: its `about`}} of those that were made. records: of the test rows."""
    splits = Splits(who.few, [], who.test)
    tasks = Tasks(known["kind"], known["kinds"], known["classes"], network.routes.values, splits, who.files)
    config = config.model_copy(update={"seed": seed, "streaming": False})
    return about(config, network, tasks, records, how, made)


def made_of(place: Place, source: Source, found: Found, kept: bool) -> dict[Module, list[str]]:
    """The module and the head that were made, with the contents of what they were made of; no head where it is kept."""
    bay, name = place.arrival
    weighed = [one for one, weight in found.weights.items() if weight]
    made = {(bay.state.name, name): contents(source.bay, weighed)}
    if place.head is not None and not kept:
        heads, name = place.head
        made[heads.state.name, name] = contents(heads, [] if place.own is None else [place.own])
    return made


def contents(bay: Bay, names: Sequence[str]) -> list[str]:
    """The contents of modules as they were loaded; files of version 0.1.0 tell none."""
    return [bay.state.about[name]["content"] for name in names if name in bay.state.about]
