"""One module for all: multi-task learning by hard sharing.

Caruana, "Multitask Learning", Machine Learning 28, 1997; as one adapter for all tasks: the baseline of Karimi Mahabadi,
Ruder, Dehghani and Henderson, 2021 (arXiv 2106.04489).
"""

from typing import Any

from ..abstract import Kind
from ..routing import Fixed
from ._at import default_kind
from ._defaults import sites
from ._spec import BaySpec, Method, Values


def build(values: Values, by: str = "task", kind: Kind | None = None, at: Any = None) -> list[BaySpec]:
    """y = f(x) + Δ_shared, whatever the label."""
    return [BaySpec("shared", sites(at), {"shared": kind or default_kind()}, Fixed({"shared": 1.0}))]


SHARED = Method(
    "shared",
    "One shared module",
    "One module that all rows train and use, whatever their labels.",
    "Caruana, 1997; as an adapter: Karimi Mahabadi et al., 2021 (arXiv 2106.04489)",
    "First: the labels are alike or have few rows each, and none must be added or taken out alone.",
    build,
    labels=0,
)
