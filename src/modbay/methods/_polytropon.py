"""Skills that tasks share: which of them a task has is learned with them.

Ponti, Sordoni, Bengio and Reddy, "Combining Modular Skills in Multitask Learning" (Polytropon), 2022 (arXiv
2202.13914).
"""

from functools import partial
from typing import Any

from ..abstract import Kind
from ..aggregation import ParameterAverage
from ..errors import ConfigError
from ..routing import Skills
from ._at import default_kind
from ._defaults import bay_name, names_of, number, sites
from ._spec import BaySpec, Method, Values


def build(
    values: Values,
    by: str = "task",
    kind: Kind | None = None,
    at: Any = None,
    skills: int = 8,
    prior: float = 0.0,
    per_site: bool = False,
) -> list[BaySpec]:
    """y = f with Σ_j (ẑ_tj / Σ ẑ_t) φ_j, the average of the skills' parameters by the gates of the row's label.

    skills: how many. prior: of the Indian buffet process. per_site: a row of gates at each site, as the paper has at
    each layer; by default one for the whole network, which few rows can learn.
    """
    if isinstance(prior, bool) or not isinstance(prior, (int, float)) or prior < 0:
        raise ConfigError(f"options: prior={prior!r}: the prior's coefficient is a number from 0.")
    names = names_of(values, by)
    modules = {f"skill{i}": kind or default_kind() for i in range(number("skills", skills))}
    make = partial(Skills, label=by, labels=names, prior=float(prior))
    return [BaySpec(bay_name(by), sites(at), modules, make if per_site else make(), ParameterAverage())]


POLYTROPON = Method(
    "polytropon",
    "Polytropon: learned skills",
    "A set of skills; each value of the label learns which of them it has, and their parameters are averaged.",
    "Ponti et al., 2022 (arXiv 2202.13914)",
    "Many labels that share parts of what they need; new labels with few rows are to come.",
    build,
    router_lr=10.0,  # gates are few and start at nothing
)
