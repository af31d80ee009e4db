"""One aggregator here, another there: for a module whose parts are put together in more than one way.

Pfeiffer, Vulić, Gurevych and Ruder, "MAD-X", 2020 (arXiv 2005.00052), whose language modules have a part at the
embeddings, and parts within the norms of the layers.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError
from ._sum import WeightedSum


class PerSite(Aggregator):
    """y = A_s(f, x, {m_i}, r, c), with A_s the first whose pattern matches the site's name, else the weighted sum.

        aggregator=mb.PerSite({"*.output.LayerNorm": mb.Again("input")})

    where: aggregators by pattern (fnmatch) of site names. other: of the sites that match none; None: WeightedSum().
    Where one of them has parameters, pass a callable that makes it, for a set at each site.
    Raises CompositionError for a pattern that is no string, or what is no aggregator.
    """

    def __init__(self, where: Mapping[str, Aggregator], other: Aggregator | None = None):
        super().__init__()
        wrong = [key for key, part in where.items() if not isinstance(key, str) or not isinstance(part, Aggregator)]
        if wrong or not isinstance(other, (Aggregator, type(None))):
            raise CompositionError(
                f"PerSite({where!r}, {other!r}): a mapping from patterns of site names to aggregators, and one for the "
                f"rest."
            )
        self.where = dict(where)
        self.parts = nn.ModuleList(self.where.values())
        self.other = WeightedSum() if other is None else other

    def at(self, site: str) -> Aggregator:
        """The one at a site."""
        return next((part for pattern, part in self.where.items() if fnmatchcase(site, pattern)), self.other)

    def build(self, site: Site) -> None:
        self.at(site.name).build(site)

    def admit(self, kind: Kind, site: Site) -> None:
        self.at(site.name).admit(kind, site)

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        return self.at(modules.site.name).extend(modules, routing, x, c)

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        return self.at(modules.site.name)(f, x, modules, routing, c)
