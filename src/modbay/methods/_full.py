"""The two ends: the whole base learns, or nothing in it does."""

from typing import Any

from ..abstract import Kind
from ..aggregation import Mixture
from ..errors import ConfigError
from ..modules import Full
from ..routing import Fixed
from ._at import whole
from ._spec import BaySpec, Method, Values


def full(values: Values, by: str = "task", kind: Kind | None = None, at: Any = None) -> list[BaySpec]:
    """y = f_φ(x), φ a copy of all of the base's parameters, which learn; the base's own θ stay as they were.

    at: the base as one site; by default the part "trunk". A module as large as the base: its file is, too.
    """
    if kind is not None and not isinstance(kind, Full):
        raise ConfigError(f"method 'full' with {kind!r}: the whole base learns, so that there is no other module.")
    where = "trunk" if at is None else at
    return [BaySpec("full", where, {"full": Full() if kind is None else kind}, Fixed({"full": 1.0}), Mixture())]


def probe(values: Values, by: str = "task", kind: Kind | None = None, at: Any = None) -> list[BaySpec]:
    """y = f(x): no bay; only the heads learn."""
    if kind is not None or at is not None:
        raise ConfigError("method 'probe' has no modules in the base: leave out module and at.")
    return []


FULL = Method(
    "full",
    "Full fine-tuning",
    "All of the base's parameters learn, in a copy that is kept as one module; the base stays as it was.",
    "Howard and Ruder, ULMFiT, 2018 (arXiv 1801.06146); Devlin et al., BERT, 2018 (arXiv 1810.04805)",
    "A reference: what the base can do at all, if a file of its size and its memory in training can be afforded.",
    full,
    sites=whole,
    needs_at=False,
    labels=0,
)
PROBE = Method(
    "probe",
    "Linear probe",
    "No module in the base: only the heads learn, on what it says already.",
    "Alain and Bengio, 2016 (arXiv 1610.01644)",
    "A reference: what the base knows already. If others don't beat it, take it.",
    probe,
    sites=lambda model: None,
    needs_at=False,
    labels=0,
)
