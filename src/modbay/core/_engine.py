"""The engine: runs the active modules of a site, grouped by kind, and knows nothing of methods, routers or models.

Kinds see only groups, aggregators only routings; this is where the two meet.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import (
    Context,
    Factors,
    FunctionComposition,
    Generator,
    Kind,
    ParameterComposition,
    Replacement,
    Site,
)
from ..errors import CompositionError
from ..ops import autocasts
from ..types import Params

AFFINE = ("linear", "transposed")


class Part(nn.Module):
    """One module's share of one site: its kind, and its parameters there."""

    pool: Any = None  # of a module that is packed, where its parameters are

    def __init__(self, kind: Kind, tensors: Params):
        super().__init__()
        self.kind = kind
        self.size = sum(tensor.numel() for tensor in tensors.values())
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=name not in kind.remade)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Part":
        """Moves and casts, as torch's, but in place: torch makes every buffer anew, so that sites would share none."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new is not old:
                try:
                    old.data = new
                except RuntimeError:  # a device whose tensors are of another type: each site has its own there
                    continue
                self._buffers[name] = old
        return self

    def tensors(self) -> dict[str, Any]:
        return {**self._parameters, **self._buffers} if self._buffers else self._parameters


def difference(kind: Kind, params: Params, f: Callable | None, x: Tensor, y: Any, c: Context, site: Site) -> Tensor:
    """What one module adds to y = f(x); for a replacement, its own output."""
    if isinstance(kind, ParameterComposition):
        return kind.delta(params, site).apply(x, y, site)
    if isinstance(kind, FunctionComposition):
        return kind.change(params, x, y, c)
    if isinstance(kind, Replacement):
        return kind.forward(params, x, f, c)
    raise CompositionError(
        f"{type(kind).__name__} at site {site.name!r}: an input composition has no output of its own; it needs an "
        f"aggregator that puts modules in front of the input (WeightedSum, Concatenate) at a seam that takes it."
    )


def apply(kind: Kind, params: Params, f: Any, x: Tensor, y: Any, c: Context, site: Site, grouped: bool) -> Tensor:
    """`difference`, in the dtype of the parameters, for one module or for a group: params (g, …), x and y (g, m, …)."""
    if isinstance(kind, Generator):
        return generated(kind, params, f, x, y, c, site, grouped)
    x, y, dtype = _cast(params, x, y, site)
    if not grouped or kind.batched:
        out = difference(kind, params, f, x, y, c, site)
    elif isinstance(kind, ParameterComposition):
        run = lambda p, x, y: kind.delta(p, site).apply(x, y, site)
        out = torch.func.vmap(run, in_dims=(0, 0, None if y is None else 0), randomness="different")(params, x, y)
    else:
        run = partial(_one, kind, f, c, site)
        out = torch.func.vmap(run, in_dims=(0, 0, None if y is None else 0), randomness="different")(params, x, y)
    return out if dtype is None else out.to(dtype)


def factored(kind: Kind, params: Params, x: Tensor, y: Tensor, c: Context, site: Site) -> Factors | None:
    """What a module adds to y in factors, in the dtype of its parameters, or a group that sees the same rows: params
    (g, …), x and y without that axis. None if its kind has none."""
    x, y, _ = _cast(params, x, y, site)
    if isinstance(kind, ParameterComposition):
        return kind.delta(params, site).factors(x, y, site)
    return kind.factors(params, x, y, c) if isinstance(kind, FunctionComposition) else None


def _cast(params: Params, x: Tensor, y: Any, site: Site) -> tuple[Tensor, Any, torch.dtype | None]:
    """x and y in the dtype of the parameters, and the dtype that they had, if it is another."""
    like = x if x.is_floating_point() else _embedded(y, site)  # at an embedding x is ids
    first = next(iter(params.values()), x)
    if like is None or first.dtype == like.dtype or not _casts(params, like):
        return x, y, None
    learned = next(p.dtype for p in params.values() if p.is_floating_point())
    return x.to(learned) if like is x else x, y if y is None else y.to(learned), like.dtype


def updated(kind: ParameterComposition, params: Params, x: Tensor, y: Tensor, out: Tensor, c: Context, site: Site):
    """out + Δ(x, y) of one module, in one product where its delta has one: `out` is y, or y with other updates."""
    if out is y and next(iter(params.values()), x).dtype == x.dtype:
        return kind.delta(params, site).onto(x, y, site)
    return out + apply(kind, params, None, x, y, c, site, False)


def _embedded(y: Tensor | None, site: Site) -> Tensor | None:
    """What has the dtype of f(x) where x is of integers: f(x) itself, or the table of an embedding that was not run."""
    return y if y is not None or site.form != "embedding" else site.weight


def _casts(params: Params, like: Tensor) -> bool:
    """Whether what comes in this dtype must be cast to that of the parameters."""
    learned = next((p.dtype for p in params.values() if p.is_floating_point()), like.dtype)
    return learned != like.dtype and like.is_floating_point() and not autocasts(like)


def _one(kind: Kind, f: Any, c: Context, site: Site, params: Params, x: Tensor, y: Any) -> Tensor:
    return difference(kind, params, f, x, y, c, site)


def generated(
    kind: Generator, params: Params, f: Any, x: Tensor, y: Any, c: Context, site: Site, grouped: bool
) -> Tensor:
    """A kind whose parameters differ by example: generate them, then run its inner kind with one group an example."""
    if kind.kind.tied:
        raise CompositionError(
            f"{type(kind).__name__} at site {site.name!r}: {type(kind.kind).__name__} ties the examples of a batch, so "
            f"that there is none for each example. Generate another kind."
        )
    if grouped:  # several generators, each with rows of its own
        rows = torch.arange(x.shape[0] * x.shape[1]) if c.rows is None else c.rows
        rows = rows.view(len(x), -1)
        several = [
            generated(kind, {k: v[i] for k, v in params.items()}, f, x[i], None if y is None else y[i],
                      replace(c, rows=rows[i]), site, False)
            for i in range(len(x))
        ]  # fmt: skip
        return torch.stack(several)
    each = kind.generate(params, x, replace(c, training=bool(getattr(site.module, "training", False))))
    if all(len(tensor) == 1 for tensor in each.values()):  # one set for all
        return apply(kind.kind, {name: tensor[0] for name, tensor in each.items()}, f, x, y, c, site, False)
    out = apply(kind.kind, each, f, x.unsqueeze(1), None if y is None else y.unsqueeze(1), c, site, True)
    return out.squeeze(1)
