"""Routing, as tables: which modules each value of a label uses, how evenly, and whether it has collapsed.

Collapse and balance: Pfeiffer et al., 2023 (arXiv 2302.11529), section 4.2.2; Shazeer et al., 2017 (1701.06538).
The effective number exp H: Hill, "Diversity and Evenness", 1973; Jost, "Entropy and diversity", 2006.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing
from ..attach import Bay, bays
from ..errors import CompositionError
from ..recording import LITTLE, Recording, use
from ..types import Labels

ALIKE = 0.99  # a cosine above which two modules are one


def routes(bay: Bay, values: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The weights that a router gives to each value of its label, outside training: a row for each route there is.

    {bay, site ("" is one for all), label, values, modules, weights (values, n)}. values: by default those that the
    router knows. A router without a label (Uniform, Fixed) has one row of weights. Raises CompositionError for a router
    that reads x, whose routes `recorded` finds, or that reads several labels.
    """
    shared = bay.state.router
    each = {"": shared} if shared is not None else {name: m.router for name, m in bay.modulars.items()}
    rows = []
    for site, router in each.items():
        if not isinstance(router, Router) or router.reads_x or len(router.keywords) > 1:
            why = f"{type(router).__name__} routes by the input, or by several labels"
            raise CompositionError(f"routes: bay {bay.state.name!r}: {why}. Use recorded(model) around calls of it.")
        label = router.keywords[0] if router.keywords else ""
        known = list(getattr(router, "labels", ()) if values is None else values) if label else ["all"]
        routing = _routed(router, Context({label: known} if label else {}))
        rows += rows_of(bay.state.name, bay.names(), site, label, known, routing)
    return rows


def _routed(router: Router, c: Context) -> Routing:
    training = router.training
    router.eval()
    try:
        with torch.no_grad():
            return router(None, c)
    finally:
        router.train(training)


def rows_of(
    bay: str, names: Sequence[str], site: str, label: str, values: Sequence[str], routing: Routing
) -> list[dict[str, Any]]:
    """A routing of one row a value, as `routes` has it."""
    several = {site: routing} if routing.sites is None else {name: routing.at(name) for name in routing.sites}
    out = []
    for where, route in several.items():
        weights = route.dense(len(names)).detach().float().cpu().reshape(-1, len(names)).expand(len(values), -1)
        row = {"bay": bay, "site": where, "label": label, "values": list(values), "modules": list(names)}
        out.append({**row, "weights": weights.tolist()})
    return out


class Recorder:
    """The recordings of all bays of a model: what `bay.record()` gives for one. `label` says labels of the calls that
    follow."""

    def __init__(self, recordings: Mapping[str, Recording]):
        self.bays = dict(recordings)

    def label(self, **labels: Labels) -> "Recorder":
        """Labels of the next calls, a list with one an example, beside those that the model is called with."""
        for recording in self.bays.values():
            recording.label(**labels)
        return self

    def rows(self) -> list[dict[str, Any]]:
        """What was recorded, as `routes` has it; the label "" is of all examples."""
        return [row for recording in self.bays.values() for row in recording.rows()]

    def metrics(self) -> list[dict[str, Any]]:
        """Every figure of every site and label."""
        return [row for recording in self.bays.values() for row in recording.metrics()]

    def alarms(self) -> list[str]:
        """What looks wrong, in sentences."""
        return [said for recording in self.bays.values() for said in recording.alarms()]


@contextmanager
def recorded(model: nn.Module, *, when: str = "evaluation", tokens: int = 0) -> Iterator[Recorder]:
    """Record the routes of all calls in the block, of all bays; by default of those that are made outside training.

    with recorded(model) as recorder:
        for batch, language in batches:
            recorder.label(language=language)
            model(**batch)
    rows = recorder.rows()
    """
    with ExitStack() as stack:
        found = {name: stack.enter_context(bay.record(when=when, tokens=tokens)) for name, bay in bays(model).items()}
        yield Recorder(found)


def collapse(
    modules: Sequence[str], weights: Any = None, similarity: Mapping[str, Any] | None = None, *, bay: str = ""
) -> list[str]:
    """What looks wrong, in sentences: modules out of use, rows that all route alike, modules that became one.

    weights: (rows, n), of label values or of examples; similarity: what `similarity` returns, if it is to be looked at.
    """
    head, n, said = f"bay {bay!r}: " if bay else "", len(modules), []
    if weights is not None and n > 1:
        w = np.asarray(weights.detach().float().cpu() if isinstance(weights, Tensor) else weights, dtype=float)
        w = w.reshape(-1, n)
        for name, share in zip(modules, use(w), strict=True):
            if share < 1 / (LITTLE * n):
                said.append(f"{head}module {name!r} gets {share:.2%} of the use, where an equal share is {1 / n:.1%}.")
        if len(w) > 1 and np.ptp(w, axis=0).max() < 1e-2:
            said.append(f"{head}all {len(w)} rows of the routing are alike: the router does not tell them apart.")
    if similarity is not None:
        cosine = np.asarray(similarity["cosine"])
        for i in range(n):
            for j in range(i + 1, n):
                if cosine[i, j] > ALIKE:
                    what = f"the cosine of their {similarity['of']} is {cosine[i, j]:.4f}"
                    said.append(f"{head}modules {modules[i]!r} and {modules[j]!r} are nearly the same: {what}.")
    return said
