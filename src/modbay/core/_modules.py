"""The modules of one site in one call: what an aggregator is given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..abstract import Context, Kind, Routing, Site
from ..errors import CompositionError, SiteError
from ..types import Params
from . import _sums
from ._differences import Differences, differences
from ._engine import apply
from ._plan import Arrangement


class Modules:
    """The modules of one site in one call: what an aggregator is given to run them, all of it grouped."""

    __slots__ = ("asked", "kinds", "names", "parts", "prefix", "router", "site")

    def __init__(
        self, parts: Sequence[Any], kinds: Arrangement, site: Site, names: Sequence[str], router: Any, prefix: str = ""
    ):
        self.parts, self.kinds, self.site, self.names, self.router = parts, kinds, site, names, router
        self.prefix = prefix  # of the names of losses
        self.asked = False  # whether the site's own router was asked; else the routing was set, or made elsewhere

    def __len__(self) -> int:
        return len(self.parts)

    def route(self, x: Tensor, c: Context) -> Routing:
        """Ask the router, and again with another input (recursion, trees); on the device of x, its losses kept."""
        self.asked = True
        routing = self.router(x, c)
        for name, value in routing.losses.items():
            c.add_loss(self.prefix + name, value)
        return routing.on(x.device)

    def active(self, routing: Routing) -> list[int]:
        """The modules that a routing for the whole batch names, as far as the host knows: else all of them."""
        return self.facts(routing)[0]

    def facts(self, routing: Routing) -> tuple[list[int], bool, bool]:
        """(the active modules, whether one enters f, whether one replaces it), found once a routing and arrangement."""
        key = ("facts", self.kinds)
        found = routing.cache.get(key)
        if found is None:
            host = routing.host
            said = self.kinds.live if host is None else dict.fromkeys(i for ids in host for i in ids)
            ids = [i for i in said if i >= 0 and self.kinds[i] >= 0]
            kinds = [self.parts[i].kind for i in ids]
            enters, replaces = any(k.enters for k in kinds), any(k.replaces for k in kinds)
            found = routing.cache[key] = (ids, enters, replaces)
        return found

    def one(self, i: int, f: Any, x: Tensor, y: Any, c: Context) -> Tensor:
        """What module i adds to y = f(x) for all rows; for a replacement, its output."""
        part = self.parts[i]
        return apply(part.kind, part.tensors(), f, x, y, c, self.site, False)

    def output(self, i: int, f: Any, x: Tensor, c: Context, y: Any = None) -> Tensor:
        """m_i(x): the output of the site with module i alone."""
        kind = self.parts[i].kind
        if kind.replaces:
            return self.one(i, f, x, None, c)
        if kind.enters:
            return f(x + self.one(i, f, x, x, c))
        y = (f(x) if f is not None else torch.zeros_like(x)) if y is None else y
        return y + self.one(i, f, x, y, c)

    def stacked(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """The parameters of modules of one kind, along a new leading axis. What they share is expanded, not copied."""
        parts = self.parts
        pool = parts[ids[0]].pool
        if pool is not None:
            if pool.whole:
                return pool.rows(ids)
            rows = [part.row for i in ids if (part := parts[i]).pool is pool]
            if len(rows) == len(ids):
                return pool.rows(rows)
        several = [parts[i].tensors() for i in ids]
        first, last, stack = several[0], several[-1], {}
        for name, tensor in first.items():
            if last[name] is tensor and all(other[name] is tensor for other in several):
                stack[name] = tensor.expand(len(ids), *tensor.shape)
            else:
                stack[name] = torch.stack([other[name] for other in several])
        return stack

    def sliced(self, ids: Sequence[int]) -> bool:
        """Whether these modules stand side by side in one pool, so that `stacked` copies nothing."""
        first, last = self.parts[ids[0]], self.parts[ids[-1]]
        return first.pool is not None and last.pool is first.pool and last.row - first.row == len(ids) - 1

    def averaged(self, routing: Routing, rows: int) -> tuple[Kind, Params, bool]:
        """(kind, Σ_i α_i φ_i, whether an example): the modules' parameters, averaged; they must be of one kind."""
        ids = self.active(routing)
        weights = routing.dense(len(self))
        kind = self.alike(ids)
        if weights.ndim > 1:
            weights = weights.reshape(rows, len(self))
        stack = self.stacked(ids)
        heads = routing.heads
        if heads is not None and weights.ndim > 1:
            heads = heads.reshape(rows, *heads.shape[-2:])
        chosen = weights if heads is None else heads
        chosen = chosen if ids == list(range(len(self))) else chosen[..., ids]
        mixed = {}
        for name, tensor in stack.items():
            if tensor.is_floating_point() and name not in kind.constants:
                mixed[name] = self._mixed(name, chosen.to(tensor.dtype), tensor, heads is not None)
            else:
                same = all(torch.equal(tensor[0], other) for other in tensor[1:])
                if not same:
                    raise CompositionError(
                        f"ParameterAverage at site {self.site.name!r}: {type(kind).__name__}'s {name!r} is not learned "
                        f"and differs between modules, so that they have no average; use of='deltas' or WeightedSum."
                    )
                mixed[name] = tensor[0].expand(rows, *tensor.shape[1:]) if weights.ndim > 1 else tensor[0]
        return kind, mixed, weights.ndim > 1

    def _mixed(self, name: str, weights: Tensor, tensor: Tensor, parts: bool) -> Tensor:
        """Σ_i α_i φ_i of one tensor (n, …), for each row of weights (…, n); with parts (…, h, n) of each of h
        equal parts along the tensor's longest axis."""
        if not parts:
            flat = weights @ tensor.flatten(1)
            return flat.view(*flat.shape[:-1], *tensor.shape[1:])
        shape, h = tensor.shape[1:], weights.shape[-2]
        longest = max(shape, default=0)
        if shape.count(longest) != 1 or longest % h:
            raise CompositionError(
                f"site {self.site.name!r}: {name!r} {tuple(shape)} has no longest axis that parts into {h}. Take "
                f"another number of heads, or kinds without that parameter."
            )
        axis = shape.index(longest) - len(shape)
        cut = tensor.movedim(axis, 1).unflatten(1, (h, -1))  # (n, h, longest / h, …)
        out = torch.einsum("...hn,nhp->...hp", weights, cut.flatten(2))
        front = weights.ndim - 2
        return out.unflatten(-1, cut.shape[2:]).flatten(front, front + 1).movedim(front, axis)

    def alike(self, ids: Sequence[int]) -> Kind:
        """The one kind of these modules; raises CompositionError if there are several, or none."""
        kinds = {self.kinds[i]: self.parts[i].kind for i in ids}
        if len(kinds) != 1:
            raise CompositionError(
                f"the parameters of {len(kinds)} kinds at site {self.site.name!r} can't be averaged: "
                f"{', '.join(sorted(repr(kind) for kind in kinds.values())) or 'no module is here'}. Use WeightedSum."
            )
        return next(iter(kinds.values()))

    def spread(self, routing: Routing, x: Tensor) -> Tensor:
        """x, but positions that come once for all examples, (t) or (1, t), as (b, t): a row for each that is routed."""
        once = not x.is_floating_point() and (x.ndim == 1 or (x.ndim == 2 and len(x) == 1))
        if not once or not self._positions():
            return x
        table = routing.weights if routing.index is None else routing.index
        return x.expand(len(table), x.shape[-1])  # type: ignore[arg-type]

    def each(self, y: Tensor, rows: int) -> Tensor:
        """y, but what a table of positions gives once for all examples, (1, t, d), as (rows, t, d)."""
        return y.expand(rows, *y.shape[1:]) if len(y) == 1 < rows and self._positions() else y

    def _positions(self) -> bool:
        return any(part is not None and part.kind.positions for part in self.parts)

    def check(self, routing: Routing, x: Tensor) -> None:
        """Raise SiteError if a routing is not for the rows of x, CompositionError if it parts what must not be."""
        table = routing.weights if routing.index is None else routing.index
        want, have = tuple(table.shape[:-1]), tuple(x.shape[: routing.axes])  # type: ignore[union-attr]
        if want != have:
            raise SiteError(
                f"site {self.site.name!r} has rows {have}, but the routing is for {want}: the rows of this site are "
                f"not the examples of the batch. Attach to another site, or route it by mb.Fixed or bay.use(name)."
            )
        if routing.axes == 2:
            tied = [self.names[i] for i in self.active(routing) if not self.parts[i].kind.tokenwise]
            if tied or self.site.axis != -1:
                why = f"the modules {', '.join(map(repr, tied))} look at whole examples" if tied else "it has no tokens"
                raise CompositionError(
                    f"site {self.site.name!r}: the tokens of one example were routed apart, but {why}. "
                    f"Route it by example."
                )

    def outputs(self, f: Any, x: Tensor, routing: Routing, c: Context) -> tuple[Tensor, Any]:
        """(m_i(x) stacked along a new first axis, y = f(x)): one entry a slot of the routing, or one a module."""
        y = f(x) if f is not None else None
        if routing.axes == 0 or routing.index is None:
            return torch.stack([self.output(i, f, x, c, y) for i in self.active(routing)]), y
        slots = [Routing(index=routing.index[..., k : k + 1]) for k in range(routing.index.shape[-1])]
        plain = y is not None and not self.facts(routing)[2] and not self.facts(routing)[1]
        run = (lambda slot: y + self.changes(f, x, y, slot, c)) if plain else (lambda slot: self.add(f, x, slot, c))
        return torch.stack([run(slot) for slot in slots]), y

    def differences(self, f: Any, x: Tensor, routing: Routing, c: Context) -> tuple[Tensor, Differences]:
        """(y = f(x), what is added to it), beside its places among those of `outputs`; in factors where it has them."""
        return differences(self, f, x, routing, c)

    def add(self, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
        """f(x) + Σ_i α_i Δ_i, where a replacement's Δ is m(x) − f(x). Only active modules run."""
        return _sums.add(self, f, x, routing, c)

    def changes(self, f: Any, x: Tensor, y: Any, routing: Routing, c: Context) -> Any:
        """Σ_i α_i Δ_i, given y = f(x), of the modules that act on the output; 0 if there are none."""
        return _sums.changes(self, f, x, y, routing, c)

    def mix(self, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
        """Σ_i α_i m_i(x) of replacements, without f. Only active ones run; a row without any is zero."""
        return _sums.mix(self, f, x, routing, c)
