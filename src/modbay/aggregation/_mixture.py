"""A mixture of experts: the active modules stand instead of f.

Jacobs, Jordan, Nowlan and Hinton, 1991; sparsely gated: Shazeer et al., 2017 (arXiv 1701.06538).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError


class Mixture(Aggregator):
    """y = Σ_i α_i m_i(x): f does not run; of the experts, only those that a row was routed to run, on its rows.

    A row without any module gives zeros. Raises CompositionError for a kind that needs f(x) (an adapter, a delta).
    """

    def admit(self, kind: Kind, site: Site) -> None:
        if not kind.replaces:
            raise CompositionError(
                f"Mixture at site {site.name!r}: {type(kind).__name__} changes f, which a mixture of experts does not "
                f"run. Use experts (mb.FeedForward, mb.Full, a network), or WeightedSum."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        return modules.mix(f, x, routing, c)
