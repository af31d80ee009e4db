"""The average of parameters: modules are merged first, and what is merged runs once.

Ponti et al., "Polytropon", 2022 (arXiv 2202.13914); Muqeeth, Liu and Raffel, "SMEAR", 2023 (arXiv 2306.03745).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..abstract import Aggregator, Context, Generator, Kind, ParameterComposition, Replacement, Routing, Site
from ..core import Network, apply, extension
from ..errors import CompositionError


class ParameterAverage(Aggregator):
    """y = f_{Σ_i α_i φ_i}(x): one module whose parameters are the weighted sum of the active ones', an example if α is.

    of: "parameters", so that LoRA's A and B are averaged each (as Polytropon does); or "deltas", Σ_i α_i Δ_i of what
    they do to f's parameters, BA as a whole. A row without any module is f(x). A route with heads (mb.Skills) averages
    each of h equal parts of a parameter by weights of its own, cut along its longest axis: A along the inputs, B along
    the outputs.
    Raises CompositionError for modules of different kinds (of="parameters"), or that have no delta (of="deltas").
    """

    heads: ClassVar[bool] = True

    def __init__(self, of: str = "parameters"):
        super().__init__()
        if of not in ("parameters", "deltas"):
            raise CompositionError(f"ParameterAverage(of={of!r}): the average is of 'parameters' or of 'deltas'.")
        self.of = of

    def admit(self, kind: Kind, site: Site) -> None:
        if self.of == "deltas" and not isinstance(kind, ParameterComposition):
            raise CompositionError(
                f"ParameterAverage(of='deltas') at site {site.name!r}: {type(kind).__name__} does not change f's "
                f"parameters, so that it has no delta. Use of='parameters'."
            )
        if isinstance(kind, Generator):
            raise CompositionError(
                f"ParameterAverage at site {site.name!r}: {type(kind).__name__} generates parameters for each example, "
                f"and an average of generators does not generate the average. Use WeightedSum."
            )
        if kind.tied:
            raise CompositionError(
                f"ParameterAverage at site {site.name!r}: {type(kind).__name__} ties the rows that it gets, which an "
                f"average for each example would part. Use WeightedSum."
            )
        if isinstance(kind, Network):
            raise CompositionError(
                f"ParameterAverage at site {site.name!r}: a network of your own is no function of its parameters, and "
                f"has no average here. Use Mixture or WeightedSum."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if self.of == "deltas":
            if routing.heads is not None:
                raise CompositionError("ParameterAverage(of='deltas'): heads are parts of parameters; of='parameters'.")
            return modules.add(f, x, routing, c)  # deltas act on x as they add up: nothing is materialised
        if not modules.active(routing):
            return f(x) if f is not None else torch.zeros_like(x)
        rows = x.shape[: routing.axes].numel()
        kind, params, each = modules.averaged(routing, rows)
        if routing.axes == 2 and not kind.tokenwise:
            raise CompositionError(
                f"{type(kind).__name__} mixes positions: it can't be averaged a token. Route examples."
            )
        if not each:
            return _output(kind, params, f, x, c, modules.site, None)
        live = (routing.dense(len(modules)) != 0).any(-1)
        return _output(kind, params, f, x, c, modules.site, live)

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        """What the averaged prompt or prefix puts in front of the input."""
        return extension(modules, routing, x, c, "average")


def _output(kind: Kind, params: Any, f: Any, x: Tensor, c: Context, site: Site, live: Tensor | None) -> Tensor:
    """The site's output under one module, or, with `live` (b,) or (b, t), one module a row where a row has any."""
    run = lambda x, y: _each(kind, params, f, x, y, c, site, 0 if live is None else live.ndim)
    if kind.enters:
        change = run(x, x)
        return f(x + (change if live is None else _where(live, change, torch.zeros_like(change))))
    if isinstance(kind, Replacement):
        out = run(x, None)
        if live is None or f is None:
            return out
        y = f(x)  # for the rows without a module
        if out.shape != y.shape:
            raise CompositionError(
                f"ParameterAverage at site {site.name!r}: {type(kind).__name__} gives {tuple(out.shape)} and f(x) is "
                f"{tuple(y.shape)}: rows with and without a module would differ in width. Use WeightedSum (heads)."
            )
        return _where(live, out, y)
    y = f(x) if f is not None else torch.zeros_like(x)
    change = run(x, y)
    return y + (change if live is None else _where(live, change, torch.zeros_like(change)))


def _each(kind: Kind, params: Any, f: Any, x: Tensor, y: Any, c: Context, site: Site, axes: int) -> Tensor:
    """The change of one module for all rows (axes 0), or of one a row, the rows being the first axes of x."""
    if not axes:
        return apply(kind, params, f, x, y, c, site, False)
    rows, outputs = (x, y) if axes == 1 else (x.flatten(0, 1), None if y is None else y.flatten(0, 1))
    out = apply(kind, params, f, rows.unsqueeze(1), None if outputs is None else outputs.unsqueeze(1), c, site, True)
    return out.squeeze(1) if axes == 1 else out.squeeze(1).unflatten(0, x.shape[:2])


def _where(live: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(live.view(*live.shape, *[1] * (a.ndim - live.ndim)), a, b)
