"""What a method comes to: bays, as `mb.attach` is given them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..abstract import Aggregator, Kind, Router
from ..aggregation import WeightedSum
from ._at import default_at, place

Values = Mapping[str, Sequence[str]]
"""The values of each label that a run may route by, named as modules are: {"language": ["en", "de"], "task": […]}."""


@dataclass(frozen=True)
class BaySpec:
    """One bay: `mb.attach(model, spec.at, spec.modules, spec.router, spec.aggregator, name=spec.name)`.

    at: as attach takes it; strings such as "role.query" are roles. router, aggregator: an object is one for all sites,
    a callable makes one a site.
    """

    name: str
    at: Any
    modules: dict[str, Kind]
    router: Router | Callable[[], Router]
    aggregator: Aggregator | Callable[[], Aggregator] = field(default_factory=WeightedSum)

    def __post_init__(self):
        object.__setattr__(self, "at", place(self.at))
        object.__setattr__(self, "modules", dict(self.modules))


@dataclass(frozen=True)
class Method:
    """A named composition.

    build(values, by, kind, at, **options): the bays, in the order in which they are attached; kind or at None: the
    method's own. title, summary: for tables; source: the paper; when: to take it. sites(model): where it goes if
    nothing is said. needs_at: whether those are the base's query, value and feed-forward layers. labels: how many
    labels it wants. router_lr: how many times faster than its modules its router should learn.
    """

    name: str
    title: str
    summary: str
    source: str
    when: str
    build: Callable[..., list[BaySpec]]
    sites: Callable[[nn.Module], Any] = default_at
    needs_at: bool = True
    labels: int = 1
    router_lr: float = 1.0
