"""Sites that are not a module's whole call: a slice of its output, a span over two modules, a parameter of it, or what
goes into it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Context, ParameterComposition, Routing
from ..core import Function
from ..errors import CompositionError, SiteError
from ._seat import Seam


class SliceSeam(Seam):
    """x is the input; y the features start … stop of the output. The other features pass by."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def through(self, modular, run, target, args, kwargs, c, route, aggregator) -> Any:
        whole = Function(run, args, kwargs, target, modular.site.name)
        kept: list[Tensor] = []

        def sliced(x: Tensor) -> Tensor:
            kept[:] = [whole(x)]
            return kept[0][..., self.start : self.stop]

        y = modular.run(Function(sliced, (whole.x,), {}), whole.x, c, route, aggregator)
        if not kept:  # f was replaced, and there is still the rest of the output to be had
            sliced(whole.x)
        out = kept[0]
        return whole.finish(torch.cat([out[..., : self.start], y, out[..., self.stop :]], -1))


class Entry:
    """Remembers the x at which a span begins: a hook on the first module, and one x a call in flight."""

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)

    def __getstate__(self) -> dict:
        return {"x": None}


class SpanSeam(Seam):
    """x is the input of one module, y the output of a later one: f is all between, and can't be called again."""

    def __init__(self, first: nn.Module, name: str):
        self.first, self.name, self.entry = first, name, Entry()
        first.register_forward_pre_hook(self.entry, with_kwargs=True)

    def through(self, modular, run, target, args, kwargs, c, route, aggregator) -> Any:
        x, self.entry.x = self.entry.x, None
        if x is None:
            raise SiteError(
                f"site {modular.site.name!r}: its end ran, but {self.name!r}, where it begins, did not run before it."
            )
        end = Function(run, args, kwargs, target, modular.site.name)
        done = end(end.x)

        def between(z: Tensor) -> Tensor:
            if z is not x:
                raise CompositionError(
                    f"site {modular.site.name!r} is a span: what lies between can't be run with another input, as "
                    f"this module or aggregator asks. Attach at a module instead."
                )
            return done

        return end.finish(modular.run(Function(between, (x,), {}), x, c, route, aggregator))

    def undo(self) -> None:
        hooks = self.first._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if hook is self.entry:
                del hooks[key]
                self.first._forward_pre_hooks_with_kwargs.pop(key, None)


class BeforeSeam(Seam):
    """x is what goes into the target, and f the identity; the target is called with y instead."""

    outermost = True

    def through(self, modular, run, target, args, kwargs, c, route, aggregator) -> Any:
        call = Function(run, args, kwargs, target, modular.site.name)
        y = modular.run(Function(_same, (call.x,), {}), call.x, c, route, aggregator)
        return call.finish(call(y))


def _same(x: Tensor) -> Tensor:
    return x


class ParameterSeam(Seam):
    """The site is a parameter of the target (fused experts (E, o, i), a gate (o, i)): it is W ⊕ Σ α_i ΔW_i while the
    target runs.

    Rows are not apart here, so that one routing must hold for the whole batch.
    """

    def through(self, modular, run: Callable, target: nn.Module, args, kwargs, c: Context, route, aggregator) -> Any:
        site = modular.site
        if route is None:
            f = Function(run, args, kwargs, target, site.name)
            route = modular.router(f.x, c)  # type: ignore[misc]
        route = one_for_all(route, site.name)
        modules = modular.modules_at()
        weight: Any = target._parameters[site.parameter]
        weights = route.dense(len(modules))
        total = weight
        for i in modules.active(route):
            kind = modules.parts[i].kind
            if not isinstance(kind, ParameterComposition):
                raise CompositionError(
                    f"{type(kind).__name__} at {site.name!r}, a parameter: only parameter compositions (mb.LoRA …) fit."
                )
            change, bias = kind.delta(modules.parts[i].tensors(), site).dense(site)
            if bias is not None:
                raise CompositionError(f"{type(kind).__name__} at {site.name!r}, a parameter: it has no bias to move.")
            total = total + weights[i].to(change) * change
        try:
            target._parameters[site.parameter] = total.to(weight.dtype)  # modules may be of higher precision
            return run(*args, **kwargs)
        finally:
            target._parameters[site.parameter] = weight


def one_for_all(route: Routing, name: str) -> Routing:
    """The routing for the whole batch; raises SiteError if rows are routed apart."""
    if route.axes == 0:
        return route
    if route.host is not None and len(set(route.host)) == 1:
        ids = route.host[0]
        return Routing(index=torch.tensor(ids, dtype=torch.long), host=(ids,))
    raise SiteError(
        f"site {name!r} is a parameter shared by all rows of the batch, so that rows can't be routed apart: give one "
        f"label for all, or bay.use(name)."
    )
