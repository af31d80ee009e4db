"""What a method comes to: bays, as `mb.attach` is given them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import nn

from ..abstract import Aggregator, Kind, Router
from ..aggregation import WeightedSum
from ..errors import ConfigError
from ..types import System
from ._at import default_at, place
from ._classes import described, fits, near, worded

GIVEN = ("values", "by", "kind", "at")

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

    make(values, by, kind, at, **options): the bays, in the order in which they are attached; `build` calls it.
    title, summary: for tables; source: the paper; when: to take it. sites(model): where it goes if
    nothing is said. needs_at: whether those are the base's query, value and feed-forward layers. labels: how many
    labels it wants. router_lr: how many times faster than its modules its router should learn. systems: of the
    literature, that it is.
    """

    name: str
    title: str
    summary: str
    source: str
    when: str
    make: Callable[..., list[BaySpec]]
    sites: Callable[[nn.Module], Any] = default_at
    needs_at: bool = True
    labels: int = 1
    router_lr: float = 1.0
    systems: tuple[System, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options of its own, with their defaults."""
        return {name: p.default for name, p in list(inspect.signature(self.make).parameters.items())[len(GIVEN) :]}

    def build(
        self, values: Values, by: str = "task", kind: Kind | None = None, at: Any = None, **options: Any
    ) -> list[BaySpec]:
        """The bays. kind, at: the method's own if None. Raises ConfigError for what does not fit, options included."""
        hints, known = get_type_hints(self.make), list(self.options)
        wrong = [f"method {self.name!r} has no option {key!r}{near(key, known)}" for key in options if key not in known]
        wrong += [
            f"method {self.name!r}: {key}={value!r}: {worded(hints[key])} is wanted, not {described(value)}."
            for key, value in options.items()
            if key in known and not fits(value, hints[key])
        ]
        if wrong:
            raise ConfigError("\n".join(wrong))
        return self.make(values, by, kind, at, **options)
