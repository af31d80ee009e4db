"""A sequence of functions: each module works on what the one before it gave (survey section 4.4).

Stacked adapters: Pfeiffer et al., "MAD-X", 2020 (arXiv 2005.00052); modules in turn: Andreas et al., "Neural Module
Networks", 2016 (arXiv 1511.02799); Rosenbaum, Klinger and Riemer, "Routing Networks", 2018 (arXiv 1711.01239).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Context, FunctionComposition, Generator, Kind, Replacement, Routing, Site
from ..errors import CompositionError, listed
from ..types import System

ROUTED = "routed"


class Sequence(Aggregator):
    """y = f_φn ∘ … ∘ f_φ1: y_0 = f(x), and each active module in turn adds its α_i Δ_i to y_{i−1}, so that α gates it.

    An adapter's Δ_i is of x and y_{i−1}. What stands instead of f (an expert, a network) gives m_i(v_{i−1}) − y_{i−1},
    with v_0 = x and v_i = v_{i−1} + α_i (y_i − v_{i−1}), the output so far once there is one. Without f, y_0 = x.
    order: None, the bay's; names, first to last, of all modules that are ever active; or "routed", the order of the
    slots in which an index routes each row (a program an example). Rows may take different modules.
    Raises CompositionError for a kind that changes f's parameters or input, between which there is no order; and where
    an expert is to follow with another width than the site's.
    """

    systems = (
        System(
            (145,), 'mb.Sequence(["de", "ner"])',
            ("tests/test_aggregators.py::test_sequence_stacks_adapters_in_its_order",
             "tests/test_outputs.py::test_the_order_of_a_sequence_matters"),
            "stacked adapters",
        ),
    )  # fmt: skip

    def __init__(self, order: list[str] | tuple[str, ...] | str | None = None):
        super().__init__()
        if isinstance(order, str) and order != ROUTED:
            raise CompositionError(
                f"Sequence(order={order!r}): an order is a list of module names, {ROUTED!r} or None."
            )
        self.order = order if order is None or isinstance(order, str) else list(order)

    def admit(self, kind: Kind, site: Site) -> None:
        inner = kind.kind if isinstance(kind, Generator) else kind
        if not isinstance(inner, (FunctionComposition, Replacement)):
            raise CompositionError(
                f"Sequence at site {site.name!r}: {type(inner).__name__} changes f itself, so that there is no order "
                f"between it and other modules. Use WeightedSum, or a bay for each."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        f = f if f is not None else lambda v: v
        places = self._places(modules, routing)
        if not places:
            return f(x)
        slots = self._slots(places, modules, routing)
        instead = [i for i in places if modules.parts[i].kind.replaces]
        v, y = x, modules.add(f, x, slots[0], c)
        for before, slot in pairwise(slots):
            v = _moved(v, y, before, modules) if instead else v
            change = sum(modules.changes(f, taken, y, route, c) for taken, route in _apart(places, instead, slot, x, v))
            if isinstance(change, Tensor) and change.shape != y.shape:
                raise _misshapen(modules, y.shape, change.shape)
            y = y + change
        return y

    def steps(self, modules: Any, routing: Routing) -> list[Routing]:
        """The routing of each step, of one module a row."""
        places = self._places(modules, routing)
        return self._slots(places, modules, routing) if places else []

    def _places(self, modules: Any, routing: Routing) -> list[int]:
        """The modules that may be active here, in order."""
        active = modules.active(routing)
        if self.order == ROUTED and routing.axes == 0:
            return active  # as far as the host knows the route, in its order
        if not isinstance(self.order, list):
            return sorted(active)
        missing = [modules.names[i] for i in active if modules.names[i] not in self.order]
        if missing:
            raise CompositionError(
                f"Sequence(order={self.order!r}) says no place for {listed(missing)}, which may be active."
            )
        return [i for name in self.order for i in active if modules.names[i] == name]

    def _slots(self, places: list[int], modules: Any, routing: Routing) -> list[Routing]:
        """The steps, each of one module a row: the slots of a sparse routing, sorted by place; else all places."""
        index, weights, host = routing.index, routing.weights, routing.host
        if not routing.axes or index is None:
            if weights is None and host is not None:
                return [Routing(index=torch.tensor([i]), host=((i,),)) for i in places]
            dense = routing.dense(len(modules))
            each = dense.new_tensor(places, dtype=torch.long).unsqueeze(-1)
            if dense.ndim == 1:
                return [Routing(index=each[j], weights=dense[i : i + 1], host=((i,),)) for j, i in enumerate(places)]
            return [
                Routing(index=each[j].expand(*dense.shape[:-1], 1), weights=dense[..., i : i + 1])
                for j, i in enumerate(places)
            ]
        if self.order != ROUTED:
            rank = {i: r for r, i in enumerate(places)}
            table = torch.full((max(places) + 2,), len(places), device=index.device)
            table[torch.tensor(places, device=index.device)] = torch.arange(len(places), device=index.device)
            sort = table[index.clamp(max=len(table) - 2)].argsort(dim=-1, stable=True)  # −1 reads the table's end: last
            index = index.gather(-1, sort)
            weights = None if weights is None else weights.gather(-1, sort)
            host = host and tuple(tuple(sorted(ids, key=lambda i: rank.get(i, len(rank)))) for ids in host)
        return [_slot(index, weights, host, k) for k in range(index.shape[-1])]


def _slot(index: Tensor, weights: Tensor | None, host: Any, k: int) -> Routing:
    hosts = host and tuple(ids[k : k + 1] for ids in host)
    return Routing(
        index=index[..., k : k + 1], weights=None if weights is None else weights[..., k : k + 1], host=hosts
    )


def _moved(v: Tensor, y: Tensor, slot: Routing, modules: Any) -> Tensor:
    """v + α (y − v): what the next expert takes, after a slot."""
    if not slot.axes and slot.weights is None:
        return y
    if v.shape != y.shape:
        raise _misshapen(modules, v.shape, y.shape)
    there = torch.tensor([kind >= 0 for kind in modules.kinds] + [False], device=y.device)[slot.index[..., 0]]  # type: ignore
    gate = there.to(y.dtype) if slot.weights is None else there * slot.weights[..., 0].to(y.dtype)
    return v + gate.view(*gate.shape, *[1] * (y.ndim - gate.ndim)) * (y - v)


def _misshapen(modules: Any, before: Any, after: Any) -> CompositionError:
    return CompositionError(
        f"Sequence at site {modules.site.name!r}: a module follows another, but {tuple(before)} became {tuple(after)}; "
        f"in a sequence each keeps the shape. Use WeightedSum, or route at most one module by an index without weights."
    )


def _apart(places: list[int], instead: list[int], slot: Routing, x: Tensor, v: Tensor) -> list[tuple[Tensor, Routing]]:
    """(what they take, their route): adapters take x beside y; what stands instead of f takes v."""
    if len(instead) in (0, len(places)):
        return [(v if instead else x, slot)]
    return [(v, _only(slot, instead)), (x, _only(slot, [i for i in places if i not in instead]))]


def _only(slot: Routing, ids: list[int]) -> Routing:
    """The slot's route as far as it goes to these modules."""
    assert slot.index is not None
    keep = torch.isin(slot.index, torch.tensor(ids, device=slot.index.device))
    hosts = slot.host and tuple(tuple(i for i in row if i in ids) for row in slot.host)
    return Routing(index=torch.where(keep, slot.index, -1), weights=slot.weights, host=hosts)
