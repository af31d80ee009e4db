"""Routing, as tables: which modules each value of a label uses, how evenly, and whether it has collapsed.

Collapse and balance: Pfeiffer et al., 2023 (arXiv 2302.11529), section 4.2.2; Shazeer et al., 2017 (1701.06538).
The effective number exp H: Hill, "Diversity and Evenness", 1973; Jost, "Entropy and diversity", 2006.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing
from ..attach import Bay, bays
from ..errors import CompositionError, LabelError

LITTLE = 10  # a module with less than 1 / (LITTLE n) of the use is out of use
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
    """The mean weights of the routes of calls, by label value. `label` says the labels of the calls that follow."""

    def __init__(self, model: nn.Module):
        self.bays = bays(model)
        self.labels: dict[str, Sequence[str | None]] = {}
        self.sums: dict[tuple[str, str, str], dict[str, tuple[Tensor, Tensor]]] = {}

    def label(self, **labels: Sequence[str | None]) -> "Recorder":
        """The labels of the next calls, a list with one an example, beside those that the model is called with."""
        self.labels = labels
        return self

    def keep(self, bay: Bay, site: str, router: Router, c: Context, routing: Routing) -> None:
        """Add a call's routes, outside training."""
        if router.training or c.recomputing():
            return
        several = {site: routing} if routing.sites is None else {name: routing.at(name) for name in routing.sites}
        said = {k: v for k, v in {**c.labels, **self.labels}.items() if isinstance(v, (list, tuple))}
        for where, route in several.items():
            weights = _by_example(route.dense(len(bay.names())).detach().float(), c.mask)
            self._add((bay.state.name, where, ""), "all", weights.mean(0), len(weights))
            for label, values in said.items():
                self._add_values((bay.state.name, where, label), weights, values)

    def _add_values(self, key: tuple[str, str, str], weights: Tensor, values: Sequence[str | None]) -> None:
        if len(weights) not in (1, len(values)):
            raise LabelError(f"{key[2]}={len(values)} labels for the routes of {len(weights)} examples.")
        weights = weights.expand(len(values), -1)
        places: dict[str, list[int]] = {}
        for i, value in enumerate(values):
            if value is not None:
                places.setdefault(value, []).append(i)
        for value, some in places.items():
            self._add(key, value, weights[torch.tensor(some, device=weights.device)].mean(0), len(some))

    def _add(self, key: tuple[str, str, str], value: str, mean: Tensor, n: int) -> None:
        by_value = self.sums.setdefault(key, {})
        total, count = by_value.get(value, (torch.zeros_like(mean), torch.zeros((), device=mean.device)))
        by_value[value] = total + n * mean, count + n

    def rows(self) -> list[dict[str, Any]]:
        """What was recorded, as `routes` has it; the label "" is of all examples."""
        out = []
        for (bay, site, label), by_value in self.sums.items():
            values = sorted(by_value)
            weights = [(by_value[value][0] / by_value[value][1]).tolist() for value in values]
            row = {"bay": bay, "site": site, "label": label, "values": values, "modules": self.bays[bay].names()}
            out.append({**row, "weights": weights})
        return out


def _by_example(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Weights (n,), (b, n) or (b, t, n) as (b, n), means over the tokens that are not padding."""
    if weights.ndim < 3:
        return weights.reshape(-1, weights.shape[-1])
    weights = weights.flatten(1, -2)
    if mask is None or mask.shape[0] != len(weights) or mask.shape[1] < weights.shape[1]:
        return weights.mean(1)
    real = mask[:, -weights.shape[1] :].to(weights).unsqueeze(-1)
    return (weights * real).sum(1) / real.sum(1).clamp(min=1)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recorder]:
    """Record the routes of all calls in the block that are made outside training.

    with recorded(model) as recorder:
        for batch, language in batches:
            recorder.label(language=language)
            model(**batch)
    rows = recorder.rows()
    """
    recorder = Recorder(model)
    handles = []
    try:
        for bay in recorder.bays.values():
            for site, router in [("", bay.state.router), *[(name, m.router) for name, m in bay.modulars.items()]]:
                if router is not None:
                    handles.append(router.register_forward_hook(_hook(recorder, bay, site)))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _hook(recorder: Recorder, bay: Bay, site: str):
    def hook(router: Any, args: tuple, routing: Any) -> None:
        recorder.keep(bay, site, router, args[1], routing)

    return hook


# Pure functions of weights (…, n)


def use(weights: Any) -> np.ndarray:
    """The share of each module (n,) in weights (…, n): their sums over rows, as parts of one."""
    w = np.asarray(weights.detach().float().cpu() if isinstance(weights, Tensor) else weights, dtype=float)
    total = w.reshape(-1, w.shape[-1]).sum(0)
    return total / total.sum() if total.sum() > 0 else np.zeros_like(total)


def entropy(shares: Any) -> float:
    """H = −Σ p log p, in nats, of shares (n,)."""
    p = np.asarray(shares, dtype=float)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def effective_modules(shares: Any) -> float:
    """exp H: n if all n modules are used alike, 1 if only one is."""
    return float(np.exp(entropy(shares)))


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
