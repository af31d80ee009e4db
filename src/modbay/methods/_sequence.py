"""A language's module and then a task's: each works on what the one before it gave.

Pfeiffer, Vulić, Gurevych and Ruder, "MAD-X", 2020 (arXiv 2005.00052).
"""

from typing import Any

from ..abstract import FunctionComposition, Kind
from ..errors import ConfigError, listed
from ..modules import Bottleneck
from ..routing import ByLabel
from ..seams import role
from ._defaults import bay_name, names_of
from ._spec import BaySpec, Method, Values

SITES = [role.ffn_out]


def build(
    values: Values, by: str = "language", kind: Kind | None = None, at: Any = None, then: str | None = None
) -> list[BaySpec]:
    """y = (f + Δ_by)(x), then y + Δ_then(y): two bays at the same sites, the second of which sees the first's output.

    by, then: the labels, as language and task; `then` is the other label there is, if there are two. kind: an adapter
    that reads the output, by default mb.Bottleneck(reduction=16), the paper's. Differs from MAD-X: both are trained
    together on the labelled rows, and there are no invertible adapters at the embeddings.
    Raises ConfigError without two labels, or for a kind between whose modules there is no order.
    """
    others = [label for label in values if label != by]
    if then is None:
        then = "task" if "task" in others else others[0] if len(others) == 1 else None
    if then is None or then == by:
        raise ConfigError(
            f"method 'sequence' wants two labels, as language and task; by={by!r} is one, and there are "
            f"{listed(values)}. Give the rows another label (by: {{language: COLUMN}}), or say which, options: "
            f"{{then: LABEL}}."
        )
    kind = Bottleneck(reduction=16) if kind is None else kind
    if not isinstance(kind, FunctionComposition) or getattr(kind, "placement", "serial") != "serial":
        raise ConfigError(
            f"method 'sequence' with {kind!r}: it doesn't read what the module before it gave, so that there is no "
            f"order between the two. Use Bottleneck, or the method shared+private, which adds."
        )
    where = SITES if at is None else at
    return [
        BaySpec(bay_name(label), where, dict.fromkeys(names_of(values, label), kind), ByLabel(label))
        for label in (by, then)
    ]


SEQUENCE = Method(
    "sequence",
    "Language, then task",
    "Two bays in order: the label's module, then the task's, which works on what the first gave.",
    "Pfeiffer et al., MAD-X, 2020 (arXiv 2005.00052)",
    "Two labels cross, and pairs of them that were never seen together must work.",
    build,
    sites=lambda model: SITES,
    needs_at=False,
    labels=2,
)
