"""A module for each value of a label, and a module for each beside one for all.

Private: Houlsby et al., 2019 (arXiv 1902.00751), one adapter a task; Rebuffi, Bilen and Vedaldi, 2017 (arXiv
1705.08045), one a domain. Shared and private: Bousmalis, Trigeorgis, Silberman, Krishnan and Erhan, "Domain Separation
Networks", 2016 (arXiv 1608.06019); Liu, Qiu and Huang, 2017 (arXiv 1704.05742). Here the two are added.
"""

from typing import Any

from ..abstract import Kind
from ..routing import ByLabel
from ._at import default_kind
from ._defaults import bay_name, names_of, sites, unused
from ._spec import BaySpec, Method, Values


def private(values: Values, by: str = "task", kind: Kind | None = None, at: Any = None) -> list[BaySpec]:
    """y = f(x) + Δ_label."""
    modules = dict.fromkeys(names_of(values, by), kind or default_kind())
    return [BaySpec(bay_name(by), sites(at), modules, ByLabel(by))]


def both(values: Values, by: str = "task", kind: Kind | None = None, at: Any = None) -> list[BaySpec]:
    """y = f(x) + Δ_shared + Δ_label."""
    names = names_of(values, by)
    shared = unused("shared", names)
    router = ByLabel(by, {name: [shared, name] for name in names})
    return [BaySpec(bay_name(by), sites(at), dict.fromkeys([shared, *names], kind or default_kind()), router)]


PRIVATE = Method(
    "private",
    "A module for each label",
    "One module for each value of the label; none is shared.",
    "Houlsby et al., 2019 (arXiv 1902.00751); Rebuffi, Bilen and Vedaldi, 2017 (arXiv 1705.08045)",
    "The labels have many rows each or contradict each other, or each must be kept, sold or taken out alone.",
    private,
)
BOTH = Method(
    "shared+private",
    "Shared + a module for each label",
    "One module for all and one for each value of the label; what both add is summed.",
    "Bousmalis et al., 2016 (arXiv 1608.06019); Liu, Qiu and Huang, 2017 (arXiv 1704.05742)",
    "The labels have much in common and something of their own.",
    both,
)
