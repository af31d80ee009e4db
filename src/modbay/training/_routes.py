"""Which modules a row goes to: its labels' values as the bays' routers know them, and the head of its task."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data import Row
from ..errors import ConfigError, listed

HEADS, HEAD = "heads", "head"  # the bay of heads, and the label that routes it
ARRIVALS, ARRIVAL = "arrivals", "arrival"  # the bay of modules that came later, and the label that routes it


@dataclass(frozen=True)
class Own:
    """What rows with a label of this value have for themselves, since they came later: a head, a module in ARRIVALS.

    instead: what a bay's label is for them, whatever theirs says; None for none of its modules.
    """

    label: str
    value: str
    task: str
    head: str | None = None
    arrival: str | None = None
    instead: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Routes:
    """values: {label: {value: name}}, the name being what routers and modules call it. heads: {task: head}."""

    values: dict[str, dict[str, str]]
    heads: dict[str, str] = field(default_factory=dict)
    own: list[Own] = field(default_factory=list)

    def of(self, row: Row, keywords: tuple[str, ...]) -> dict[str, str | None]:
        """The labels of a call for this row; raises ConfigError for a value that no module was made for."""
        mine = [one for one in self.own if row.task == one.task and row.labels.get(one.label) == one.value]
        mine.sort(key=lambda one: one.label == "task")  # a value's own goes before its task's
        instead = {label: name for one in reversed(mine) for label, name in one.instead.items()}
        out: dict[str, str | None] = {}
        for keyword in keywords:
            if keyword in instead:
                out[keyword] = instead[keyword]
            elif keyword == HEAD:
                out[keyword] = next((one.head for one in mine if one.head), None) or self.heads[row.task]
            elif keyword == ARRIVAL:
                out[keyword] = next((one.arrival for one in mine if one.arrival), None)
            else:
                out[keyword] = self._name(row, keyword)
        return out

    def _name(self, row: Row, label: str) -> str:
        value = row.labels.get(label)
        if value is None:
            raise ConfigError(
                f"{row.where}: the modules are routed by {label!r}, which this row lacks. Say which column holds it "
                f"(--by {label}=COLUMN)."
            )
        if value not in self.values[label]:
            raise ConfigError(
                f"{row.where}: {label}={value!r} is new to the run, which knows {listed(self.values[label])}. "
                f"`modbay extend` makes a module for it, `modbay adapt` a route over those that exist."
            )
        return self.values[label][value]

    def dump(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Routes":
        """What `dump` gave."""
        return cls(dict(given["values"]), dict(given["heads"]), [Own(**one) for one in given["own"]])
