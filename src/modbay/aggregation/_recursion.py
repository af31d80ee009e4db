"""Recursion: the router is asked again for what a module made, for so many steps, or until it chooses none.

Rosenbaum, Klinger and Riemer, "Routing Networks", 2018 (arXiv 1711.01239); Cases, Rosenbaum, Riemer, Geiger, Klinger,
Tamkin, Li, Agarwal, Greene, Jurafsky, Potts and Karttunen, "Recursive Routing Networks", 2019 (NAACL).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System

TESTS = "tests/test_hard.py::"


class Recursion(Aggregator):
    """v_{t+1} = m_{a_t}(v_t), a_t = r(v_t, c), for t < depth, v_0 = x; of modules that add to f, f(v_t) + Δ_{a_t}.

        mb.Modular(None, networks, mb.Policy(none=True, depth=3), mb.Recursion(3), features=32)

    Where the router chooses no module a row stays as it is: it passes (Rosenbaum et al.'s PASS), and may go on at the
    next step; with halt it is done for good, and all stop as soon as all are. The router finds the step in
    c.state["step"], and `methods.drawn` keeps every routing on the way, for its log-probabilities.
    Each site has its own router (a callable makes them): it is asked here, not at the door. Raises CompositionError for
    one router of all sites, for what is put in front of an input, and where an output can't be an input again.
    """

    systems = (
        System(
            (77,),
            "mb.Recursion(3)",
            (
                TESTS + "test_recursion_applies_what_the_router_chooses_next",
                TESTS + "test_a_row_that_halts_stays_as_it_is",
            ),
            "Recursive routing",
        ),
    )

    def __init__(self, depth: int = 3, halt: bool = False):
        super().__init__()
        if depth < 1:
            raise CompositionError(f"Recursion(depth={depth}): at least one step.")
        self.depth, self.halt = depth, halt

    def admit(self, kind: Kind, site: Site) -> None:
        if kind.place or site.form == "embedding":
            raise CompositionError(f"Recursion at site {site.name!r}: an output there is no input again.")

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if modules.router is None and self.depth > 1:
            raise CompositionError(
                f"Recursion at site {modules.site.name!r}: one router for all sites is asked once a call. Pass a "
                f"callable, router=lambda: mb.Policy(…), so that each site asks its own again."
            )
        before, v = dict(c.state), x
        done: Tensor | None = None
        try:
            for step in range(self.depth):
                c.state["step"] = step
                route = routing if step == 0 else modules.route(v, c)
                rest = _resting(route, v)
                rest = rest if done is None else rest | done
                if self.halt and not torch.compiler.is_compiling() and bool(rest.all()):
                    return v
                out = modules.mix(f, v, route, c) if self._replaces(modules) else modules.add(f, v, route, c)
                if out.shape != v.shape:
                    raise CompositionError(
                        f"Recursion at site {modules.site.name!r}: {tuple(v.shape)} became {tuple(out.shape)}, which "
                        f"can't go in again."
                    )
                v = torch.where(rest.view(*rest.shape, *[1] * (v.ndim - rest.ndim)), v, out)
                done = rest if self.halt else None
        finally:
            c.state.clear()
            c.state.update(before)
        return v

    def _replaces(self, modules: Any) -> bool:
        return all(part is None or part.kind.replaces for part in modules.parts)


def _resting(route: Routing, v: Tensor) -> Tensor:
    """Which rows have no module, to broadcast with the leading axes of v."""
    if route.index is not None:
        return (route.index < 0).all(-1)
    return (route.weights == 0).all(-1)  # type: ignore[union-attr]
