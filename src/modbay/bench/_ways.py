"""The ways that the benchmark compares: the paper's five, and any router of modbay by its name."""

from collections.abc import Callable
from typing import Any

import yaml
from torch import Tensor

from .. import routing
from ..abstract import Context, Router, Routing
from ..aggregation import Mixture
from ..errors import ConfigError, listed
from ..routing import TopK, Uniform
from ._nets import SelfScored, Way


class Given(Router):
    """The module of the rule's own number: what a router that knew the rules would do."""

    reads_x = False

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        return Routing(index=c.labels["rule"].unsqueeze(-1))  # type: ignore[union-attr]


def _gate(rules: int) -> Callable[[], Router]:
    return lambda: TopK(rules, dense=True, balance=0.0)


PAPER: dict[str, Callable[[int, int], Way]] = {
    "monolithic": lambda rules, size: Way(Uniform, Mixture, single=True),
    "modular": lambda rules, size: Way(Uniform, lambda: SelfScored(size)),
    "joint": lambda rules, size: Way(Uniform, SelfScored, scored=True),
    "operation": lambda rules, size: Way(_gate(rules), Mixture, operation=True),
    "ground-truth": lambda rules, size: Way(Given, Mixture),
}


def way(name: str, rules: int, size: int = 32) -> Way:
    """A way by its name: one of the paper's, or a router as in a bay's YAML, `TopK` or `{TopK: {k: 2}}`.

    A router sees the same x as the modules; with "@operation" at the end, the operation alone. Raises ConfigError for a
    name that is neither.
    """
    if name in PAPER:
        return PAPER[name](rules, size)
    text, _, sees = name.partition("@")
    if sees not in ("", "operation"):
        raise ConfigError(f"{name!r}: after @ stands what the router sees, operation alone or nothing for all of x.")
    said: Any = yaml.safe_load(text)
    said = {said: {}} if isinstance(said, str) else said
    if not isinstance(said, dict) or len(said) != 1:
        raise ConfigError(f"router {name!r}: write it as a name, or as {{TopK: {{k: 2}}}}.")
    (router, arguments), known = next(iter(said.items())), routers()
    if router not in known:
        raise ConfigError(f"no way or router is called {router!r}: {listed([*PAPER, *known])}.")
    try:
        known[router](**(arguments or {}))
    except TypeError as error:
        raise ConfigError(f"router {name!r}: {error}.") from error
    return Way(lambda: known[router](**(arguments or {})), Mixture, operation=bool(sees))


def routers() -> dict[str, Callable[..., Router]]:
    """modbay's routers by name."""
    return {
        name: value for name, value in vars(routing).items() if isinstance(value, type) and issubclass(value, Router)
    }
