"""The site's own function once more, after its modules: a norm that is used again behind an adapter.

Pfeiffer, Vulić, Gurevych and Ruder, "MAD-X", 2020 (arXiv 2005.00052); Pfeiffer, Goyal, Lin, Li, Cross, Riedel and
Artetxe, "Lifting the Curse of Multilinguality by Pre-training Modular Transformers" (X-MOD), 2022 (arXiv 2205.06266).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..abstract import Aggregator, Context, InputComposition, Kind, Routing, Site
from ..errors import CompositionError


class Again(Aggregator):
    """y = f(f(x) + Σ_i α_i Δ_i): what the modules made of f(x) goes through f itself once more.

    For a site whose output can be its input, a norm. A row without any module gives f(f(x)), so that the base alone is
    another function than without the bay. Raises CompositionError for an input composition, or where f changes widths.
    """

    def admit(self, kind: Kind, site: Site) -> None:
        if isinstance(kind, InputComposition) or site.inputs != site.outputs or site.form == "embedding":
            raise CompositionError(
                f"Again at site {site.name!r} with {type(kind).__name__}: what modules make of the output must be an "
                f"input of the site. Attach at a norm, or use WeightedSum."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if f is None:
            raise CompositionError("Again runs f once more, and there is no f here. Use WeightedSum.")
        return f(modules.add(f, x, routing, c))
